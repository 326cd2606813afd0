"""Captum's infidelity and sensitivity against their formulas, pass by pass."""

import numpy as np
import pytest
import tiny
import torch
from faithfulness.cases import explain, maps, saliency, same, state, word, words

from captum_dcam.faithfulness import captum_metrics, infidelity, sensitivity_max
from captum_dcam.methods import AttributionTask, edited
from captum_dcam.methods.edited import with_pixels


def logit(forward, pixels, target):
    task = AttributionTask(forward, (target,))
    total = 0.0
    for position, token in zip(target.positions, target.token_ids, strict=True):
        with torch.no_grad():
            total += float(forward(pixels, *task.arguments(position))[0, position, token])
    return total


def drawn_squares(forward, samples, seed=0):
    g = torch.Generator().manual_seed(seed)
    shapes = forward.request.layout.shapes
    return torch.stack([captum_metrics._square(shapes, g) for _ in range(samples)])


@pytest.mark.parametrize(("images", "chunk"), [(1, 3), (2, 1), (2, 50)])
def test_infidelity_equals_its_formula(cache, images, chunk):
    forward = tiny.bound(cache, images=images)
    targets, given = words(forward), maps(forward)
    got = infidelity(forward, targets, given, samples=7, chunk=chunk)
    squares = drawn_squares(forward, 7)
    pictures = edited.pixel_fill(forward, "mean")(squares)
    rows = torch.cat([m.flatten(1) for m in given], 1).double()
    for n, target in enumerate(targets):
        whole = logit(forward, forward.request.pixels, target)
        falls = np.array([whole - logit(forward, p[None], target) for p in pictures])
        sums = (squares.double() @ rows[n]).numpy()
        beta = (sums * falls).mean() / (sums**2).mean()
        assert float(got[n]) == pytest.approx(((beta * sums - falls) ** 2).mean(), rel=1e-3)
    nothing = infidelity(forward, targets, [m * 0 for m in given], samples=7)
    assert (nothing >= got).all()
    scaled = infidelity(forward, targets, [m * -1e3 for m in given], samples=7)
    torch.testing.assert_close(scaled, got, rtol=1e-3, atol=1e-9)


def test_the_map_that_fits_all_squares_has_none(cache):
    """Fewer squares than tokens: a least-squares map predicts every fall."""
    forward = tiny.bound(cache)
    target = word(forward, 0)
    squares = drawn_squares(forward, 12).unique(dim=0)
    pictures = edited.pixel_fill(forward, "mean")(squares)
    whole = logit(forward, forward.request.pixels, target)
    falls = torch.tensor([whole - logit(forward, p[None], target) for p in pictures])
    best = torch.linalg.lstsq(squares.double(), falls.double()[:, None], driver="gelsd").solution
    good = infidelity(forward, (target,), [best.view(1, 8, 8)], samples=12)
    bad = infidelity(forward, (target,), [maps(forward, 1)[0]], samples=12)
    assert float(good) < 1e-6 < 1e-3 * float(bad)


def test_squares_stay_in_one_grid():
    g = torch.Generator().manual_seed(0)
    seen = set()
    for _ in range(300):
        square = captum_metrics._square(((4, 6), (1, 1)), g)
        first, second = square[:24].view(4, 6), square[24:]
        assert bool(first.any()) != bool(second.any())
        if first.any():
            ys, xs = first.nonzero().T
            side = int(ys.max() - ys.min()) + 1
            assert int(xs.max() - xs.min()) + 1 == side and int(first.sum()) == side**2 <= 4
            seen.add((int(ys.min()), int(xs.min()), side))
    assert len(seen) == 24 + 15


@pytest.mark.parametrize("made", [explain, saliency])
def test_sensitivity_equals_its_formula(cache, made):
    forward = tiny.bound(cache)
    targets, pixels = words(forward), forward.request.pixels
    got = sensitivity_max(
        forward, targets, made, samples=3, generator=torch.Generator().manual_seed(5)
    )
    g, reach = torch.Generator().manual_seed(5), 0.02 * float(pixels.max() - pixels.min())
    clean = made(with_pixels(forward, pixels), targets)[0].double().flatten(1)
    changes = []
    for _ in range(3):
        noisy = pixels.double() + reach * (2 * torch.rand(pixels.shape, generator=g).double() - 1)
        found = made(with_pixels(forward, noisy), targets)[0].double().flatten(1)
        changes.append((found - clean).norm(dim=1) / clean.norm(dim=1))
    torch.testing.assert_close(got, torch.stack(changes).amax(0), rtol=1e-3, atol=1e-6)
    assert (got > 0).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_narrow_and_wide_models(dtype):
    forward = tiny.bound("prefix", dtype=dtype)
    targets = words(forward)
    assert torch.isfinite(infidelity(forward, targets, maps(forward), samples=4)).all()
    got = sensitivity_max(forward, targets, explain, samples=2, radius=0.2)
    assert torch.isfinite(got).all() and (got > 0).all()


def test_sensitivity_of_a_constant_explanation_is_zero():
    forward = tiny.bound("prefix", images=2)
    fixed = maps(forward)
    got = sensitivity_max(forward, words(forward), lambda _f, _t: fixed, samples=2)
    assert got.tolist() == [0, 0]


def test_deterministic_and_nothing_left_behind(cache):
    forward = tiny.bound(cache)
    forward.train()
    targets = words(forward)
    before = state(forward)
    runs = [
        (
            infidelity(forward, targets, maps(forward), samples=3),
            sensitivity_max(forward, targets, explain, samples=2),
        )
        for _ in range(2)
    ]
    assert same(runs[0], runs[1]) and same(before, state(forward))

    def fails(_forward, _targets):
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        sensitivity_max(forward, targets, fails)
    assert same(before, state(forward))


def test_errors_teach():
    forward = tiny.bound("prefix")
    targets = words(forward)
    with pytest.raises(ValueError, match="samples is 0"):
        infidelity(forward, targets, maps(forward), samples=0)
    with pytest.raises(ValueError, match="radius is 0"):
        sensitivity_max(forward, targets, explain, radius=0)
    with pytest.raises(ValueError, match="at least one word"):
        sensitivity_max(forward, (), explain)
    with pytest.raises(ValueError, match="expected"):
        sensitivity_max(forward, targets, lambda _f, _t: maps(forward, 1))
