r"""Min-max normalisation: what the paper's thresholds take for granted."""

from dataclasses import dataclass

import torch
from torch import Tensor

from captum_dcam.refine._maps import peak, to_working
from captum_dcam.refine.base import FunctionRefinement, register_refinement
from captum_dcam.refine.checks import check_maps

# A range of this number of units of rounding, or fewer, is none.
ROUNDING_UNITS = 16


def min_max(maps: Tensor) -> Tensor:
    r"""Stretch every map to [0, 1]: (M - min) / (max - min).

    A constant map has no range and becomes all zero. So does a map that is constant but for
    rounding, as a wide filter leaves behind: range <= 16 eps * max(abs(M)), with the eps of fp64
    for fp64 maps and of fp32 for all others. Stretched, its rounding would look like a map.
    Signed maps are allowed: the lowest value becomes 0, which is *not* where their zero was.

    Args:
        maps (Tensor): maps (..., H, W), any sign.

    Returns:
        Tensor: same shape and dtype, each map in [0, 1], with both ends attained unless constant.

    Raises:
        TypeError, ValueError: not finite float maps (..., H, W).

    Source:
        The paper's Section 3.2.3 calls the map normalised without saying how; min-max is the
        reference code's way (which adds 1e-8 to the range and leaves constant maps as they are).
    """
    check_maps(maps, "min_max", non_negative=False)
    # Halved, which is exact, because max - min of a signed map of 3e38 would overflow.
    half = to_working(maps) / 2
    low = half.amin(dim=(-2, -1), keepdim=True)
    span = half.amax(dim=(-2, -1), keepdim=True) - low
    flat = span <= ROUNDING_UNITS * torch.finfo(half.dtype).eps * peak(half)
    stretched = (half - low) / torch.where(flat, torch.ones_like(span), span)
    return torch.where(flat, torch.zeros_like(half), stretched).to(maps.dtype)


@register_refinement("min_max")
@dataclass(frozen=True)
class MinMax(FunctionRefinement):
    r""":func:`min_max` as a refinement."""

    function = staticmethod(min_max)
