r"""Adaptive Kernel Denoising: a rank Gaussian filter whose window follows the map's noise."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from captum_dcam.errors import InputError
from captum_dcam.refine._maps import (
    mean_std,
    over_sorted_windows,
    rank_gaussian_weighted,
    to_working,
)
from captum_dcam.refine.base import NamedRefinement, RefineContext, register_refinement, required
from captum_dcam.refine.checks import (
    check_count,
    check_image_size,
    check_maps,
    check_number,
    check_odd,
)

# The three factors of Eq. 5, which the paper only names, as the reference code has them.
STEPS_AT_ONE, STEP_LIMIT = 16, 2.0
STD_GAIN, STD_LIMIT = 5.0, 2.0
HEIGHT_AT_ONE, SIZE_LIMIT = 512, 1.5


def adaptive_kernel_size(
    maps: Tensor,
    *,
    steps: int,
    image_size: tuple[int, int],
    k_base: float = 3,
    k_min: int = 3,
    k_max: int = 11,
) -> Tensor:
    r"""The window side that Eq. 5 gives each map.

    .. math:: k = \mathrm{odd}(k_{base} \cdot F_{step} \cdot F_{std} \cdot F_{size}),
              \quad F_{step} = \min(S / 16, 2), \quad F_{std} = \min(5 \sigma_M, 2),
              \quad F_{size} = \min(H / 512, 1.5)

    clipped to [k_min, k_max]. odd() is the nearest odd integer; an even integer lies between two
    and takes the larger. Needs maps normalised to [0, 1] (:func:`min_max`), for sigma_M is
    compared with fixed numbers. A constant map has sigma 0 and takes k_min.

    Args:
        maps (Tensor): non-negative maps (..., H, W).
        steps (int): S, the number of denoising steps of the answer.
        image_size (tuple[int, int]): (height, width) of the image in pixels; H is the height.
        k_base (float, optional): window side when all factors are 1. Default: 3
        k_min (int, optional): smallest window, odd. Default: 3
        k_max (int, optional): largest window, odd. Default: 11

    Returns:
        Tensor: int64 of shape (...), one odd number per map.

    Raises:
        TypeError, ValueError: maps, steps, image size or window bounds out of their range.

    Source:
        The product, "nearest odd integer" and the three influences: Diffusion-CAM Eq. 5.
        The factors' formulas, k_base = 3, the clip and the population standard deviation: its
        reference code. There, S is always 2 and H the number of *map* rows, so that the window
        is always 3; S and H here are what the paper says they are.
    """
    check_maps(maps, "adaptive_kernel_size")
    _check_kernel_settings("adaptive_kernel_size", k_base, k_min, k_max)
    check_count(steps, "adaptive_kernel_size", "steps", "the number of denoising steps")
    check_image_size(image_size, "adaptive_kernel_size")
    _, std = mean_std(to_working(maps))
    by_request = min(steps / STEPS_AT_ONE, STEP_LIMIT) * min(
        image_size[0] / HEIGHT_AT_ONE, SIZE_LIMIT
    )
    side = k_base * by_request * (STD_GAIN * std[..., 0, 0]).clamp(max=STD_LIMIT)
    # The nearest odd integer to x, ties upwards, is 2 floor(x / 2) + 1.
    return (2 * (side / 2).floor().clamp(max=k_max) + 1).clamp(k_min, k_max).long()


def adaptive_kernel_denoising(
    maps: Tensor,
    *,
    steps: int,
    image_size: tuple[int, int],
    k_base: float = 3,
    k_min: int = 3,
    k_max: int = 11,
) -> Tensor:
    r"""Filter each map by :func:`rank_gaussian_filter` with its own :func:`adaptive_kernel_size`.

    Needs maps normalised to [0, 1] (:func:`min_max`): the window depends on their standard
    deviation. The windows are chosen map by map; maps with the same window are filtered together.

    Args:
        maps (Tensor): non-negative maps (..., H, W).
        steps (int): S, the number of denoising steps of the answer.
        image_size (tuple[int, int]): (height, width) of the image in pixels.
        k_base (float, optional): window side when all factors are 1. Default: 3
        k_min (int, optional): smallest window, odd. Default: 3
        k_max (int, optional): largest window, odd. Default: 11

    Returns:
        Tensor: same shape and dtype, each value within its window's minimum and maximum.

    Raises:
        TypeError, ValueError: maps, steps, image size or window bounds out of their range.

    Source:
        Diffusion-CAM Eq. 5 (window) and Eq. 6 (filter). What Eq. 6 leaves open, the mean and
        width of the Gaussian over ranks, is TAM's Eq. 7. For constants, and for what the
        reference code does instead, see the two functions named above.
    """
    sizes = adaptive_kernel_size(
        maps, steps=steps, image_size=image_size, k_base=k_base, k_min=k_min, k_max=k_max
    ).flatten()
    values = to_working(maps).reshape(-1, *maps.shape[-2:])
    refined = torch.empty_like(values)
    for size in sorted(set(sizes.tolist())):
        chosen = (sizes == size).nonzero().squeeze(-1)
        refined[chosen] = over_sorted_windows(values[chosen], size, rank_gaussian_weighted)
    return refined.reshape(maps.shape).to(maps.dtype)


def _check_kernel_settings(caller: str, k_base: float, k_min: int, k_max: int) -> None:
    check_number(k_base, caller, "k_base", open_low=True)
    check_odd(k_min, caller, "k_min")
    check_odd(k_max, caller, "k_max")
    if k_min > k_max:
        raise InputError(
            f"{caller}: `k_min` is {k_min} and `k_max` is {k_max}, expected k_min <= k_max: "
            "exchange them, or give both the same value for a fixed window."
        )


@register_refinement("akd")
@dataclass(frozen=True)
class AKD(NamedRefinement):
    r""":func:`adaptive_kernel_denoising` as a refinement; steps and image size from the context.

    Args:
        k_base (float, optional): window side when all factors are 1. Default: 3
        k_min (int, optional): smallest window, odd. Default: 3
        k_max (int, optional): largest window, odd. Default: 11
    """

    needs: ClassVar[frozenset[str]] = frozenset(("steps", "image_size"))

    k_base: float = 3
    k_min: int = 3
    k_max: int = 11

    def __post_init__(self) -> None:
        _check_kernel_settings("AKD", **self._settings())

    def __call__(self, maps: Tensor, context: RefineContext | None = None) -> Tensor:
        r"""Filter maps (..., H, W) in [0, 1]; ``context`` must hold steps and image_size."""
        known = context or RefineContext()
        return adaptive_kernel_denoising(
            maps,
            steps=required(known.steps, "AKD", "steps"),
            image_size=required(known.image_size, "AKD", "image_size"),
            **self._settings(),
        )
