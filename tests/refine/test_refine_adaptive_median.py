"""Adaptive median filter: the loop, its two levels by hand, and what holds of every refinement."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from refine import loops
from refine.shared import DTYPES, arrays, close, each, few, random_maps

from captum_dcam.refine import AdaptiveMedian, adaptive_median_filter, median_filter, refinement

SHAPES = [(24, 24), (7, 13), (3, 9), (1, 6), (6, 1), (1, 1), (2, 2)]


def adaptive_median(image, max_size):
    """Level A: grow the window until its median is no extreme; level B: keep what is none."""
    result = image.copy()
    for i in range(image.shape[0]):
        for j in range(image.shape[1]):
            value = image[i, j]
            for size in range(3, max_size + 1, 2):
                pad = size // 2
                window = loops.padded(image, pad)[i : i + size, j : j + size]
                low, middle, high = window.min(), np.median(window), window.max()
                if low < middle < high:
                    value = image[i, j] if low < image[i, j] < high else middle
                    break
                value = middle
            result[i, j] = value
    return result


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("max_size", [1, 3, 5, 9])
def test_it_is_the_loop(shape, max_size):
    maps = random_maps(0, 2, *shape) - 0.2
    expected = each(maps, lambda image: adaptive_median(image, max_size))
    close(adaptive_median_filter(torch.from_numpy(maps), max_size), expected)


@few
@given(array=arrays())
def test_it_is_the_loop_whatever_the_maps(array):
    flat = array.reshape(-1, *array.shape[-2:])
    expected = each(flat, lambda image: adaptive_median(image, 5)).reshape(array.shape)
    np.testing.assert_array_equal(adaptive_median_filter(torch.from_numpy(array), 5), expected)


@few
@given(array=arrays(), dtype=st.sampled_from(DTYPES))
def test_values_are_the_maps_own(array, dtype):
    maps = torch.from_numpy(array).to(dtype)
    before = maps.clone()
    result = adaptive_median_filter(maps)
    assert result.shape == maps.shape and result.dtype == dtype and torch.equal(maps, before)
    flat = zip(result.flatten(0, -3), maps.flatten(0, -3), strict=True) if maps.dim() > 2 else ()
    assert all(torch.isin(r, m).all() for r, m in flat)
    turned = adaptive_median_filter(maps.mT)
    assert torch.equal(turned, result.mT)


def test_an_impulse_goes_and_a_slope_stays():
    slope = (torch.arange(9.0)[:, None] * 2 + torch.arange(9.0) * 0.5).contiguous()
    spiked = slope.clone()
    spiked[4, 4] = 100
    result = adaptive_median_filter(spiked)
    assert result[4, 4] < 20
    # the plain median moves slopes' corners, this one keeps whatever is no extreme of its window
    inner = torch.ones_like(slope, dtype=torch.bool)
    inner[0], inner[-1], inner[:, 0], inner[:, -1], inner[4, 4] = (False,) * 5
    assert torch.equal(result[inner], spiked[inner])


def test_a_cluster_needs_the_larger_window():
    maps = torch.rand(15, 15, generator=torch.Generator().manual_seed(0))
    maps[6:9, 6:9] = 5.0  # fills the 3 × 3 window
    assert adaptive_median_filter(maps, 3)[7, 7] == 5
    assert adaptive_median_filter(maps, 7)[7, 7] < 1


@pytest.mark.parametrize("value", [0.0, 0.1, 1e30, torch.finfo(torch.float32).max])
def test_constant_maps_stay_exactly(value):
    maps = torch.full((2, 5, 4), value)
    assert torch.equal(adaptive_median_filter(maps), maps)


@pytest.mark.parametrize("lead", [(), (1,), (2, 3)])
def test_a_batch_is_its_maps_one_by_one(lead):
    maps = torch.from_numpy(random_maps(1, *lead, 9, 12))
    result = adaptive_median_filter(maps)
    for index in np.ndindex(*lead):
        assert torch.equal(result[index], adaptive_median_filter(maps[index]))


def test_no_sharing_no_graph_and_empty_batches():
    maps = torch.rand(2, 6, 6, generator=torch.Generator().manual_seed(0))
    before = maps.clone()
    for size in (1, 3):
        adaptive_median_filter(maps, size).fill_(7)
        assert torch.equal(maps, before)
    assert not adaptive_median_filter(maps.clone().requires_grad_()).requires_grad
    assert adaptive_median_filter(torch.zeros(0, 5, 7)).shape == (0, 5, 7)


def test_as_a_refinement():
    maps = torch.rand(2, 8, 8, generator=torch.Generator().manual_seed(0))
    refine = refinement("adaptive_median", max_size=5)
    assert refine == AdaptiveMedian(5) and refinement(**refine.describe()) == refine
    assert torch.equal(refine(maps), adaptive_median_filter(maps, 5))
    assert not torch.equal(refine(maps), median_filter(maps, 5))


@pytest.mark.parametrize("size", [2, 0, -3, 3.0, True])
def test_sizes_are_checked(size):
    with pytest.raises((TypeError, ValueError), match="max_size"):
        AdaptiveMedian(size)
    with pytest.raises((TypeError, ValueError), match="max_size"):
        adaptive_median_filter(torch.zeros(3, 3), size)
