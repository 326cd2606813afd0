r"""ARCC: one number of a map's removal, coherency and complexity, as pytorch-grad-cam has it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from captum_dcam.errors import InputError
from captum_dcam.faithfulness.curves import checked_call, ranked
from captum_dcam.faithfulness.reading import Explain, flat_maps
from captum_dcam.methods.base import AttributionTask
from captum_dcam.methods.captum_common import pixel_owners
from captum_dcam.methods.edited import one_example, read_removed, with_pixels
from captum_dcam.methods.score_cam import pixel_masks
from captum_dcam.model.forward import DenoisingForward, holding
from captum_dcam.model.sequence import split_grids
from captum_dcam.model.trajectory import Score
from captum_dcam.model.words import Target
from captum_dcam.refine import min_max

#: shares of the image removed, of which the mean is taken
SHARES = (0.2, 0.4, 0.6, 0.8)


@dataclass(frozen=True, eq=False)
class Arcc:
    r"""Of N words, all (N,) float64.

    Args:
        coherency (Tensor): correlation of the map with the map of the image under it, from 0 to 1.
        complexity (Tensor): mean of the map, each from 0 to 1; 0 for a map that is 0 everywhere.
        removal (Tensor): ROAD: how much more of the word's probability is left when the least
            relevant patches go than when the most relevant go; -0.5 to 0.5.
    """

    coherency: Tensor
    complexity: Tensor
    removal: Tensor

    @property
    def value(self) -> Tensor:
        """(N,) harmonic mean of the coherency, 1 − complexity, and twice the removal, which counts
        as 0 below 0; 0 where one of them is. Higher is better."""
        parts = torch.stack((self.coherency, 1 - self.complexity, (2 * self.removal).clamp(0, 1)))
        positive = (parts > 0).all(0)
        inverse = 1 / parts.masked_fill(parts <= 0, 1)
        return torch.where(positive, 3 / inverse.sum(0), 0)


@holding
def arcc(
    forward: DenoisingForward,
    targets: Sequence[Target],
    maps: Iterable[Tensor],
    explain: Explain,
    *,
    baseline: str = "inpaint",
    where: str = "pixels",
    patch: int = 1,
    fractions: Sequence[float] = SHARES,
    score: Score = "commit",
    generator: torch.Generator | None = None,
    chunk: int = 8,
) -> Arcc:
    r"""Harmonic mean of coherency, simplicity and ROAD of maps from 0 to 1.

    Negative values count as 0, and every map is stretched to [0, 1], as that package's are.
    Coherency takes the map again on the image times the map, as it is after normalisation, and is
    (1 + Pearson's r) / 2, 0.5 where one of the maps is constant. ROAD's noisy linear imputation is
    :func:`captum_dcam.methods.edited.harmonic`, the same idea without noise.

    Args:
        forward (DenoisingForward): bound, one example.
        targets (sequence of Target): N words.
        maps (iterable of Tensor): one (N, h, w) per grid.
        explain (callable): ``(forward, targets) -> maps`` as the maps were made.
        baseline (str, optional): see :func:`captum_dcam.methods.edited.pixel_fill`.
            Default: ``"inpaint"``
        where, patch, score, chunk: as in :func:`captum_dcam.faithfulness.deletion`.
        fractions (sequence of float, optional): shares of the image removed. Default:
            :data:`SHARES`, as that package's
        generator (torch.Generator, optional): draws the order of equal values. Default: one with
            seed 0

    Returns:
        Arcc: the three parts and the mean.

    Source:
        pytorch-grad-cam 1.5.7, ``metrics.arcc`` (arXiv:2605.14641); complexity and coherency of
        Poppi et al., arXiv:2104.10252; ROAD of Rong et al., ICML 2022.
    """
    asked = list(fractions)
    if not asked or not all(0 < share < 1 for share in asked):
        raise InputError(f"fractions are {asked}: expected numbers between 0 and 1")
    generator = checked_call(
        forward, targets, score, generator, baseline=baseline, where=where, patch=patch, chunk=chunk
    )
    rows = _stretched(flat_maps(forward, maps, targets, "arcc"))
    stretched = [torch.stack(same) for same in _grids(rows, forward)]
    groups, places = ranked(forward, targets, stretched, patch, generator, "arcc")
    count = places.shape[1]
    counts = [round(share * count) for share in asked]
    gone = [
        gone for row in places for c in counts for gone in (row < c, row >= count - c)
    ]  # the most relevant, the least
    each = 2 * len(counts)
    wanted = [(row, targets[row // each]) for row in range(len(gone))]
    found = read_removed(
        forward, torch.stack(gone), groups, wanted, baseline, where, score, chunk
    ).exp()
    most, least = found.view(len(targets), len(counts), 2).mean(1).T
    return Arcc(_coherency(forward, targets, rows, explain), rows.mean(1), (least - most) / 2)


def _stretched(rows: Tensor) -> Tensor:
    """Rows (N, T) cut at 0 and stretched to [0, 1], each over all grids."""
    return min_max(rows.relu()[:, None])[:, 0]


def _grids(rows: Tensor, forward: DenoisingForward) -> list[tuple[Tensor, ...]]:
    """Rows (N, T) as a tuple of N maps (h, w) for every grid."""
    return list(zip(*(split_grids(row, forward) for row in rows), strict=True))


def _coherency(
    forward: DenoisingForward, targets: Sequence[Target], rows: Tensor, explain: Explain
) -> Tensor:
    """(N,) float64: how like a map (N, T) that of the image under it is."""
    owners = pixel_owners(AttributionTask(forward, ()))
    pixels, found = one_example(forward).pixels.detach(), []
    masks = pixel_masks([torch.stack(same).float() for same in _grids(rows, forward)], owners)
    for row, mask, target in zip(rows, masks, targets, strict=True):
        masked = with_pixels(forward, pixels * mask[None].to(pixels))
        with torch.enable_grad():
            again = explain(masked, (target,))
        other = _stretched(flat_maps(masked, again, (target,), "arcc"))[0]
        a, b = row - row.mean(), other - other.mean()
        size = a.norm() * b.norm()
        found.append((1 + ((a @ b) / size if size > 0 else size)) / 2)
    return torch.stack(found)
