"""Adaptive Kernel Denoising: Diffusion-CAM Eq. 5 and 6."""

import numpy as np
import pytest
import torch
from refine import loops
from refine.shared import close, each, random_maps

from captum_dcam.refine import (
    adaptive_kernel_denoising,
    adaptive_kernel_size,
    min_max,
    rank_gaussian_filter,
)

# Half zero, half one: standard deviation 0.5, so that F_std is at its limit, 2.
LIVELY = torch.tensor([[0.0, 1.0], [1.0, 0.0]])


def normalised(seed, *shape):
    return min_max(torch.from_numpy(random_maps(seed, *shape)))


@pytest.mark.parametrize("steps", [1, 8, 16, 40])
@pytest.mark.parametrize("height", [256, 512, 1000])
def test_kernel_size_is_the_loop(steps, height):
    maps = normalised(steps, 40, 9, 11)
    sizes = adaptive_kernel_size(maps, steps=steps, image_size=(height, 99))
    expected = [loops.kernel_size(image, steps, height) for image in maps.numpy()]
    assert sizes.dtype == torch.int64 and sizes.tolist() == expected


@pytest.mark.parametrize(
    ("steps", "height", "k_base", "expected"),
    [
        (16, 512, 3, 7),  # 3 * 1 * 2 * 1 = 6, even: the larger of 5 and 7
        (16, 384, 3, 5),  # 4.5
        (32, 512, 3, 11),  # 12: clipped
        (1000, 9999, 3, 11),  # F_step and F_size at their limits: 3 * 2 * 2 * 1.5 = 18
        (8, 512, 3, 3),  # 3 * 0.5 * 2 = 3
        (1, 16, 3, 3),  # clipped from below
        (16, 512, 5, 11),  # 10 lies between 9 and 11
        (16, 512, 4.4, 9),  # 8.8
    ],
)
def test_kernel_size_by_hand(steps, height, k_base, expected):
    size = adaptive_kernel_size(LIVELY, steps=steps, image_size=(height, 1), k_base=k_base)
    assert size.shape == () and int(size) == expected


def test_only_the_height_counts():
    for width in (1, 4000):
        assert int(adaptive_kernel_size(LIVELY, steps=16, image_size=(384, width))) == 5


def test_clip_can_be_moved():
    arguments = {"steps": 1000, "image_size": (9999, 1)}
    assert int(adaptive_kernel_size(LIVELY, **arguments, k_max=31)) == 19
    assert int(adaptive_kernel_size(LIVELY * 0, **arguments, k_min=1)) == 1


def test_each_map_gets_its_own_window():
    maps = normalised(7, 2, 6, 12, 10)
    sizes = adaptive_kernel_size(maps, steps=32, image_size=(700, 700))
    assert sizes.shape == (2, 6) and len(set(sizes.flatten().tolist())) >= 3
    result = adaptive_kernel_denoising(maps, steps=32, image_size=(700, 700))
    for index in np.ndindex(2, 6):
        expected = rank_gaussian_filter(maps[index], int(sizes[index]))
        torch.testing.assert_close(result[index], expected)


@pytest.mark.parametrize("shape", [(14, 14), (3, 10), (1, 7), (1, 1)])
def test_akd_is_the_loop(shape):
    maps = normalised(9, 5, *shape)
    result = adaptive_kernel_denoising(maps, steps=24, image_size=(480, 640))
    close(result, each(maps.numpy(), lambda image: loops.akd(image, 24, 480)))
