"""iGOS++ against finite differences, known optima and images under masks, computed another way."""

import pytest
import tiny
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from captum_dcam.methods import AttributionTask, metered, method
from captum_dcam.methods.igos import LENGTHS, Objective
from captum_dcam.model.words import Target


def task_of(forward, *positions):
    ids = tuple(tiny.pair(forward, p)[1] for p in positions)
    return AttributionTask(forward, (Target("", positions, ids),))


def probability(forward, position, mask, size):
    """Of one token under one mask (size, size) over an image of 8 x 8 tokens, size a divisor."""
    args = forward.arguments(tiny.pair(forward, position))
    tokens = mask.repeat_interleave(8 // size, 0).repeat_interleave(8 // size, 1)
    shown = F.interpolate(tokens[None, None], (64, 64), mode="bilinear", align_corners=False)
    pixels = forward.request.pixels
    mean = pixels.mean((-2, -1), keepdim=True)
    edited = pixels * shown + mean * (1 - shown)
    with torch.no_grad():
        logits = forward(edited.to(pixels), *args)[0, position]
    return float(logits.softmax(-1)[tiny.pair(forward, position)[1]])


def smoothed(forward, positions, mask, points, l1, tv):
    """The objective whose gradient the direction is, one image after the other."""
    size, total = len(mask), 0.0
    for s in range(1, points + 1):
        part = mask * s / points
        for position in positions:
            gain = probability(forward, position, part, size)
            gain -= probability(forward, position, 1 - part, size)
            total += gain / points / len(positions)
    edges = [float((a - b) ** 2) for row in mask for a, b in zip(row[1:], row, strict=False)]
    edges += [float((a - b) ** 2) for row in mask.T for a, b in zip(row[1:], row, strict=False)]
    return total + l1 * float((1 - mask).mean()) + tv * sum(edges) / len(edges)


@pytest.mark.parametrize("positions", [(2,), (1, 6)])
def test_the_direction_is_the_gradient_of_the_integrated_objective(cache, positions):
    forward = tiny.bound(cache, dtype=torch.float64)
    made = method("igos_pp", size=4)
    score = made.score(task_of(forward, *positions), task_of(forward, *positions).targets[0])
    mask = torch.rand(4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    found = Objective(score, 0.7, 0.4, 3, 4).direction(mask[None])[0]
    for row, column in ((0, 0), (1, 2), (3, 1)):
        ends = []
        for step in (1e-4, -1e-4):
            moved = mask.clone()
            moved[row, column] += step
            ends.append(smoothed(forward, positions, moved, 3, 0.7, 0.4))
        numeric = (ends[0] - ends[1]) / 2e-4
        assert float(found[row, column]) == pytest.approx(numeric, rel=1e-4, abs=1e-7)


def linear(weights):
    return lambda masks: (masks * weights).flatten(1).sum(1)


@given(seed=st.integers(0, 99), size=st.integers(1, 6))
@settings(max_examples=15)
def test_what_is_worth_more_than_it_costs_is_masked(seed, size):
    """Of f = sum w M the optimum is 0 where 2 w is above l1 over the number of cells, else 1."""
    g = torch.Generator().manual_seed(seed)
    price = 1.0 / size**2
    dear = torch.rand(1, size, size, generator=g) < 0.4
    weights = torch.where(dear, 2.0, 0.1) * price * (1 + torch.rand(1, size, size, generator=g))
    objective = Objective(linear(weights), 1.0, 0.0, 4, 7)
    found = objective.minimise(torch.ones(1, size, size), 40)
    assert torch.equal(found, (~dear).float())
    every = torch.stack([found, torch.ones_like(found), torch.zeros_like(found)])
    values = objective.values(every)
    assert float(values[0]) == float(values.min())


def test_a_step_never_goes_up_and_stops_where_none_goes_down():
    cells = torch.tensor([[[0.0, 3.0], [0.0, 0.0]]])
    objective = Objective(lambda m: ((m - 0.4) * cells).square().flatten(1).sum(1), 0.0, 0.0, 3, 8)
    values = [
        float(objective.values(objective.minimise(torch.ones(1, 2, 2), n)[None])[0])
        for n in range(4)
    ]
    assert values == sorted(values, reverse=True)
    flat = Objective(lambda m: m.flatten(1).sum(1) * 0, 1.0, 0.0, 3, 8)
    assert torch.equal(flat.minimise(torch.ones(1, 2, 2), 5), torch.ones(1, 2, 2))


def test_passes_and_map(cache):
    """2 values, then per step 2 images a point, forward and back, and 2 a length."""
    forward = tiny.bound(cache)
    made = method("igos_pp", size=4, steps=1, points=2, l1=0.0)
    with metered(forward) as cost:
        found = made.attribute(task_of(forward, 2)).maps[0][0]
    assert (cost.forwards, cost.backwards) == (2 + 4 + 2 * len(LENGTHS), 4)
    assert found.min() >= 0 and found.max() <= 1 and found.any()
    blocks = found.unflatten(0, (4, 2)).unflatten(2, (4, 2))
    torch.testing.assert_close(blocks, blocks[:, :1, :, :1].expand_as(blocks))


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"size": 0}, "size is 0"),
        ({"l1": -1.0}, "l1 is -1.0"),
        ({"tv": float("nan")}, "tv is nan"),
        ({"points": 0}, "points is 0"),
    ],
)
def test_settings_are_checked(setting, message):
    with pytest.raises(ValueError, match=message):
        method("igos_pp", **setting)
