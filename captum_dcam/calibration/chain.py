r"""Refinements over a whole collection, computed again only from the stage that changed."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from captum_dcam import maps
from captum_dcam.calibration.maps import Batch, Collection
from captum_dcam.calibration.parameters import Stages
from captum_dcam.files import canonical
from captum_dcam.metrics import localization
from captum_dcam.refine import DACG, DACG_BRANCHES, SICD, Refinement, dacg_branch, min_max
from captum_dcam.refine.base import NamedRefinement

#: columns of :meth:`Chain.scores`
SCORES = ("obj_iou", "contrast", "concentration", "f3")
STATISTICS = ("mean", "std", "skewness")
#: pixels that are scored at once, in float64
_PIXELS = 2**21


def statistics(maps: Tensor) -> dict[str, Tensor]:
    r"""Mean, population standard deviation and skewness (N,) of maps (N, h, w), in float64.

    The skewness of a constant map is 0.
    """
    levels = maps.double().flatten(1)
    mean = levels.mean(1)
    away = levels - mean[:, None]
    std = away.square().mean(1).sqrt()
    skewness = away.pow(3).mean(1) / std.pow(3).masked_fill(std == 0, 1)
    return {"mean": mean, "std": std, "skewness": skewness.masked_fill(std == 0, 0)}


class Chain:
    r"""Runs stages over a collection; keeps the outputs of the last run, and scores of all runs.

    Args:
        collection (Collection): of N words.
    """

    def __init__(self, collection: Collection) -> None:
        self.collection = collection
        self.evaluations = 0
        self._raw = [b.maps for b in collection.batches]
        self._done: list[tuple[Refinement, list[Tensor]]] = []
        self._scored: dict[str, Tensor] = {}
        self._last: tuple[list[Tensor], list[Tensor]] | None = None

    def refined(self, stages: Sequence[Refinement]) -> list[Tensor]:
        """Maps (N, h, w) of every batch after the stages."""
        same = 0
        for (known, _), stage in zip(self._done, stages, strict=False):
            if known != stage:
                break
            same += 1
        if same == len(stages):
            return self._done[same - 1][1] if same else self._raw
        del self._done[same:]
        for stage in stages[same:]:
            before = self._done[-1][1] if self._done else self._raw
            contexts = [b.context for b in self.collection.batches]
            self._done.append((stage, list(maps.refine_words(before, [stage], contexts))))
        return self._done[-1][1]

    def before(self, stages: Sequence[Refinement], stage: type[NamedRefinement]) -> list[Tensor]:
        """Maps as they come to the stage of this class."""
        at = next(i for i, s in enumerate(stages) if isinstance(s, stage))
        return self.refined(stages[:at])

    def statistics(
        self, stages: Sequence[Refinement], stage: type[NamedRefinement]
    ) -> dict[str, Tensor]:
        """:func:`statistics` of maps as they come to the stage of this class."""
        return gathered(self.before(stages, stage))

    def raw_statistics(self) -> dict[str, Tensor]:
        """:func:`statistics` of the base maps from 0 to 1."""
        return gathered([min_max(m) for m in self._raw])

    def routing(self, stages: Sequence[Refinement]) -> dict[str, float]:
        """Share of the maps that takes each of DACG's branches; empty without DACG."""
        dacg = next((s for s in stages if isinstance(s, DACG)), None)
        if dacg is None:
            return {}
        bounds = {k: getattr(dacg, k) for k in ("high_std", "high_mean", "low_mean")}
        branches = torch.cat([dacg_branch(m, **bounds) for m in self.before(stages, DACG)])
        counts = torch.bincount(branches, minlength=len(DACG_BRANCHES)).tolist()
        return {
            name: count / len(branches) for name, count in zip(DACG_BRANCHES, counts, strict=True)
        }

    def gated(self, stages: Sequence[Refinement]) -> float | None:
        """Share of the maps that SICD's gate lets it touch; None without SICD or its gate."""
        sicd = next((s for s in stages if isinstance(s, SICD) and s.gate), None)
        if sicd is None:
            return None
        found = self.statistics(stages, SICD)
        touched = (found["std"] > sicd.gate_std) | (found["skewness"] > sicd.gate_skewness)
        return float(touched.double().mean())

    def scores(self, stages: Stages) -> Tensor:
        """(N, 4) float64, the columns of :data:`SCORES` for every word."""
        key = canonical([s.describe() for s in stages])
        if key not in self._scored:
            self._scored[key] = torch.cat(self._score(self.refined(stages)))
            self.evaluations += 1
        return self._scored[key]

    def _score(self, maps: list[Tensor]) -> list[Tensor]:
        """Scores of every batch; words whose map is the last one's bit for bit keep theirs."""
        scores = []
        for i, (batch, own) in enumerate(zip(self.collection.batches, maps, strict=True)):
            if self._last is None:
                at = list(range(len(own)))
                found = torch.zeros(len(own), len(SCORES), dtype=torch.float64)
            else:
                at = (own != self._last[0][i]).flatten(1).any(1).nonzero().flatten().tolist()
                found = self._last[1][i].clone()
            if at:
                found[at] = score(batch, own, at)
            scores.append(found)
        self._last = (list(maps), scores)
        return scores


def gathered(maps: Sequence[Tensor]) -> dict[str, Tensor]:
    """:func:`statistics` of all batches."""
    found = [statistics(m) for m in maps]
    return {name: torch.cat([f[name] for f in found]) for name in STATISTICS}


def score(batch: Batch, maps: Tensor, at: list[int]) -> Tensor:
    """(n, 4) float64 scores of the words ``at``, in pixels of the picture as evaluations do."""
    height, width = batch.grid.image_size
    chunk = max(1, _PIXELS // (height * width))
    out = []
    for start in range(0, len(at), chunk):
        part = at[start : start + chunk]
        found = localization(batch.grid.to_pixels(maps[part]), batch.masks_of(part))
        out.append(torch.stack([getattr(found, name).double() for name in SCORES], 1))
    return torch.cat(out)
