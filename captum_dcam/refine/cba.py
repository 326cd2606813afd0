r"""Contextual Background Attenuation: fade what lies below a threshold of the map's own making."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from captum_dcam.refine._maps import peak, percentile, sort_last, to_working
from captum_dcam.refine.base import FunctionRefinement, register_refinement
from captum_dcam.refine.checks import (
    Check,
    check_maps,
    check_number,
    check_numbers,
    check_settings,
)

CBA_WEIGHTS = (0.15, 0.15, 0.2, 0.015)
r"""Eq. 9: weights of median (non-zero), 0.60 quantile (all), mean (non-zero) and maximum."""

_CHECKS: dict[str, Check] = {
    "weights": partial(check_numbers, length=len(CBA_WEIGHTS)),
    "gamma": partial(check_number, high=1.0),
}


def contextual_background_attenuation(
    maps: Tensor, *, weights: Sequence[float] = CBA_WEIGHTS, gamma: float = 0.5
) -> Tensor:
    r"""Multiply background pixels by max(gamma, M / tau), where M < tau is the background.

    .. math:: \tau = w_1\,\mathrm{median}(M_{>0}) + w_2\,Q_{0.60}(M) + w_3\,E[M_{>0}] + w_4 \max M

    A pixel at or above tau keeps its value; the factor rises to 1 there, so no edge appears. tau
    grows with the map, so the function commutes with a change of scale and needs no normalised
    maps. An all-zero map has no non-zero values: its tau is 0 and it comes back as it is, as does
    a constant map with weights that sum to at most 1.

    Args:
        maps (Tensor): non-negative maps (..., H, W).
        weights (Sequence[float], optional): w_1 to w_4. Default: (0.15, 0.15, 0.2, 0.015)
        gamma (float, optional): the least that is kept of a value, 0 to 1. Default: 0.5

    Returns:
        Tensor: same shape and dtype, with gamma * M <= M' <= M everywhere.

    Raises:
        TypeError, ValueError: maps or settings out of their range.

    Source:
        Diffusion-CAM Eq. 9 to 11, gamma = 0.5. The weights, which the paper leaves open: its
        reference code (0.2 and 0.015 are products there, 0.5 * 0.4 and 0.05 * 0.3).
    """
    caller = "contextual_background_attenuation"
    check_maps(maps, caller)
    check_settings(caller, _CHECKS, weights=weights, gamma=gamma)
    values = to_working(maps)
    tau = _background_threshold(values, weights)
    background = values < tau
    # Where there is no background, tau may be 0: divide by 1 there instead.
    factor = (values / torch.where(background, tau, torch.ones_like(tau))).clamp(min=gamma)
    return torch.where(background, values * factor, values).to(maps.dtype)


def _background_threshold(values: Tensor, weights: Sequence[float]) -> Tensor:
    ordered = sort_last(values.flatten(-2))
    zeros = (values == 0).sum(dim=(-2, -1))
    none = torch.zeros_like(zeros)
    median, sixty = percentile(ordered, 50, zeros), percentile(ordered, 60, none)
    scale = peak(values)
    positive = (ordered.shape[-1] - zeros).clamp(min=1)
    mean = (values / scale).sum(dim=(-2, -1)) / positive * scale[..., 0, 0]
    statistics = (median, sixty, mean, ordered[..., -1])
    tau = sum((w * s for w, s in zip(weights, statistics, strict=True)), torch.zeros_like(mean))
    return tau[..., None, None]


@register_refinement("cba")
@dataclass(frozen=True)
class CBA(FunctionRefinement):
    r""":func:`contextual_background_attenuation` as a refinement; same settings and defaults."""

    function = staticmethod(contextual_background_attenuation)
    checks = _CHECKS

    weights: tuple[float, ...] = CBA_WEIGHTS
    gamma: float = 0.5
