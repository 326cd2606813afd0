r"""Estimated causal inference: what context tokens explain of a map is taken out of it.

Pure functions on maps of image tokens laid out in a row, (N,); TAM (ICCV 2025) Eq. 3–5, and the
same subtraction with other weights in ARC (Eq. 7–9).
"""

from __future__ import annotations

import torch
from torch import Tensor

#: ε of TAM Eq. 4
EPS = 1e-8


def interference(context_maps: Tensor, weights: Tensor) -> Tensor:
    r"""Weighted mean of the context's maps: :math:`\sum_k w_k A_k / (\sum w + ε)` (TAM Eq. 4).

    Args:
        context_maps (Tensor): (C, N); C may be 0.
        weights (Tensor): (C,), non-negative.

    Returns:
        Tensor: (N,); zero where no context token has weight.
    """
    return (weights / (weights.sum() + EPS)) @ context_maps


def least_squares_scale(target_map: Tensor, other: Tensor) -> Tensor:
    r"""The s that minimises :math:`\|A - sE\|^2`: ⟨A, E⟩ / ⟨E, E⟩, 0 where E = 0 (TAM Eq. 5)."""
    energy = other.square().sum()
    fit = (target_map * other).sum() / energy.where(energy > 0, torch.ones_like(energy))
    return fit.where(energy > 0, torch.zeros_like(fit))


def without_interference(
    target_map: Tensor, context_maps: Tensor, weights: Tensor
) -> tuple[Tensor, Tensor]:
    r"""Positive part of a map minus the scaled interference map: (N,), and the scale.

    Computed in float64, so that the scale does not depend on the maps' size.
    """
    target, other = target_map.double(), interference(context_maps.double(), weights.double())
    scale = least_squares_scale(target, other)
    refined = (target - scale * other).relu()
    return refined.to(target_map.dtype), scale.to(target_map.dtype)


def estimated_causal_inference(
    target_map: Tensor, context_maps: Tensor, relevance: Tensor, same: Tensor
) -> tuple[Tensor, Tensor]:
    r"""TAM's estimated causal inference (Eq. 2 without the filter, Eq. 4 and 5).

    Args:
        target_map (Tensor): (N,) raw map of the token that is explained.
        context_maps (Tensor): (C, N) raw maps of the context tokens.
        relevance (Tensor): (C,) of every context token for the target, non-negative.
        same (Tensor): (C,) bool: the same token as the target; its relevance counts as 0, so that
            it does not wipe out its own object.

    Returns:
        tuple: refined map (N,), non-negative, and the scale s.
    """
    weights = relevance.where(~same, torch.zeros_like(relevance))
    return without_interference(target_map, context_maps, weights)


def rank_biased_overlap(rankings: Tensor, reference: Tensor, p: float) -> Tensor:
    r"""Rank-biased overlap of rankings with one other, cut off at their common depth k.

    .. math:: ρ = \frac{1 - p}{1 - p^k} \sum_{d=1}^{k} p^{d-1} \frac{|S_{:d} \cap T_{:d}|}{d}

    The factor makes the weights of the k depths add up to 1: identical rankings give 1, disjoint
    ones 0, and p → 1 the plain mean of the overlaps. (Webber et al. 2010, Eq. 4, stops at depth k
    without it, and identical rankings give 1 - p^k there.)

    Args:
        rankings (Tensor): (C, k) ids, best first, no id twice in a row.
        reference (Tensor): (k,) ids, likewise.
        p (float): in ]0, 1[: how slowly the weight of a depth falls.

    Returns:
        Tensor: (C,) float64 in [0, 1].
    """
    count, depth = rankings.shape
    equal = rankings[:, :, None] == reference[None, None, :]
    ranks = torch.arange(depth, device=rankings.device)
    # A pair of equal ids is in both prefixes from the deeper of its two ranks on.
    joined = torch.maximum(ranks[:, None], ranks[None, :]).expand(count, depth, depth)
    found = torch.zeros(count, depth, dtype=torch.float64, device=rankings.device)
    found.scatter_add_(1, joined.flatten(1), equal.flatten(1).to(found.dtype))
    shared = found.cumsum(1) / (ranks + 1)
    weights = p ** ranks.to(found.dtype)
    return shared @ (weights / weights.sum())


def joint_min_max(image: Tensor, text: Tensor) -> tuple[Tensor, Tensor]:
    r"""Stretch image tokens (…, N) and text tokens (…, K) to [0, 1] together (TAM Eq. 3).

    NaN marks text tokens that take no part, and stays NaN. All equal: 0 everywhere.
    """
    both = torch.cat((image, text), dim=-1)
    absent = both.isnan()
    low = both.masked_fill(absent, float("inf")).amin(-1, keepdim=True)
    high = both.masked_fill(absent, float("-inf")).amax(-1, keepdim=True)
    span = high - low
    scaled = (both - low) / span.where(span > 0, torch.ones_like(span))
    return scaled[..., : image.shape[-1]], scaled[..., image.shape[-1] :]
