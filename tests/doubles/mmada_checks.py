"""What tests of MMaDA check on the double and on upstream's code alike."""

import tiny
import torch
from doubles import mmada as double

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
