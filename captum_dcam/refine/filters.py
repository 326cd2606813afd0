r"""Spatial filters as post-transforms: rank Gaussian (TAM), median, Gaussian.

All reflect at the border without repeating the edge pixel; along an axis too short for that
(H or W <= kernel_size // 2) they repeat the edge pixel instead. None needs normalised maps.
"""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from captum_dcam.refine._maps import to_working
from captum_dcam.refine._windows import (
    gaussian_blurred,
    over_sorted_windows,
    rank_gaussian_weighted,
)
from captum_dcam.refine.base import NamedRefinement, RefineContext, register_refinement
from captum_dcam.refine.checks import check_maps, check_number, check_odd

# Below this a Gaussian weighs the neighbours with exp(-5000): it is no blur in any precision.
MIN_SIGMA = 0.01


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
    check_number(sigma, "gaussian_filter", "sigma", low=MIN_SIGMA)
    return gaussian_blurred(to_working(maps), kernel_size, sigma).to(maps.dtype)


@register_refinement("rank_gaussian")
@dataclass(frozen=True)
class RankGaussian(NamedRefinement):
    r""":func:`rank_gaussian_filter` as a refinement: TAM's denoiser with a fixed window."""

    needs: ClassVar[frozenset[str]] = frozenset()

    kernel_size: int = 3

    def __post_init__(self) -> None:
        check_odd(self.kernel_size, "RankGaussian")

    def __call__(self, maps: Tensor, context: RefineContext | None = None) -> Tensor:
        r"""Filter non-negative maps (..., H, W)."""
        return rank_gaussian_filter(maps, self.kernel_size)


@register_refinement("median")
@dataclass(frozen=True)
class Median(NamedRefinement):
    r""":func:`median_filter` as a refinement."""

    needs: ClassVar[frozenset[str]] = frozenset()

    kernel_size: int = 3

    def __post_init__(self) -> None:
        check_odd(self.kernel_size, "Median")

    def __call__(self, maps: Tensor, context: RefineContext | None = None) -> Tensor:
        r"""Filter maps (..., H, W)."""
        return median_filter(maps, self.kernel_size)


@register_refinement("gaussian")
@dataclass(frozen=True)
class Gaussian(NamedRefinement):
    r""":func:`gaussian_filter` as a refinement."""

    needs: ClassVar[frozenset[str]] = frozenset()

    kernel_size: int = 3
    sigma: float = 1.0

    def __post_init__(self) -> None:
        check_odd(self.kernel_size, "Gaussian")
        check_number(self.sigma, "Gaussian", "sigma", low=MIN_SIGMA)

    def __call__(self, maps: Tensor, context: RefineContext | None = None) -> Tensor:
        r"""Filter maps (..., H, W)."""
        return gaussian_filter(maps, self.kernel_size, self.sigma)
