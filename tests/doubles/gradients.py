"""A gradient at the tap against finite differences, whatever the family."""

import pytest
import torch

from captum_dcam.model.gradients import target_gradients
from captum_dcam.model.words import Target


def fd(forward, position, score="commit", tolerance=1e-4):
    """Compare a target's gradient with central differences along a random direction."""
    t = forward.trajectory
    step = t.step_of(0, position, score)
    token = int(t.tokens[0, position])
    (row,) = target_gradients(forward, [Target("x", (position,), (token,))], score=score)
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
