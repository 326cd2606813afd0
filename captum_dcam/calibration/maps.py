r"""The maps that thresholds are fitted on: computed once, kept on the grid of image tokens.

Kept are, for every word, its positive map and (with labels) its masks as packed bits; nothing of
the model's states and no picture. A word on a 24×24 grid with a mask of 192×192 pixels takes 27 kB
in all, stage outputs of :class:`~captum_dcam.calibration.chain.Chain` included; :data:`MOST_BYTES`
bounds the whole.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from captum_dcam import maps as word_maps
from captum_dcam.errors import CalibrationError, DcamError
from captum_dcam.evaluation.progress import Progress, Silent
from captum_dcam.evaluation.trial import derived_seed
from captum_dcam.evaluation.words import Word, read_answer, read_masks, stacked
from captum_dcam.model.adapter import Adapter
from captum_dcam.model.forward import DenoisingForward
from captum_dcam.model.layout import Grid
from captum_dcam.presets import Preset
from captum_dcam.refine import RefineContext

#: what may be kept; a larger collection is refused, not swapped to disk
MOST_BYTES = 2**31
#: copies of a map that a fit holds at once: itself, repeated words', seven stages', the scored one
_COPIES = 10
#: which words are explained without labels: nouns by the tagger, or every word
WORDS = ("nouns", "all")
_KINDS = {"nouns": ("noun",), "all": ("noun", "function", "other")}


@dataclass(frozen=True, eq=False)
class Batch:
    r"""N words that are refined and scored together: same grid, picture size and steps.

    Args:
        maps (Tensor): (N, h, w) float32, the positive part of the base map.
        images (Tensor): (N,) int64, the number of every word's image.
        context (RefineContext): steps, picture size, and (N, h, w) maps of repeated words, zero
            where an answer repeats none.
        grid (Grid): from tokens to pixels.
        masks (tuple): packed bits of (C, H, W) masks, one array a word; empty without labels.
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


@dataclass(frozen=True, eq=False)
class Collection:
    r"""Words of a number of images.

    Args:
        batches (tuple of Batch): the words are counted through them in order.
        ids (tuple): of the images, in order; a word's image number counts them.
        labelled (bool): whether words have masks.
    """

    batches: tuple[Batch, ...]
    ids: tuple[Any, ...]
    labelled: bool

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
    labelled: bool,
    words: str = "nouns",
    layer: int | None = None,
    prompt: str | None = None,
    generation: dict[str, Any] | None = None,
    seed: int = 0,
    progress: Progress | None = None,
) -> Collection:
    r"""Base maps of the words of the model's own answers.

    Args:
        adapter (Adapter): the model.
        data: has ``sample(image_id)`` with ``image()``, ``prompt`` and, where ``labelled``,
            ``objects``, as :class:`captum_dcam.data.Dataset`. Masks are read with labels only.
        ids (iterable): of the images, in order.
        preset (Preset): whose score, product and centring make the map; its refinements decide
            whether repeated words are read.
        labelled (bool): explain words that name an object with a mask, as evaluations score them,
            and keep the masks.
        words (str, optional): without labels: ``nouns`` or ``all``. Default: ``"nouns"``
        layer (int, optional): block. Default: the family's recommended one
        prompt (str, optional): Default: the data's
        generation (dict, optional): the family's decoding settings.
        seed (int, optional): of sampled decoding; draws as an evaluation with this seed. Default: 0
        progress (Progress, optional): is told of every image.

    Returns:
        Collection: of the first grid of every image, which is the one that evaluations score.

    Raises:
        CalibrationError: an image cannot be read or explained (named); no word at all; too much to
            keep.
    """
    if words not in WORDS:
        raise CalibrationError(f"words is {words!r}: expected one of {', '.join(WORDS)}")
    reader = _Reader(adapter, preset, labelled, words, layer, prompt, generation or {}, seed)
    progress, listed = progress or Silent(), tuple(ids)
    progress.begin(len(listed), 0, 0)
    try:
        for number, image_id in enumerate(listed):
            progress.say(f"{image_id}")
            try:
                reader.read(number, image_id, data.sample(image_id))
            except CalibrationError:
                raise
            except (DcamError, OSError) as error:
                raise CalibrationError(f"image {image_id!r}: {error}") from error
            progress.image(False)
    finally:
        progress.end()
    batches = tuple(part.batch() for part in reader.parts.values())
    if not batches:
        named = "names an object with a mask" if labelled else "is a noun"
        raise CalibrationError(
            f"{len(listed)} images and no word that {named} in the model's answers: look at one "
            "with captum-dcam explain, and give another --prompt or other images"
        )
    return Collection(batches, listed, labelled)


class _Part:
    """A batch that grows."""

    def __init__(self, context: RefineContext, grid: Grid) -> None:
        self.context, self.grid = context, grid
        self.maps: list[Tensor] = []
        self.repeated: list[Tensor] = []
        self.images: list[int] = []
        self.masks: list[np.ndarray] = []

    def batch(self) -> Batch:
        context = RefineContext(
            self.context.steps, self.context.image_size, torch.cat(self.repeated)
        )
        images = torch.tensor(self.images)
        return Batch(torch.cat(self.maps), images, context, self.grid, tuple(self.masks))


class _Reader:
    """Answers and explains image after image; keeps maps and masks alone."""

    def __init__(
        self,
        adapter: Adapter,
        preset: Preset,
        labelled: bool,
        words: str,
        layer: int | None,
        prompt: str | None,
        generation: dict[str, Any],
        seed: int,
    ) -> None:
        self.adapter, self.preset, self.layer = adapter, preset, layer
        self.labelled, self.prompt, self.generation, self.seed = labelled, prompt, generation, seed
        self.kinds = ("object",) if labelled else _KINDS[words]
        self.wants_repeated = word_maps.needs_repeated(preset.refinements())
        self.parts: dict[Any, _Part] = {}
        self.bytes = 0

    def read(self, number: int, image_id: Any, sample: Any) -> None:
        forward = self._answered(image_id, sample)
        objects = sample.objects if self.labelled else ()
        words = [w for w in read_answer(forward, objects).words if w.kind in self.kinds]
        grid = forward.request.layout.grids[0]
        masks = []
        if self.labelled:
            found = read_masks(words, objects, grid.image_size)
            words = [w for w in words if any(bool(found[name].any()) for name in w.objects)]
            masks = [np.packbits(stacked([w], found)[0].numpy()) for w in words]
        if words:
            self._keep(number, forward, words, masks, grid)

    def _answered(self, image_id: Any, sample: Any) -> DenoisingForward:
        prompt = sample.prompt if self.prompt is None else self.prompt
        if prompt is None:
            raise CalibrationError("the data set has no prompt: give one (--prompt)")
        forward = DenoisingForward(self.adapter, self.layer)
        request = self.adapter.prepare([[sample.image()]], [prompt])
        seed = derived_seed(self.seed, image_id, "answer")
        forward.generate(request, generator=torch.Generator().manual_seed(seed), **self.generation)
        return forward

    def _keep(
        self,
        number: int,
        forward: DenoisingForward,
        words: list[Word],
        masks: list[np.ndarray],
        grid: Grid,
    ) -> None:
        reading, targets = self.preset.reading(), [w.target for w in words]
        signed = word_maps.word_maps(forward, targets, [0] * len(targets), reading)
        maps = signed[0].relu().float().cpu()
        own = word_maps.repeated_maps(forward, 0, reading) if self.wants_repeated else None
        repeated = torch.zeros_like(maps) if own is None else own[0].float().cpu().expand_as(maps)
        context = word_maps.contexts_of(forward)[0]
        edges = (grid.x_edges.numpy().tobytes(), grid.y_edges.numpy().tobytes())
        key = (grid.shape, grid.image_size, context.steps, edges)
        part = self.parts.setdefault(key, _Part(context, grid))
        part.maps.append(maps)
        part.repeated.append(repeated)
        part.images += [number] * len(words)
        part.masks += masks
        self.bytes += _COPIES * maps.numel() * maps.element_size() + sum(m.nbytes for m in masks)
        if self.bytes > MOST_BYTES:
            raise CalibrationError(
                f"the maps of {number + 1} images take {self.bytes / 2**30:.1f} GiB, more than "
                f"the {MOST_BYTES / 2**30:g} that a calibration keeps: give a smaller --limit"
            )
