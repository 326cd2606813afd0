r"""Distribution-Aware Confidence Gating: blur where a map is unsure, spare where it is sure."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from captum_dcam.refine._maps import (
    gaussian_blurred,
    mean_std,
    percentile,
    sort_last,
    to_working,
)
from captum_dcam.refine.base import FunctionRefinement, register_refinement
from captum_dcam.refine.checks import (
    Check,
    check_maps,
    check_number,
    check_numbers,
    check_odd,
    check_settings,
)
from captum_dcam.refine.filters import check_sigma

DACG_BRANCHES = ("high_var", "high_mean", "low_mean", "default")
r"""The names of the branches; :func:`dacg_branch` returns indices into this tuple."""

DACG_PERCENTILES = (90.0, 75.0, 80.0, 85.0)
r"""The percentile of each branch, in the order of :data:`DACG_BRANCHES`."""

_CHECKS: dict[str, Check] = {
    "high_std": check_number,
    "high_mean": check_number,
    "low_mean": check_number,
    "percentiles": partial(check_numbers, length=len(DACG_BRANCHES), high=100.0),
    "kernel_size": check_odd,
    "sigma": check_sigma,
}


def dacg_branch(
    maps: Tensor, *, high_std: float = 0.22, high_mean: float = 0.35, low_mean: float = 0.25
) -> Tensor:
    r"""Which branch of Eq. 7 each map takes, for the routing ratios of Tables 6 to 8.

    The first that holds: std > ``high_std``: 0, high_var; mean > ``high_mean``: 1, high_mean;
    mean < ``low_mean``: 2, low_mean; else 3, default. Needs maps normalised to [0, 1]
    (:func:`min_max`). An all-zero map takes low_mean.

    Args:
        maps (Tensor): non-negative maps (..., H, W).
        high_std (float, optional): the paper's delta_sigma. Default: 0.22
        high_mean (float, optional): the paper's delta_mu. Default: 0.35
        low_mean (float, optional): the paper's delta'_mu. Default: 0.25

    Returns:
        Tensor: int64 of shape (...), an index into :data:`DACG_BRANCHES`.

    Raises:
        TypeError, ValueError: not finite non-negative float maps, or a bound out of range.

    Source:
        Diffusion-CAM Eq. 7 and Appendix C.1 (the bounds, the branches' names). The order of the
        tests and the population standard deviation: its reference code.
    """
    check_maps(maps, "dacg_branch")
    bounds = {"high_std": high_std, "high_mean": high_mean, "low_mean": low_mean}
    check_settings("dacg_branch", _CHECKS, **bounds)
    return _branch(to_working(maps), **bounds)


def distribution_aware_confidence_gating(
    maps: Tensor,
    *,
    high_std: float = 0.22,
    high_mean: float = 0.35,
    low_mean: float = 0.25,
    percentiles: Sequence[float] = DACG_PERCENTILES,
    nonzero_only: bool = True,
    kernel_size: int = 3,
    sigma: float = 0.3,
) -> Tensor:
    r"""Blur the low-confidence zone of every map mildly; return the high zone bit for bit.

    tau is a percentile of the map, chosen by :func:`dacg_branch`. Pixels above tau are the high
    zone. Every other pixel takes the value that a Gaussian blur of the *whole* map has there, so
    that no seam of darkened pixels runs around the high zone. Needs maps normalised to [0, 1]
    (:func:`min_max`). Constant and all-zero maps come back as they are.

    Args:
        maps (Tensor): non-negative maps (..., H, W).
        high_std (float, optional): the paper's delta_sigma. Default: 0.22
        high_mean (float, optional): the paper's delta_mu. Default: 0.35
        low_mean (float, optional): the paper's delta'_mu. Default: 0.25
        percentiles (Sequence[float], optional): alpha of each branch, in the order of
            :data:`DACG_BRANCHES`, in percent. Default: (90, 75, 80, 85)
        nonzero_only (bool, optional): take the percentile over the non-zero values, as the
            reference code does; False takes all values, Eq. 7 to the letter. Default: True
        kernel_size (int, optional): window side of the blur, odd. Default: 3
        sigma (float, optional): standard deviation of the blur in pixels. Default: 0.3

    Returns:
        Tensor: same shape and dtype, each value within its map's minimum and maximum.

    Raises:
        TypeError, ValueError: maps or settings out of their range.

    Source:
        Diffusion-CAM Eq. 7 and 8, Appendix C.1; kernel 3 and sigma 0.3 are the paper's. The
        percentile over non-zero values is the reference code's. The reference's blur has no
        effect, because its 3 x 1 kernel lies across a column vector of width 1; here it does
        what the paper's words say. It is mild: a direct neighbour weighs 0.4 %.
    """
    caller = "distribution_aware_confidence_gating"
    check_maps(maps, caller)
    check_settings(
        caller, _CHECKS, high_std=high_std, high_mean=high_mean, low_mean=low_mean,
        percentiles=percentiles, kernel_size=kernel_size, sigma=sigma,
    )  # fmt: skip
    values = to_working(maps)
    alphas = torch.tensor(tuple(percentiles), device=values.device, dtype=torch.float32)
    alpha = alphas[_branch(values, high_std, high_mean, low_mean)]
    zeros = (values == 0).sum(dim=(-2, -1))
    skip = zeros if nonzero_only else torch.zeros_like(zeros)
    tau = percentile(sort_last(values.flatten(-2)), alpha, skip)[..., None, None]
    blurred = gaussian_blurred(values, kernel_size, sigma)
    return torch.where(values > tau, values, blurred).to(maps.dtype)


def _branch(values: Tensor, high_std: float, high_mean: float, low_mean: float) -> Tensor:
    mean, std = (statistic[..., 0, 0] for statistic in mean_std(values))
    branch = torch.where(mean < low_mean, 2, 3)
    branch = torch.where(mean > high_mean, 1, branch)
    return torch.where(std > high_std, 0, branch)


@register_refinement("dacg")
@dataclass(frozen=True)
class DACG(FunctionRefinement):
    r""":func:`distribution_aware_confidence_gating` as a refinement; same settings and defaults."""

    function = staticmethod(distribution_aware_confidence_gating)
    checks = _CHECKS

    high_std: float = 0.22
    high_mean: float = 0.35
    low_mean: float = 0.25
    percentiles: tuple[float, ...] = DACG_PERCENTILES
    nonzero_only: bool = True
    kernel_size: int = 3
    sigma: float = 0.3
