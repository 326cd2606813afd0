"""Rank Gaussian (TAM Eq. 6, 7), median and Gaussian filters, min-max."""

import numpy as np
import pytest
import torch
from refine import loops
from refine.shared import close, each, random_maps
from scipy import ndimage

from captum_dcam.refine import (
    _maps,
    gaussian_filter,
    median_filter,
    min_max,
    rank_gaussian_filter,
)

SHAPES = [(24, 24), (7, 13), (3, 9), (1, 6), (6, 1), (1, 1), (2, 2)]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("k", [1, 3, 5, 11])
def test_rank_gaussian_is_the_loop(shape, k):
    maps = random_maps(0, 2, *shape)
    expected = each(maps, lambda image: loops.rank_gaussian(image, k))
    close(rank_gaussian_filter(torch.from_numpy(maps), k), expected)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("k", [1, 3, 7])
def test_median_and_gaussian_are_the_loops(shape, k):
    maps = random_maps(1, 2, *shape) - 0.3  # signed maps are allowed here
    signed = torch.from_numpy(maps)
    close(median_filter(signed, k), each(maps, lambda image: loops.median(image, k)))
    close(gaussian_filter(signed, k, 0.8), each(maps, lambda image: loops.gaussian(image, k, 0.8)))


def test_median_and_gaussian_are_scipys():
    maps = random_maps(2, 12, 17)
    close(median_filter(torch.from_numpy(maps), 5), ndimage.median_filter(maps, 5, mode="mirror"))
    close(
        gaussian_filter(torch.from_numpy(maps), 5, 0.9),
        ndimage.gaussian_filter(maps, 0.9, mode="mirror", radius=2),
    )


def test_rank_gaussian_by_hand():
    # One window of 1 ... 9: mean 5, population std sqrt(60 / 9), centre rank 4.
    window = torch.arange(1.0, 10.0, dtype=torch.float64).view(3, 3)
    spread = np.sqrt(60 / 9) / 5
    weights = np.exp(-((np.arange(9) - 4) ** 2) / (2 * spread**2))
    expected = (weights * np.arange(1, 10)).sum() / weights.sum()
    assert float(rank_gaussian_filter(window)[1, 1]) == pytest.approx(expected, rel=1e-12)


def test_rank_gaussian_depends_on_the_ranks_only_through_sorting():
    g = torch.Generator().manual_seed(3)
    window = torch.rand(9, generator=g, dtype=torch.float64)
    shuffled = window[torch.randperm(9, generator=g)]
    centre = [float(rank_gaussian_filter(w.view(3, 3))[1, 1]) for w in (window, shuffled)]
    assert centre[0] == centre[1]


def test_rank_gaussian_removes_a_lone_spike():
    # c of (0, ..., 0, 1) is sqrt(8): the spike at rank distance 4 keeps under a tenth.
    maps = torch.zeros(9, 9)
    maps[4, 4] = 1
    assert rank_gaussian_filter(maps).max() < 0.1


def test_calm_regions_become_plateaus_without_noise():
    # Little variation leaves the median's weight alone: its very value, whatever the window's max.
    maps = 0.7 + 0.02 * torch.rand(20, 20, generator=torch.Generator().manual_seed(0))
    maps[7, 7] = 0.8
    assert torch.equal(rank_gaussian_filter(maps), median_filter(maps))


def test_rank_gaussian_commutes_with_scale():
    maps = torch.from_numpy(random_maps(4, 3, 8, 8))
    close(rank_gaussian_filter(maps * 1000), rank_gaussian_filter(maps).numpy() * 1000)


@pytest.mark.parametrize("value", [0.0, 0.1, 1.0, 1e30, 1e-40, torch.finfo(torch.float32).max])
@pytest.mark.parametrize("function", [rank_gaussian_filter, median_filter, gaussian_filter])
def test_constant_maps_stay_exactly(function, value):
    maps = torch.full((2, 5, 4), value)
    assert torch.equal(function(maps), maps)


def test_rows_in_blocks_give_the_same(monkeypatch):
    maps = torch.rand(3, 10, 12, generator=torch.Generator().manual_seed(0))
    whole = rank_gaussian_filter(maps, 5)
    monkeypatch.setattr(_maps, "_CPU_BLOCK_VALUES", 2500)
    torch.testing.assert_close(rank_gaussian_filter(maps, 5), whole)


def test_one_window_side_changes_nothing():
    maps = torch.rand(4, 5, generator=torch.Generator().manual_seed(0))
    for function in (rank_gaussian_filter, median_filter, gaussian_filter):
        torch.testing.assert_close(function(maps, 1), maps)


@pytest.mark.parametrize("shape", SHAPES)
def test_min_max_is_the_loop(shape):
    maps = random_maps(5, 2, *shape) - 0.5
    close(min_max(torch.from_numpy(maps)), each(maps, loops.min_max))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_min_max_does_not_stretch_rounding(dtype):
    maps = torch.full((2, 3, 3), 0.7, dtype=torch.float64)
    work = torch.float64 if dtype == torch.float64 else torch.float32
    maps[0, 0, 0] *= 1 + 4 * torch.finfo(work).eps
    maps[1, 0, 0] *= 1 + 4 * torch.finfo(dtype).eps + 64 * torch.finfo(work).eps
    result = min_max(maps.to(dtype))
    assert result[0].max() == 0
    assert result[1].max() == 1 and result[1].sum() == 1


def test_min_max_ends():
    maps = torch.tensor([[[-3e38, 3e38], [0, 1e38]], [[5, 5], [5, 5]], [[0, 0], [0, 0]]])
    result = min_max(maps)
    assert result[0].min() == 0 and result[0].max() == 1
    assert torch.equal(result[1:], torch.zeros(2, 2, 2))
