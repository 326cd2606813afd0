r"""Spatial filters as post-transforms: rank Gaussian (TAM), median, Gaussian, adaptive median.

All reflect at the border without repeating the edge pixel; along an axis too short for that
(H or W <= kernel_size // 2) they repeat the edge pixel instead. None needs normalised maps.
"""

from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from captum_dcam.refine._maps import (
    gaussian_blurred,
    over_sorted_windows,
    rank_gaussian_weighted,
    to_working,
)
from captum_dcam.refine.base import FunctionRefinement, register_refinement
from captum_dcam.refine.checks import Check, check_maps, check_number, check_odd

# Below this a Gaussian weighs the neighbours with exp(-5000): it is no blur in any precision.
MIN_SIGMA = 0.01
check_sigma = partial(check_number, low=MIN_SIGMA)
_WINDOW: dict[str, Check] = {"kernel_size": check_odd, "sigma": check_sigma, "max_size": check_odd}


def rank_gaussian_filter(maps: Tensor, kernel_size: int = 3) -> Tensor:
    r"""Replace each pixel by a mean of its sorted window, weighted by a Gaussian over the *rank*.

    With v_0 <= ... <= v_{k*k-1} the sorted values of the k x k window,

    .. math:: M' = \sum_i v_i G_i / \sum_i G_i, \quad
              G_i = \exp(-(i - \lfloor k^2/2 \rfloor)^2 / (2 c^2)), \quad c = \sigma(v) / \mu(v).

    The coefficient of variation c (population standard deviation over mean) is in rank units: a
    calm window gives its median, a lively one leans towards its mean. A constant window gives its
    value and an all-zero one gives 0; the formula alone would give 0 / 0 there. c does not
    change with the map's scale, so the filter needs no normalised maps.

    Args:
        maps (Tensor): non-negative maps (..., H, W).
        kernel_size (int, optional): window side k, odd; 1 changes nothing. Default: 3

    Returns:
        Tensor: same shape and dtype; every value within its window's minimum and maximum.

    Raises:
        TypeError, ValueError: not finite non-negative float maps, or not an odd integer k >= 1.

    Source:
        TAM Eq. 6 and 7 (ICCV 2025); Diffusion-CAM Eq. 6 takes it over and normalises the weights.
        Population standard deviation, reflect padding: TAM's reference code.
    """
    check_maps(maps, "rank_gaussian_filter")
    check_odd(kernel_size, "rank_gaussian_filter")
    filtered = over_sorted_windows(to_working(maps), kernel_size, rank_gaussian_weighted)
    return filtered.to(maps.dtype)


def median_filter(maps: Tensor, kernel_size: int = 3) -> Tensor:
    r"""Replace each pixel by the median of its window.

    Args:
        maps (Tensor): maps (..., H, W), any sign.
        kernel_size (int, optional): window side, odd; 1 changes nothing. Default: 3

    Returns:
        Tensor: same shape and dtype.

    Raises:
        TypeError, ValueError: not finite float maps, or not an odd integer >= 1.

    Source:
        The baseline denoiser of TAM's Table 2.
    """
    check_maps(maps, "median_filter", non_negative=False)
    check_odd(kernel_size, "median_filter")
    centre = kernel_size**2 // 2
    values = to_working(maps)
    return over_sorted_windows(values, kernel_size, lambda v: v[..., centre]).to(maps.dtype)


def gaussian_filter(maps: Tensor, kernel_size: int = 3, sigma: float = 1.0) -> Tensor:
    r"""Blur with a spatial Gaussian, sampled at the pixel centres and normalised to sum 1.

    Args:
        maps (Tensor): maps (..., H, W), any sign.
        kernel_size (int, optional): window side, odd; 1 changes nothing. Default: 3
        sigma (float, optional): standard deviation in pixels, at least 0.01. Default: 1.0

    Returns:
        Tensor: same shape and dtype; every value within its map's minimum and maximum.

    Raises:
        TypeError, ValueError: not finite float maps, an even window, or a sigma out of range.

    Source:
        The baseline denoiser of TAM's Tables 1 and 2; with kernel 3 and sigma 0.3, the blur of
        Diffusion-CAM Eq. 8.
    """
    check_maps(maps, "gaussian_filter", non_negative=False)
    check_odd(kernel_size, "gaussian_filter")
    check_sigma(sigma, "gaussian_filter", "sigma")
    return gaussian_blurred(to_working(maps), kernel_size, sigma).to(maps.dtype)


def adaptive_median_filter(maps: Tensor, max_size: int = 7) -> Tensor:
    r"""Replace impulses by the median of the smallest window whose median is none.

    An impulse is a value that is its window's minimum or maximum. For every pixel the window grows
    from 3 × 3 until its median lies strictly between its minimum and maximum; then the pixel keeps
    its value, unless it is an impulse there, which gives way to the median. Where no window up to
    ``max_size`` has such a median, the median of the largest one is taken.

    Args:
        maps (Tensor): maps (..., H, W), any sign.
        max_size (int, optional): side of the largest window, odd; 1 changes nothing. Default: 7

    Returns:
        Tensor: same shape and dtype; every value is one of the map's own.

    Raises:
        TypeError, ValueError: not finite float maps, or not an odd integer >= 1.

    Source:
        The classical filter (Hwang and Haddad 1995), which Chang et al. 2008 build on; a baseline
        denoiser of TAM's Table 2. Windows reflect at the border, like those of the other filters.
    """
    check_maps(maps, "adaptive_median_filter", non_negative=False)
    check_odd(max_size, "adaptive_median_filter", "max_size")
    values = to_working(maps)
    result, open_ = values.clone(), torch.ones_like(values, dtype=torch.bool)
    for size in range(3, max_size + 1, 2):
        low, median, high = over_sorted_windows(values, size, _low_median_high)
        settled = open_ & (low < median) & (median < high)
        impulse = (values <= low) | (values >= high)
        # What stays open holds the last median so far: the answer if no window settles it.
        result = torch.where(open_ & ~settled | settled & impulse, median, result)
        result = torch.where(settled & ~impulse, values, result)
        open_ &= ~settled
    return result.to(maps.dtype)


def _low_median_high(ordered: Tensor) -> Tensor:
    """(3, ..., H, W) of sorted windows (..., H, W, k*k)."""
    return torch.stack((ordered[..., 0], ordered[..., ordered.shape[-1] // 2], ordered[..., -1]))


@register_refinement("rank_gaussian")
@dataclass(frozen=True)
class RankGaussian(FunctionRefinement):
    r""":func:`rank_gaussian_filter` as a refinement: TAM's denoiser with a fixed window."""

    function = staticmethod(rank_gaussian_filter)
    checks = _WINDOW

    kernel_size: int = 3


@register_refinement("median")
@dataclass(frozen=True)
class Median(FunctionRefinement):
    r""":func:`median_filter` as a refinement."""

    function = staticmethod(median_filter)
    checks = _WINDOW

    kernel_size: int = 3


@register_refinement("gaussian")
@dataclass(frozen=True)
class Gaussian(FunctionRefinement):
    r""":func:`gaussian_filter` as a refinement."""

    function = staticmethod(gaussian_filter)
    checks = _WINDOW

    kernel_size: int = 3
    sigma: float = 1.0


@register_refinement("adaptive_median")
@dataclass(frozen=True)
class AdaptiveMedian(FunctionRefinement):
    r""":func:`adaptive_median_filter` as a refinement."""

    function = staticmethod(adaptive_median_filter)
    checks = _WINDOW

    max_size: int = 7
