r"""The maps that thresholds are fitted on: computed once, kept on the grid of image tokens.

The evaluation's trial makes every answer and finds its words and masks. Kept are, for every word,
its positive map and its masks as packed bits; nothing of the model's states and no image. A word on
a 24×24 grid with a mask of 192×192 pixels takes 27 kB in all, stage outputs of
:class:`~captum_dcam.calibration.chain.Chain` included; :data:`MOST_BYTES` bounds the whole.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from captum_dcam import maps as word_maps
from captum_dcam.errors import CalibrationError, DcamError
from captum_dcam.evaluation.harness import Progress, Silent
from captum_dcam.evaluation.plan import Plan, Variant, refinement_records
from captum_dcam.evaluation.trial import Trial
from captum_dcam.evaluation.words import stacked
from captum_dcam.model.adapter import Adapter
from captum_dcam.model.layout import Grid
from captum_dcam.presets import Preset
from captum_dcam.refine import RefineContext

#: what may be kept; a larger collection is refused, not swapped to disk
MOST_BYTES = 2**31
#: copies of a map that a fit holds at once: itself, repeated words', seven stages', the scored one
_COPIES = 10


@dataclass(frozen=True, eq=False)
class Batch:
    r"""N words that are refined and scored together: same grid, image size and steps.

    Args:
        maps (Tensor): (N, h, w) float32, the positive part of the base map.
        images (Tensor): (N,) int64, the number of every word's image.
        context (RefineContext): steps, image size, and (N, h, w) maps of repeated words, zero
            where an answer repeats none.
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

    def key(self) -> Any:
        """What words that are refined and scored together have in common."""
        edges = (self.grid.x_edges.numpy().tobytes(), self.grid.y_edges.numpy().tobytes())
        return (self.grid.shape, self.grid.image_size, self.context.steps, edges)


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
                size += _COPIES * batch.maps.nbytes + sum(m.nbytes for m in batch.masks)
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
    forward, reading = bound.forward, preset.reading()
    signed = word_maps.word_maps(forward, [w.target for w in words], [0] * len(words), reading)
    maps = signed[0].relu().float().cpu()
    own = word_maps.repeated_maps(forward, 0, reading) if trial.wants_repeated else None
    repeated = torch.zeros_like(maps) if own is None else own[0].float().cpu().expand_as(maps)
    return Batch(
        maps,
        torch.full((len(words),), number),
        replace(word_maps.contexts_of(forward)[0], repeated_maps=repeated),
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
