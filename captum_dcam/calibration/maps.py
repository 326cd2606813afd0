r"""The maps that a fit is made on: computed once, kept on the grids of image tokens, and refined
again only from the stage that changed.

The evaluation's trial makes every answer and finds its words and masks.
Kept are, for every word, its positive map on every grid and its masks as packed bits, and for every
image the states of its tokens where a refinement reads them; no image. All grids are refined
together, and the first is scored, as evaluations do. A word on a 24×24 grid with a mask of 192×192
pixels takes 27 kB in all, stage outputs of :class:`Chain` included; :data:`MOST_BYTES` bounds the
whole.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, TypeVar

import numpy as np
import torch
from torch import Tensor

from captum_dcam import maps as word_maps
from captum_dcam.calibration.parameters import Stages
from captum_dcam.errors import CalibrationError, DcamError
from captum_dcam.evaluation.measure import LOCALIZATION_SCORES, map_statistics
from captum_dcam.evaluation.plan import Plan, Variant, refinement_records
from captum_dcam.evaluation.trial import Trial, branches_of
from captum_dcam.evaluation.words import stacked
from captum_dcam.files import canonical
from captum_dcam.metrics import localization
from captum_dcam.model.adapter import Adapter
from captum_dcam.model.forward import DenoisingForward
from captum_dcam.model.layout import Grid
from captum_dcam.model.progress import ProgressLike, as_progress
from captum_dcam.model.tagging import DEFAULT_TAGGER
from captum_dcam.model.words import Target
from captum_dcam.presets import Preset
from captum_dcam.refine import DACG, DACG_BRANCHES, SICD, RefineContext, Refinement, min_max
from captum_dcam.refine.base import NamedRefinement

#: what may be kept; a larger collection is refused, not swapped to disk
MOST_BYTES = 2**31
#: copies of a map that a fit holds at once: itself, repeated words', seven stages', the scored one
_COPIES = 10
#: pixels per call of the metric, in float64
_PIXELS = 2**21
#: maps (N, h, w) of the same words, one per grid
Grids = tuple[Tensor, ...]


@dataclass(frozen=True, eq=False)
class Batch(ABC):
    r"""N words that are refined together; a subclass knows how they are scored.

    Args:
        maps (tuple of Tensor): (N, h, w) float32, one per grid: the positive part of the base maps.
        images (Tensor): (N,) int64, the number of every word's image.
        contexts (tuple of RefineContext): one per grid: steps, image size, and (N, h, w) maps of
            repeated words, zero where an answer repeats none; features of their one image, where a
            refinement reads any.
    """

    #: what a word's scores are called, and which of them a fit raises
    columns: ClassVar[tuple[str, ...]]
    objective: ClassVar[str]
    #: whether the scores come from masks
    labelled: ClassVar[bool]
    #: fewer images and words than these say nothing about what is fitted
    least: ClassVar[tuple[int, int]]

    maps: tuple[Tensor, ...]
    images: Tensor
    contexts: tuple[RefineContext, ...]

    @abstractmethod
    def scores(self, maps: Sequence[Tensor], at: list[int]) -> tuple[Tensor, int]:
        """Scores (n, columns) float64 of the words ``at`` by refined maps (N, h, w), one per grid,
        and the number of forward passes that they took."""

    @property
    def nbytes(self) -> int:
        """What a fit holds of the words at once."""
        states = [c.features for c in self.contexts]
        kept = sum(f.nbytes for f in states if f is not None)
        return _COPIES * sum(m.nbytes for m in self.maps) + kept


B = TypeVar("B", bound=Batch)


@dataclass(frozen=True, eq=False)
class Masked(Batch):
    r"""Words with masks, scored by their localisation.

    Args:
        grid (Grid): the first one, from tokens to pixels.
        masks (tuple): packed bits of (C, H, W) masks, one array per word.
    """

    columns = LOCALIZATION_SCORES
    objective = "f3"
    labelled = True
    least = (10, 20)

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

    def scores(self, maps: Sequence[Tensor], at: list[int]) -> tuple[Tensor, int]:
        """Of the first grid, in pixels of the image as evaluations do."""
        height, width = self.grid.image_size
        chunk = max(1, _PIXELS // (height * width))
        out = []
        for start in range(0, len(at), chunk):
            part = at[start : start + chunk]
            found = localization(self.grid.to_pixels(maps[0][part]), self.masks_of(part))
            out.append(torch.stack([getattr(found, name).double() for name in self.columns], 1))
        return torch.cat(out), 0

    @property
    def nbytes(self) -> int:
        """With the masks."""
        return super().nbytes + sum(m.nbytes for m in self.masks)

    def key(self) -> Any:
        """What words that are refined and scored together have in common."""
        edges = (self.grid.x_edges.numpy().tobytes(), self.grid.y_edges.numpy().tobytes())
        # features are an image's own, and are kept once for all its words
        own = None if self.contexts[0].features is None else int(self.images[0])
        shapes = tuple(m.shape[1:] for m in self.maps)
        return (shapes, self.grid.image_size, self.contexts[0].steps, edges, own)


@dataclass(frozen=True, eq=False)
class Collection:
    r"""Words of a number of images, and their maps at a block.

    Args:
        batches (tuple of Batch): of one class; the words are counted through them in order.
        ids (tuple): of the images, in order; a word's image number counts them.
        layer (int): the block.
    """

    batches: tuple[Batch, ...]
    ids: tuple[Any, ...]
    layer: int

    @property
    def kind(self) -> type[Batch]:
        """How the words are scored."""
        return type(self.batches[0])

    @property
    def images(self) -> Tensor:
        """(N,) int64, the image of every word."""
        return torch.cat([b.images for b in self.batches])

    @property
    def used(self) -> int:
        """Images with at least one word."""
        return len(self.images.unique())

    def __len__(self) -> int:
        return len(self.images)


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
    progress: ProgressLike = None,
) -> Collection:
    r"""Base maps and masks of the words, in the model's own answers, that name a masked object.

    Args:
        adapter (Adapter): the model.
        data: has ``sample(image_id)`` with ``image()``, ``prompt`` and ``objects``, as
            :class:`captum_dcam.data.Dataset`.
        ids (iterable): of the images, in order.
        preset (Preset): whose score, product and centring make the map; its refinements decide
            whether repeated words, and states of image tokens, are read.
        layer (int, optional): block. Default: the family's recommended one
        prompt (str, optional): Default: the data's
        generation (dict, optional): the family's decoding settings.
        seed (int, optional): of sampled decoding, at least 0; draws as an evaluation with this
            seed. Default: 0
        progress (bool, callable or Progress, optional): is told of every image, see
            :mod:`captum_dcam.model.progress`.

    Returns:
        Collection: of :class:`Masked`; the first grid of every image is scored.

    Raises:
        CalibrationError: an image cannot be read or explained (named); no word at all; too much to
            keep.
    """
    refinements = tuple(refinement_records(preset.refinements()))
    variant = Variant("maps", "diffusion_cam", layer=layer, refinements=refinements)
    plan = Plan(
        (variant,), prompt=prompt, words=("object",), seed=seed, generation=generation or {}
    )
    trial, listed = Trial(plan, adapter), tuple(ids)

    def read(number: int, image_id: Any) -> Masked | None:
        return _read(trial, preset, number, image_id, data.sample(image_id))

    groups: dict[Any, list[Masked]] = {}
    for batch in gathered(read, listed, "names an object with a mask", progress):
        groups.setdefault(batch.key(), []).append(batch)
    batches = tuple(_joined(same) for same in groups.values())
    return Collection(batches, listed, adapter.check_layer(layer))


def gathered(
    read: Callable[[int, Any], B | None],
    listed: Sequence[Any],
    wanted: str,
    progress: ProgressLike,
) -> list[B]:
    r"""What is read of each image that has a word.

    Args:
        read (callable): of an image's number and id: its words, or None without any.
        listed (sequence): ids.
        wanted (str): what a word does that is wanted, for the error.
        progress (bool, callable or Progress, optional): is told of every image, see
            :mod:`captum_dcam.model.progress`.

    Raises:
        CalibrationError: as :func:`collect`.
    """
    found: list[B] = []
    size, told = 0, as_progress(progress, "calibrate")
    told.begin(len(listed))
    try:
        for number, image_id in enumerate(listed):
            told.say(f"{image_id}")
            with listed_errors(image_id):
                batch = read(number, image_id)
            if batch is not None:
                found.append(batch)
                size += batch.nbytes
            if size > MOST_BYTES:
                raise CalibrationError(
                    f"the maps of {number + 1} images take {size / 2**30:.1f} GiB, more than "
                    f"the {MOST_BYTES / 2**30:g} that a calibration keeps: give a smaller --limit"
                )
            told.image()
    finally:
        told.end()
    if not found:
        raise CalibrationError(
            f"{len(listed)} images and no word that {wanted} in the model's answers: look at one "
            "with captum-dcam explain, and give another --prompt or other images"
        )
    return found


@contextmanager
def listed_errors(image_id: Any) -> Iterator[None]:
    """CalibrationError that names the image, for one that cannot be read or explained."""
    try:
        yield
    except (DcamError, OSError) as error:
        raise CalibrationError(f"image {image_id!r}: {error}") from error


def base_maps(
    forward: DenoisingForward, targets: Sequence[Target], preset: Preset
) -> tuple[tuple[Tensor, ...], tuple[RefineContext, ...]]:
    r"""Positive maps (N, h, w) of words of the bound answer and their contexts, one per grid, on
    the CPU."""
    # as the preset file reads, whatever is installed here
    reading, refinements = preset.reading(tagger=DEFAULT_TAGGER), preset.refinements()
    signed = word_maps.word_maps(forward, targets, [0] * len(targets), reading)
    maps = tuple(m.relu().float().cpu() for m in signed)
    own = None
    if word_maps.needs_repeated(refinements):
        own = word_maps.repeated_maps(forward, 0, reading)
    contexts = []
    for i, context in enumerate(word_maps.contexts_of(forward, None, refinements)):
        repeated = torch.zeros_like(maps[i]) if own is None else own[i].float().cpu()
        states = None if context.features is None else context.features.cpu()
        repeated = repeated.expand_as(maps[i])
        contexts.append(replace(context, repeated_maps=repeated, features=states))
    return maps, tuple(contexts)


def _read(trial: Trial, preset: Preset, number: int, image_id: Any, sample: Any) -> Masked | None:
    """The words of one image whose mask holds a pixel; None without any."""
    bound, _ = trial.answer(image_id, sample)
    words = [w for w in bound.words if any(bool(bound.masks[name].any()) for name in w.objects)]
    if not words:
        return None
    maps, contexts = base_maps(bound.forward, [w.target for w in words], preset)
    return Masked(
        maps,
        torch.full((len(words),), number),
        contexts,
        bound.forward.request.layout.grids[0],
        tuple(np.packbits(stacked([w], bound.masks)[0].numpy()) for w in words),
    )


def _joined(same: list[Masked]) -> Masked:
    """Words of several images in one batch."""
    contexts = []
    for i, context in enumerate(same[0].contexts):
        repeated = [m for b in same if (m := b.contexts[i].repeated_maps) is not None]
        contexts.append(replace(context, repeated_maps=torch.cat(repeated)))
    return Masked(
        tuple(torch.cat(grid) for grid in zip(*(b.maps for b in same), strict=True)),
        torch.cat([b.images for b in same]),
        tuple(contexts),
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
        #: settings that were scored, and the forward passes that this took
        self.evaluations = self.passes = 0
        self._raw = tuple(b.maps for b in collection.batches)
        self._done: list[tuple[Refinement, tuple[Grids, ...]]] = []
        self._scored: dict[str, Tensor] = {}
        nothing = torch.zeros(len(collection.kind.columns), dtype=torch.float64)
        #: maps that were scored last and their scores; no map equals one of NaN
        self._last = [
            (tuple(torch.full_like(m, float("nan")) for m in maps), nothing.repeat(len(maps[0]), 1))
            for maps in self._raw
        ]

    def refined(self, stages: Sequence[Refinement]) -> tuple[Grids, ...]:
        """Maps (N, h, w) of every batch after the stages, one per grid."""
        same = 0
        for (known, _), stage in zip(self._done, stages, strict=False):
            if known != stage:
                break
            same += 1
        found = self._done[same - 1][1] if same else self._raw
        if same < len(stages):
            del self._done[same:]
        contexts = [b.contexts for b in self.collection.batches]
        for stage in stages[same:]:
            both = zip(found, contexts, strict=True)
            found = tuple(word_maps.refine_words(m, [stage], c) for m, c in both)
            self._done.append((stage, found))
        return found

    def before(
        self, stages: Sequence[Refinement], stage: type[NamedRefinement]
    ) -> tuple[Tensor, ...]:
        """Maps (N, h, w) of the first grids as they come to the stage of this class."""
        at = next(i for i, s in enumerate(stages) if isinstance(s, stage))
        return tuple(maps[0] for maps in self.refined(stages[:at]))

    def statistics(
        self, stages: Sequence[Refinement], stage: type[NamedRefinement] | None = None
    ) -> dict[str, Tensor]:
        r"""Mean, standard deviation and skewness (N,) of maps as they come to the stage of this
        class, see :func:`~captum_dcam.evaluation.measure.map_statistics`. Default: of the base maps
        from 0 to 1"""
        levels = self.before(stages, stage) if stage else [min_max(maps[0]) for maps in self._raw]
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
        """(N, columns) float64 of every word, see :attr:`Batch.columns`."""
        key = canonical([s.describe() for s in stages])
        if key not in self._scored:
            self._score(self.refined(stages))
            self._scored[key] = torch.cat([scores for _, scores in self._last])
            self.evaluations += 1
        return self._scored[key]

    def objective(self, stages: Stages) -> Tensor:
        """(N,) float64, the column that a fit raises."""
        kind = self.collection.kind
        return self.scores(stages)[:, kind.columns.index(kind.objective)]

    def _score(self, refined: Sequence[Grids]) -> None:
        """Score every batch; words whose maps are the last ones bit for bit keep their scores."""
        for i, (batch, own) in enumerate(zip(self.collection.batches, refined, strict=True)):
            before, scores = self._last[i]
            pairs = zip(own, before, strict=True)
            changed = torch.stack([(new != old).flatten(1).any(1) for new, old in pairs]).any(0)
            at = changed.nonzero().flatten().tolist()
            scores = scores.clone()
            if at:
                scores[at], passes = batch.scores(own, at)
                self.passes += passes
            self._last[i] = own, scores
