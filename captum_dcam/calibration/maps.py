r"""The maps that thresholds are fitted on: computed once, kept on the grid of image tokens, and
refined again only from the stage that changed.

The evaluation's trial makes every answer and finds its words and masks.
Kept are, for every word, its positive map and its masks as packed bits, and for every image the
states of its tokens where a refinement reads them; no image. Of several grids only the first is
kept, and refined alone. A word on a 24×24 grid with a mask of 192×192 pixels takes 27 kB in all,
stage outputs of :class:`Chain` included; :data:`MOST_BYTES` bounds the whole.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from captum_dcam import maps as word_maps
from captum_dcam.calibration.parameters import Stages
from captum_dcam.errors import CalibrationError, DcamError
from captum_dcam.evaluation.harness import Progress, Silent
from captum_dcam.evaluation.measure import LOCALIZATION_SCORES, map_statistics
from captum_dcam.evaluation.plan import Plan, Variant, refinement_records
from captum_dcam.evaluation.trial import Trial, branches_of
from captum_dcam.evaluation.words import stacked
from captum_dcam.files import canonical
from captum_dcam.metrics import localization
from captum_dcam.model.adapter import Adapter
from captum_dcam.model.layout import Grid
from captum_dcam.model.tagging import DEFAULT_TAGGER
from captum_dcam.presets import Preset
from captum_dcam.refine import DACG, DACG_BRANCHES, SICD, RefineContext, Refinement, min_max
from captum_dcam.refine.base import NamedRefinement

#: what may be kept; a larger collection is refused, not swapped to disk
MOST_BYTES = 2**31
#: copies of a map that a fit holds at once: itself, repeated words', seven stages', the scored one
_COPIES = 10
#: pixels per call of the metric, in float64
_PIXELS = 2**21


@dataclass(frozen=True, eq=False)
class Batch:
    r"""N words that are refined and scored together: same grid, image size and steps.

    Args:
        maps (Tensor): (N, h, w) float32, the positive part of the base map.
        images (Tensor): (N,) int64, the number of every word's image.
        context (RefineContext): steps, image size, and (N, h, w) maps of repeated words, zero
            where an answer repeats none; features of their one image, where a refinement reads any.
        grid (Grid): from tokens to pixels.
        masks (tuple): packed bits of (C, H, W) masks, one array per word.
    """

    maps: Tensor
    images: Tensor
    context: RefineContext
    grid: Grid
    masks: tuple[np.ndarray, ...] = field(default=(), repr=False)

    def masks_of(self, at: list[int]) -> Tensor:
        """(n, C, H, W) bool masks of words ``at``; words with fewer classes get empty ones."""
        height, width = self.grid.image_size
        rows = []
        for i in at:
            classes = len(self.masks[i]) * 8 // (height * width)
            bits = np.unpackbits(self.masks[i], count=classes * height * width)
            rows.append(torch.from_numpy(bits.astype(bool)).reshape(classes, height, width))
        return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)

    @property
    def nbytes(self) -> int:
        """What a fit holds of the words at once."""
        states = self.context.features
        kept = sum(m.nbytes for m in self.masks) + (0 if states is None else states.nbytes)
        return _COPIES * self.maps.nbytes + kept

    def key(self) -> Any:
        """What words that are refined and scored together have in common."""
        edges = (self.grid.x_edges.numpy().tobytes(), self.grid.y_edges.numpy().tobytes())
        # features are an image's own, and are kept once for all its words
        own = None if self.context.features is None else int(self.images[0])
        return (self.grid.shape, self.grid.image_size, self.context.steps, edges, own)


@dataclass(frozen=True, eq=False)
class Collection:
    r"""Words of a number of images.

    Args:
        batches (tuple of Batch): the words are counted through them in order.
        ids (tuple): of the images, in order; a word's image number counts them.
    """

    batches: tuple[Batch, ...]
    ids: tuple[Any, ...]

    @property
    def images(self) -> Tensor:
        """(N,) int64, the image of every word."""
        return torch.cat([b.images for b in self.batches])

    @property
    def used(self) -> int:
        """Images with at least one word."""
        return len(self.images.unique())

    def __len__(self) -> int:
        return sum(len(b.maps) for b in self.batches)


def collect(
    adapter: Adapter,
    data: Any,
    ids: Iterable[Any],
    preset: Preset,
    *,
    layer: int | None = None,
    prompt: str | None = None,
    generation: dict[str, Any] | None = None,
    seed: int = 0,
    progress: Progress | None = None,
) -> Collection:
    r"""Base maps and masks of the words, in the model's own answers, that name a masked object.

    Args:
        adapter (Adapter): the model.
        data: has ``sample(image_id)`` with ``image()``, ``prompt`` and ``objects``, as
            :class:`captum_dcam.data.Dataset`.
        ids (iterable): of the images, in order.
        preset (Preset): whose score, product and centring make the map; its refinements decide
            whether repeated words are read.
        layer (int, optional): block. Default: the family's recommended one
        prompt (str, optional): Default: the data's
        generation (dict, optional): the family's decoding settings.
        seed (int, optional): of sampled decoding, at least 0; draws as an evaluation with this
            seed. Default: 0
        progress (Progress, optional): is told of every image.

    Returns:
        Collection: of the first grid of every image, which is the one that evaluations score.

    Raises:
        CalibrationError: an image cannot be read or explained (named); no word at all; too much to
            keep.
    """
    refinements = tuple(refinement_records(preset.refinements()))
    variant = Variant("maps", "diffusion_cam", layer=layer, refinements=refinements)
    plan = Plan(
        (variant,), prompt=prompt, words=("object",), seed=seed, generation=generation or {}
    )
    trial, progress, listed = Trial(plan, adapter), progress or Silent(), tuple(ids)
    groups: dict[Any, list[Batch]] = {}
    size = 0
    progress.begin(len(listed), 0, 0)
    try:
        for number, image_id in enumerate(listed):
            progress.say(f"{image_id}")
            try:
                batch = _read(trial, preset, number, image_id, data.sample(image_id))
            except (DcamError, OSError) as error:
                raise CalibrationError(f"image {image_id!r}: {error}") from error
            if batch is not None:
                groups.setdefault(batch.key(), []).append(batch)
                size += batch.nbytes
            if size > MOST_BYTES:
                raise CalibrationError(
                    f"the maps of {number + 1} images take {size / 2**30:.1f} GiB, more than "
                    f"the {MOST_BYTES / 2**30:g} that a calibration keeps: give a smaller --limit"
                )
            progress.image(False)
    finally:
        progress.end()
    if not groups:
        raise CalibrationError(
            f"{len(listed)} images and no word that names an object with a mask in the model's "
            "answers: look at one with captum-dcam explain, and give another --prompt or other "
            "images"
        )
    return Collection(tuple(_joined(same) for same in groups.values()), listed)


def _read(trial: Trial, preset: Preset, number: int, image_id: Any, sample: Any) -> Batch | None:
    """The words of one image whose mask holds a pixel; None without any."""
    bound, _ = trial.answer(image_id, sample)
    words = [w for w in bound.words if any(bool(bound.masks[name].any()) for name in w.objects)]
    if not words:
        return None
    # as the preset file reads, whatever is installed here
    forward, reading = bound.forward, preset.reading(tagger=DEFAULT_TAGGER)
    signed = word_maps.word_maps(forward, [w.target for w in words], [0] * len(words), reading)
    maps = signed[0].relu().float().cpu()
    own = word_maps.repeated_maps(forward, 0, reading) if trial.wants_repeated else None
    repeated = torch.zeros_like(maps) if own is None else own[0].float().cpu().expand_as(maps)
    context = word_maps.contexts_of(forward, None, preset.refinements())[0]
    states = None if context.features is None else context.features.cpu()
    return Batch(
        maps,
        torch.full((len(words),), number),
        replace(context, repeated_maps=repeated, features=states),
        forward.request.layout.grids[0],
        tuple(np.packbits(stacked([w], bound.masks)[0].numpy()) for w in words),
    )


def _joined(same: list[Batch]) -> Batch:
    """Words of several images in one batch."""
    repeated = [m for b in same if (m := b.context.repeated_maps) is not None]
    return Batch(
        torch.cat([b.maps for b in same]),
        torch.cat([b.images for b in same]),
        replace(same[0].context, repeated_maps=torch.cat(repeated)),
        same[0].grid,
        tuple(mask for b in same for mask in b.masks),
    )


# -- refined, stage by stage -----------------------------------------------------------------------


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
            both = zip(found, contexts, strict=True)
            found = tuple(word_maps.refine_words([m], [stage], [c])[0] for m, c in both)
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
