r"""Are two maps alike? Rank correlation and structural similarity, batched."""

from __future__ import annotations

import torch
from scipy import stats
from torch import Tensor

from captum_dcam.errors import InputError
from captum_dcam.metrics._checks import stretched
from captum_dcam.refine.checks import check_odd


def rank_correlation(first: Tensor, second: Tensor) -> Tensor:
    r"""Spearman's correlation over the last axis; equal values share their mean rank.

    Degenerate cases: 0 if one of the two is constant, 1 if both are: nothing has changed then, and
    a sanity check must not take that for a difference.

    Args:
        first, second (Tensor): (..., N), finite, of one shape; signed values are fine.

    Returns:
        Tensor: (...) float64, in [-1, 1].
    """
    if first.shape != second.shape or first.ndim < 1 or first.shape[-1] == 0:
        raise InputError(
            f"maps have shapes {tuple(first.shape)} and {tuple(second.shape)}: expected the same, "
            "(..., N) with N of at least 1"
        )
    ranks = (stats.rankdata(x.detach().cpu().double(), axis=-1) for x in (first, second))
    one, two = (torch.from_numpy(x) for x in ranks)
    one, two = (x - x.mean(-1, keepdim=True) for x in (one, two))
    lengths = one.square().sum(-1), two.square().sum(-1)
    flat = [length == 0 for length in lengths]
    ratio = (one * two).sum(-1) / (lengths[0] * lengths[1]).sqrt().masked_fill(flat[0] | flat[1], 1)
    return torch.where(flat[0] & flat[1], torch.ones_like(ratio), ratio).clamp(-1, 1)


def structural_similarity(first: Tensor, second: Tensor, window: int = 7) -> Tensor:
    r"""SSIM of maps, each brought to [0, 1] by its lowest and highest value first.

    Uniform windows with the sample covariance, data range 1, constants 0.01² and 0.03², the mean
    taken where the whole window lies on the map. Smaller maps get the largest odd window that fits.
    A constant map becomes 0; two of them have a similarity of 1.

    Args:
        first, second (Tensor): (..., H, W), finite, of one shape; signed values are fine.
        window (int, optional): side of the window, odd. Default: 7

    Returns:
        Tensor: (...) float64, in [-1, 1].

    Source:
        Wang et al., Image quality assessment, 2004, Eq. 13.
    """
    if first.shape != second.shape or first.ndim < 2 or 0 in first.shape[-2:]:
        raise InputError(
            f"maps have shapes {tuple(first.shape)} and {tuple(second.shape)}: expected the same, "
            "(..., H, W) with H and W of at least 1"
        )
    check_odd(window, "structural_similarity", "window")
    shortest = min(first.shape[-2:])
    side = min(window, shortest - 1 + shortest % 2)
    leading = first.shape[:-2]
    wide = (x.detach().cpu().double().reshape(-1, 1, *x.shape[-2:]) for x in (first, second))
    axes = (-2, -1)
    one, two = (stretched(x, x.amin(axes, keepdim=True), x.amax(axes, keepdim=True)) for x in wide)

    def mean(values: Tensor) -> Tensor:
        return torch.nn.functional.avg_pool2d(values, side, stride=1)

    sample = side**2 / max(side**2 - 1, 1)
    m1, m2 = mean(one), mean(two)
    v1, v2 = (sample * (mean(x * x) - m * m) for x, m in ((one, m1), (two, m2)))
    both = sample * (mean(one * two) - m1 * m2)
    c1, c2 = 0.01**2, 0.03**2
    top = (2 * m1 * m2 + c1) * (2 * both + c2)
    bottom = (m1 * m1 + m2 * m2 + c1) * (v1 + v2 + c2)
    return (top / bottom).mean((-3, -2, -1)).reshape(leading)
