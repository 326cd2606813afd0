"""What tests of MMaDA check on the double and on upstream's code alike."""

import pytest
import tiny
import torch
from doubles import mmada as double

from captum_dcam.targets import Target
from captum_dcam.vjp import rows

SIDE = 64  # pixels: 4 × 4 tokens
TOKENS = (SIDE // 16) ** 2
SIZES = ((64, 64), (300, 200), (200, 300), (640, 480), (100, 30), (17, 40), (9, 5), (1024, 768))


def own_ids(forward):
    """The prompt as the facts describe it, put together by hand."""
    vq, request = forward.adapter.processor[1], forward.request
    codes = vq.get_code(request.pixels) + double.TEXT
    n = len(codes)
    return torch.cat(
        (
            torch.tensor([[126089, 126084]]).expand(n, 2),
            codes,
            torch.tensor([[126085]]).expand(n, 1),
            request.extras[0],
        ),
        dim=1,
    )


def fd(forward, position, score="commit", tolerance=1e-4):
    """Compare a target's gradient with central differences along a random direction."""
    t = forward.trajectory
    step = t.step_of(0, position, score)
    token = int(t.tokens[0, position])
    (row,) = rows(forward, [Target("x", (position,), (token,))], score=score)
    gradient = row.gradients[0]
    direction = torch.randn(gradient.shape, generator=torch.Generator().manual_seed(3)).double()
    value = []
    for sign in (1, -1):
        with torch.no_grad(), forward.edited(lambda f, _i, s=sign: f + s * 1e-4 * direction.to(f)):
            logits = forward.replay(torch.tensor([0]), torch.tensor([step]))
        value.append(logits[0, position, token].double())
    slope = float((value[0] - value[1]) / 2e-4)
    if gradient.dtype == torch.float64:
        assert slope == pytest.approx(float((gradient * direction).sum()), rel=tolerance)
    assert gradient.any()


def left(made):
    model, vq = made.model, made.processor[1]
    return (
        [m.training for m in model.modules()],
        [(p.requires_grad, p.grad is None) for m in (model, vq) for p in m.parameters()],
        tiny.hooks(model) + tiny.hooks(vq),
        sorted(vars(model)),
        sorted(vars(model.config)),
        torch.random.get_rng_state().tolist(),
    )
