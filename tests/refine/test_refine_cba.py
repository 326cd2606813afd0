"""Contextual Background Attenuation: Diffusion-CAM Eq. 9 to 11."""

import pytest
import torch
from refine import loops
from refine.shared import close, each, random_maps

from captum_dcam.refine import contextual_background_attenuation as cba


@pytest.mark.parametrize("shape", [(24, 24), (5, 9), (1, 7), (4, 1), (1, 1)])
@pytest.mark.parametrize("gamma", [0.0, 0.5, 1.0])
def test_cba_is_the_loop(shape, gamma):
    maps = random_maps(21, 12, *shape)
    close(cba(torch.from_numpy(maps), gamma=gamma), each(maps, lambda m: loops.cba(m, gamma)))


def test_cba_by_hand():
    # Non-zero 0.1, 0.2, 1: median 0.2, mean 1.3 / 3; Q_0.60 of all at position 1.8; maximum 1.
    maps = torch.tensor([[0.0, 0.1], [0.2, 1.0]], dtype=torch.float64)
    tau = 0.15 * 0.2 + 0.15 * (0.1 + 0.8 * 0.1) + 0.2 * 1.3 / 3 + 0.015
    assert 0.1 < tau < 0.2  # 0.1 is background, and above gamma * tau
    expected = torch.tensor([[0.0, 0.1 * 0.1 / tau], [0.2, 1.0]], dtype=torch.float64)
    torch.testing.assert_close(cba(maps), expected, rtol=1e-12, atol=0)
    torch.testing.assert_close(cba(maps, gamma=0.9)[0, 1], maps[0, 1] * 0.9)


def test_weights_select_one_statistic():
    maps = torch.tensor([[0.0, 0.0, 1.0, 2.0, 6.0]], dtype=torch.float64)
    for place, tau in enumerate((2.0, 1.4, 3.0, 6.0)):
        weights = [0.0] * 4
        weights[place] = 1.0
        expected = torch.where(maps < tau, maps * (maps / tau).clamp(min=0.5), maps)
        torch.testing.assert_close(cba(maps, weights=weights), expected)


def test_commutes_with_scale():
    maps = torch.from_numpy(random_maps(22, 4, 8, 8))
    close(cba(maps * 1e6), cba(maps).numpy() * 1e6)


def test_bounds_and_foreground():
    maps = torch.from_numpy(random_maps(23, 4, 12, 12))
    result = cba(maps)
    assert (result <= maps).all() and (result >= 0.5 * maps).all()
    assert torch.equal(result.amax(dim=(-2, -1)), maps.amax(dim=(-2, -1)))


@pytest.mark.parametrize("value", [0.0, 0.3, 1e30, 3e38])
def test_constant_maps_stay(value):
    maps = torch.full((4, 6), value)
    assert torch.equal(cba(maps), maps)
