r"""Refinements over a whole collection, computed again only from the stage that changed."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from captum_dcam import maps
from captum_dcam.calibration.maps import Batch, Collection
from captum_dcam.calibration.parameters import Stages
from captum_dcam.evaluation.measure import LOCALIZATION_SCORES, map_statistics
from captum_dcam.evaluation.trial import branches_of
from captum_dcam.files import canonical
from captum_dcam.metrics import localization
from captum_dcam.refine import DACG, DACG_BRANCHES, SICD, Refinement, min_max
from captum_dcam.refine.base import NamedRefinement

#: pixels per call of the metric, in float64
_PIXELS = 2**21


class Chain:
    r"""Refines a collection; keeps every stage's outputs of the last time, and all scores.

    Args:
        collection (Collection): of N words.
    """

    def __init__(self, collection: Collection) -> None:
        self.collection = collection
        self.evaluations = 0
        self._raw = tuple(b.maps for b in collection.batches)
        self._done: list[tuple[Refinement, tuple[Tensor, ...]]] = []
        self._scored: dict[str, Tensor] = {}
        nothing = torch.zeros(len(LOCALIZATION_SCORES), dtype=torch.float64)
        #: maps that were scored last and their scores; no map equals one of NaN
        self._last = [
            (torch.full_like(m, float("nan")), nothing.repeat(len(m), 1)) for m in self._raw
        ]

    def refined(self, stages: Sequence[Refinement]) -> tuple[Tensor, ...]:
        """Maps (N, h, w) of every batch after the stages."""
        same = 0
        for (known, _), stage in zip(self._done, stages, strict=False):
            if known != stage:
                break
            same += 1
        found = self._done[same - 1][1] if same else self._raw
        if same < len(stages):
            del self._done[same:]
        contexts = [b.context for b in self.collection.batches]
        for stage in stages[same:]:
            found = maps.refine_words(found, [stage], contexts)
            self._done.append((stage, found))
        return found

    def before(
        self, stages: Sequence[Refinement], stage: type[NamedRefinement]
    ) -> tuple[Tensor, ...]:
        """Maps as they come to the stage of this class."""
        at = next(i for i, s in enumerate(stages) if isinstance(s, stage))
        return self.refined(stages[:at])

    def statistics(
        self, stages: Sequence[Refinement], stage: type[NamedRefinement] | None = None
    ) -> dict[str, Tensor]:
        r"""Mean, standard deviation and skewness (N,) of maps as they come to the stage of this
        class, see :func:`~captum_dcam.evaluation.measure.map_statistics`. Default: of the base maps
        from 0 to 1"""
        levels = self.before(stages, stage) if stage else [min_max(m) for m in self._raw]
        found = [map_statistics(m) for m in levels]
        return {name: torch.cat([f[name] for f in found]) for name in found[0]}

    def routing(self, stages: Sequence[Refinement]) -> dict[str, float]:
        """Share of the maps that takes each of DACG's branches; empty without DACG."""
        dacg = next((s for s in stages if isinstance(s, DACG)), None)
        if dacg is None:
            return {}
        branches = torch.cat([branches_of(dacg, m) for m in self.before(stages, DACG)])
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
        """(N, 4) float64, the columns of :data:`LOCALIZATION_SCORES` for every word."""
        key = canonical([s.describe() for s in stages])
        if key not in self._scored:
            self._score(self.refined(stages))
            self._scored[key] = torch.cat([scores for _, scores in self._last])
            self.evaluations += 1
        return self._scored[key]

    def _score(self, refined: Sequence[Tensor]) -> None:
        """Score every batch; words whose map is the last one's bit for bit keep their scores."""
        for i, (batch, own) in enumerate(zip(self.collection.batches, refined, strict=True)):
            before, scores = self._last[i]
            at = (own != before).flatten(1).any(1).nonzero().flatten().tolist()
            scores = scores.clone()
            if at:
                scores[at] = score(batch, own, at)
            self._last[i] = own, scores


def score(batch: Batch, maps: Tensor, at: list[int]) -> Tensor:
    """(n, 4) float64 scores of the words ``at``, in pixels of the image as evaluations do."""
    height, width = batch.grid.image_size
    chunk = max(1, _PIXELS // (height * width))
    out = []
    for start in range(0, len(at), chunk):
        part = at[start : start + chunk]
        found = localization(batch.grid.to_pixels(maps[part]), batch.masks_of(part))
        out.append(torch.stack([getattr(found, name).double() for name in LOCALIZATION_SCORES], 1))
    return torch.cat(out)
