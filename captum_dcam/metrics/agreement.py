r"""How far do two maps agree? By ranks, by their highest parts, by the distance of their peaks.

None of the three depends on the maps' scales, so maps of different models and methods compare.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from captum_dcam import checks
from captum_dcam.errors import InputError

#: the share of a map's cells that count as its highest part
SHARE = 0.1


@dataclass(frozen=True, eq=False)
class Agreement:
    r"""Agreement of pairs of maps, each of the maps' leading shape (...), float64.

    Attributes:
        rank (Tensor): :func:`rank_correlation` over the cells, in [-1, 1].
        overlap (Tensor): :func:`top_overlap`, in [0, 1]; two random maps reach share / (2 - share).
        distance (Tensor): :func:`peak_distance` in diagonals of the map, in [0, 1).
    """

    rank: Tensor
    overlap: Tensor
    distance: Tensor


def agreement(first: Tensor, second: Tensor, share: float = SHARE) -> Agreement:
    r"""All three at once.

    Args:
        first, second (Tensor): (..., H, W), finite, of one shape; signed values are fine.
        share (float, optional): see :func:`top_overlap`. Default: 0.1

    Raises:
        InputError: maps of two shapes, or without cells; a share outside (0, 1].
    """
    _check(first, second)
    rank = rank_correlation(first.flatten(-2), second.flatten(-2))
    return Agreement(rank, top_overlap(first, second, share), peak_distance(first, second))


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
    one, two = (_ranks(x.detach().cpu().double()) for x in (first, second))
    one, two = (x - x.mean(-1, keepdim=True) for x in (one, two))
    lengths = one.square().sum(-1), two.square().sum(-1)
    flat = [length == 0 for length in lengths]
    ratio = (one * two).sum(-1) / (lengths[0] * lengths[1]).sqrt().masked_fill(flat[0] | flat[1], 1)
    return torch.where(flat[0] & flat[1], torch.ones_like(ratio), ratio).clamp(-1, 1)


def _ranks(rows: Tensor) -> Tensor:
    """Ranks from 1 along the last axis, as :mod:`scipy.stats` has them, which is slow to import;
    NaN where one of them is."""
    rows = rows.contiguous()
    ordered = rows.sort(-1).values
    below, upto = (torch.searchsorted(ordered, rows, right=right) for right in (False, True))
    unknown = rows.isnan().any(-1, keepdim=True)
    return ((below + upto + 1).double() / 2).masked_fill(unknown, torch.nan)


def top_overlap(first: Tensor, second: Tensor, share: float = SHARE) -> Tensor:
    r"""Intersection over union of the highest ``share`` of both maps' cells.

    As many cells as the share says, rounded, at least one; of equal values the first in reading
    order count, so a constant map has its first cells.

    Args:
        first, second (Tensor): (..., H, W), finite, of one shape.
        share (float, optional): of all cells, in (0, 1]. Default: 0.1

    Returns:
        Tensor: (...) float64, in [0, 1].
    """
    _check(first, second)
    if not 0 < checks.real("share", share) <= 1:
        raise InputError(f"share is {share}: expected a share of the map's cells, 0 < share <= 1")
    rows = [x.detach().cpu().double().flatten(-2) for x in (first, second)]
    count = max(1, round(share * rows[0].shape[-1]))
    tops = []
    for row in rows:
        order = row.argsort(dim=-1, descending=True, stable=True)[..., :count]
        tops.append(torch.zeros_like(row).scatter(-1, order, 1.0))
    both = (tops[0] * tops[1]).sum(-1)
    return both / (2 * count - both)


def peak_distance(first: Tensor, second: Tensor) -> Tensor:
    r"""Distance of the two highest cells, over the map's diagonal; of equal ones the first counts.

    Args:
        first, second (Tensor): (..., H, W), finite, of one shape.

    Returns:
        Tensor: (...) float64, in [0, 1).
    """
    _check(first, second)
    high, wide = first.shape[-2:]
    at = [x.detach().cpu().double().flatten(-2).argmax(-1) for x in (first, second)]
    rows, columns = (x // wide for x in at), (x % wide for x in at)
    dy, dx = ((a - b).double() for a, b in (rows, columns))
    return (dy.square() + dx.square()).sqrt() / math.hypot(high, wide)


def _check(first: Tensor, second: Tensor) -> None:
    if first.shape != second.shape or first.ndim < 2 or 0 in first.shape[-2:]:
        raise InputError(
            f"maps have shapes {tuple(first.shape)} and {tuple(second.shape)}: expected the same, "
            "(..., H, W) with H and W of at least 1"
        )
    for maps in (first, second):
        if not bool(maps.isfinite().all()):
            raise InputError("maps hold values that are not finite: agreement compares finite ones")
