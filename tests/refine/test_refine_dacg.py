"""Distribution-Aware Confidence Gating: Diffusion-CAM Eq. 7 and 8."""

import numpy as np
import pytest
import torch
from refine import loops
from refine.shared import close, each, random_maps

from captum_dcam.refine import (
    DACG_BRANCHES,
    dacg_branch,
    min_max,
    rank_gaussian_filter,
)
from captum_dcam.refine import distribution_aware_confidence_gating as dacg


def of_every_branch():
    maps = min_max(torch.from_numpy(random_maps(11, 60, 10, 12)))
    smooth = min_max(rank_gaussian_filter(maps, 5)) * 0.6
    maps = torch.cat([maps, smooth])
    assert set(dacg_branch(maps).tolist()) == {0, 1, 2, 3}
    return maps


def test_branch_is_the_loop():
    maps = of_every_branch()
    expected = [loops.dacg_branch(image)[0] for image in maps.numpy()]
    assert [DACG_BRANCHES[i] for i in dacg_branch(maps)] == expected


def two_values(mean, std):
    return torch.tensor([[mean - std, mean + std]], dtype=torch.float64)


@pytest.mark.parametrize(
    ("mean", "std", "name"),
    [
        (0.3, 0.23, "high_var"),
        (0.5, 0.23, "high_var"),  # the first test that holds wins
        (0.36, 0.1, "high_mean"),
        (0.24, 0.1, "low_mean"),
        (0.3, 0.1, "default"),
        (0.3, 0.0, "default"),
        (0.0, 0.0, "low_mean"),
    ],
)
def test_branch_by_hand(mean, std, name):
    branch = dacg_branch(two_values(mean, std))
    assert branch.shape == () and branch.dtype == torch.int64
    assert DACG_BRANCHES[branch] == name


def test_bounds_move_the_branches():
    maps = two_values(0.3, 0.1)
    assert DACG_BRANCHES[dacg_branch(maps, high_std=0.09)] == "high_var"
    assert DACG_BRANCHES[dacg_branch(maps, high_mean=0.29)] == "high_mean"
    assert DACG_BRANCHES[dacg_branch(maps, low_mean=0.31)] == "low_mean"


def test_a_map_on_a_bound_has_not_passed_it():
    maps = two_values(0.375, 0.125)  # exact in binary
    for bounds in (
        {"high_std": 0.125, "high_mean": 0.375, "low_mean": 0.0},
        {"high_std": 0.125, "high_mean": 1.0, "low_mean": 0.375},
    ):
        assert DACG_BRANCHES[dacg_branch(maps, **bounds)] == "default"


@pytest.mark.parametrize("nonzero_only", [True, False])
def test_dacg_is_the_loop(nonzero_only):
    maps = of_every_branch()
    expected = each(maps.numpy(), lambda image: loops.dacg(image, nonzero_only))
    close(dacg(maps, nonzero_only=nonzero_only), expected)


@pytest.mark.parametrize("shape", [(1, 1), (1, 8), (5, 1), (2, 3)])
def test_dacg_on_narrow_maps(shape):
    maps = random_maps(12, 6, *shape)
    close(dacg(torch.from_numpy(maps)), each(maps, loops.dacg))


def test_high_zone_is_returned_bit_for_bit_and_the_low_zone_really_blurred():
    maps = min_max(torch.from_numpy(random_maps(13, 1, 16, 16)))[0]
    percent = (90, 75, 80, 85)[int(dacg_branch(maps))]
    tau = np.percentile(maps[maps > 0].numpy(), percent)
    result = dacg(maps)
    assert torch.equal(result[maps > tau], maps[maps > tau])
    assert (result[maps <= tau] != maps[maps <= tau]).float().mean() > 0.9


def test_a_percentile_that_is_a_pixel_keeps_that_pixel_in_the_low_zone():
    # 11 values, 0 ... 10: the 90th percentile is 9 exactly, and Eq. 8's high zone is M > tau.
    maps = torch.arange(11, dtype=torch.float32).view(1, 11)
    changed = dacg(maps, nonzero_only=False, sigma=1.0, percentiles=[90] * 4) != maps
    assert changed.nonzero()[:, 1].tolist() == [0]  # a ramp is a fixed point but for its ends
    peaked = torch.tensor([[0.0, 0, 0, 9, 0, 0, 10, 0, 0, 0, 0]])
    result = dacg(peaked, nonzero_only=False, percentiles=[90] * 4)
    assert result[0, 6] == 10 and result[0, 3] < 9


def test_percentiles_are_those_of_the_branches():
    maps = of_every_branch()
    everywhere = dacg(maps, percentiles=(100, 100, 100, 100))
    for index, branch in enumerate(dacg_branch(maps).tolist()):
        chosen = [0.0, 0.0, 0.0, 0.0]
        chosen[branch] = 100.0
        torch.testing.assert_close(dacg(maps[index], percentiles=chosen), everywhere[index])


@pytest.mark.parametrize("value", [0.0, 0.3, 0.7, 1e30])
def test_constant_maps_stay(value):
    maps = torch.full((4, 6), value)
    assert torch.equal(dacg(maps), maps)
