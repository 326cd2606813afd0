"""The pointing game against loops, its ties, and the energy version."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from scipy import ndimage

from captum_dcam.metrics import (
    bounding_boxes,
    concentration,
    energy_pointing_game,
    pointing_game,
)


def by_hand(values, mask, tolerance):
    if values.max() == 0:
        return 0.0
    members = [p for p in np.ndindex(*mask.shape) if mask[p]]
    tied = [p for p in np.ndindex(*values.shape) if values[p] == values.max()]
    near = [any(math.dist(p, q) <= tolerance for q in members) for p in tied]
    return sum(near) / len(tied)


@pytest.mark.parametrize("tolerance", [0, 1, 1.5, 2, 5, 100])
@pytest.mark.parametrize("seed", range(3))
def test_against_loops(tolerance, seed):
    rng = np.random.default_rng(seed)
    values = np.round(rng.random((6, 7, 9)) * 8)  # ties
    masks = rng.random((6, 2, 7, 9)) > 0.97
    got = pointing_game(torch.from_numpy(values), torch.from_numpy(masks), tolerance)
    for score, one, mask in zip(got, values, masks.any(1), strict=True):
        assert float(score) == pytest.approx(by_hand(one, mask, tolerance))


@pytest.mark.parametrize("radius", [3.0, 7.3, 15.0])
def test_tolerance_is_the_euclidean_distance(radius):
    mask = np.zeros((40, 30), dtype=bool)
    mask[5, 4] = mask[30:33, 20] = True
    near = ndimage.distance_transform_edt(~mask) <= radius
    every = torch.eye(1200).reshape(1200, 40, 30)  # each pixel alone
    got = pointing_game(every, torch.from_numpy(mask).expand(1200, 40, 30), radius)
    assert np.array_equal(got.reshape(40, 30).numpy() == 1, near)


@st.composite
def cases(draw):
    shape = draw(hnp.array_shapes(min_dims=2, max_dims=4, min_side=1, max_side=6))
    largest = draw(st.sampled_from([0.0, 1e-3, 1.0, 3e38]))
    levels = draw(hnp.arrays(np.float32, shape, elements=st.sampled_from([0, 0.5, 1])))
    masks = draw(hnp.arrays(np.bool_, shape))
    return torch.from_numpy(levels * np.float32(largest)), torch.from_numpy(masks)


@settings(max_examples=80)
@given(cases(), st.sampled_from([0.0, 1.0, 2.5]))
def test_properties(case, tolerance):
    maps, masks = case
    got = pointing_game(maps, masks, tolerance)
    assert got.shape == maps.shape[:-2] and ((got >= 0) & (got <= 1)).all()
    assert (got <= pointing_game(maps, masks, tolerance + 1)).all()
    assert torch.equal(got, pointing_game(maps / 4, masks, tolerance))
    for flipped in ((-1,), (-2,)):
        assert torch.equal(got, pointing_game(maps.flip(flipped), masks.flip(flipped), tolerance))
    energy = energy_pointing_game(maps, masks)
    assert torch.equal(energy, concentration(maps, bounding_boxes(masks)))
    assert ((energy >= concentration(maps, masks) - 1e-6) & (energy <= 1)).all()


def test_degenerate():
    some = torch.tensor([[True, False], [False, False]])
    assert float(pointing_game(torch.ones(2, 2), some)) == 0.25
    assert float(pointing_game(torch.zeros(2, 2), ~some)) == 0
    assert float(pointing_game(torch.ones(2, 2), some & ~some, 9)) == 0
    assert float(pointing_game(torch.ones(1, 1), torch.ones(1, 1, dtype=torch.bool))) == 1


def test_boxes():
    rng = np.random.default_rng(0)
    masks = rng.random((20, 9, 8)) > 0.95
    got = bounding_boxes(torch.from_numpy(masks)).numpy()
    for mask, box in zip(masks, got, strict=True):
        expected = np.zeros_like(mask)
        if mask.any():
            (y,), (x,) = [np.where(mask.any(axis))[:1] for axis in (1, 0)]
            expected[y.min() : y.max() + 1, x.min() : x.max() + 1] = True
        assert np.array_equal(box, expected)


def test_errors_teach():
    with pytest.raises(ValueError, match="tolerance is -1"):
        pointing_game(torch.ones(2, 2), torch.ones(2, 2, dtype=torch.bool), -1)
    with pytest.raises(ValueError, match=r"torch\.bool"):
        bounding_boxes(torch.ones(2, 2))
    with pytest.raises(ValueError, match="relu"):
        pointing_game(-torch.ones(2, 2), torch.ones(2, 2, dtype=torch.bool))
