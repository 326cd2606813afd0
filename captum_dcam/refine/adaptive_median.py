r"""Adaptive median filter: only impulses are replaced, by the median of a window that grows."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from captum_dcam.refine._maps import to_working
from captum_dcam.refine._windows import over_sorted_windows
from captum_dcam.refine.base import NamedRefinement, RefineContext, register_refinement
from captum_dcam.refine.checks import check_maps, check_odd


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
        denoiser of TAM's Table 2. Windows reflect at the border, as in ``filters``.
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


@register_refinement("adaptive_median")
@dataclass(frozen=True)
class AdaptiveMedian(NamedRefinement):
    r""":func:`adaptive_median_filter` as a refinement."""

    needs: ClassVar[frozenset[str]] = frozenset()

    max_size: int = 7

    def __post_init__(self) -> None:
        check_odd(self.max_size, "AdaptiveMedian", "max_size")

    def __call__(self, maps: Tensor, context: RefineContext | None = None) -> Tensor:
        r"""Filter maps (..., H, W)."""
        return adaptive_median_filter(maps, self.max_size)
