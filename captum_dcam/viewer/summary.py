r"""An explanation in a few words: one row a word, and its scores where masks are known."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from captum_dcam.data.language import plural
from captum_dcam.data.scenes import COLORS, SHAPES, Scene
from captum_dcam.explanation import Explanation, region
from captum_dcam.metrics import LocalizationScores, localization
from captum_dcam.targets import Target

_SHAPE_OF = {**{s: s for s in SHAPES}, **{plural(s): s for s in SHAPES}}


@dataclass(frozen=True)
class WordSummary:
    r"""One explained word.

    Args:
        number (int): from 1, in the order of the explanation.
        word (str): its text.
        positions (tuple of int): of its tokens in the answer.
        steps (tuple of int): the step that committed each of them, without repeats.
        confidence (float): probability at that step, of the least sure token.
        image (int): the picture it looks at most, from 0.
        region (str): where its highest token lies, in words.
        peak (tuple or None): (x0, y0, x1, y1) in pixels of its highest token; None: an empty map.
        area (float): fraction of image tokens that hold half of its mass.
    """

    number: int
    word: str
    positions: tuple[int, ...]
    steps: tuple[int, ...]
    confidence: float
    image: int
    region: str
    peak: tuple[float, float, float, float] | None
    area: float


def summarise(explanation: Explanation) -> tuple[WordSummary, ...]:
    """One row for every explained word, in order."""
    confidence = explanation.trajectory.confidence[0].tolist()
    grids = explanation.layout.grids
    rows = []
    for n, (target, steps) in enumerate(
        zip(explanation.targets, explanation.commit_steps(), strict=True)
    ):
        peaks = [float(p[n]) for p in explanation.peaks]
        best = peaks.index(max(peaks))
        focus = explanation.focus(n, best)
        rows.append(
            WordSummary(
                number=n + 1,
                word=target.text,
                positions=target.positions,
                steps=tuple(sorted(set(steps))),
                confidence=min(confidence[p] for p in target.positions),
                image=grids[best].image,
                region=_region(focus["peak"], grids[best].image_size),
                peak=focus["peak"],
                area=focus["area"],
            )
        )
    return tuple(rows)


def _region(peak: tuple[float, float, float, float] | None, size: tuple[int, int]) -> str:
    """The peak's place in words: a faint haze far from it does not move it, as it would a mean."""
    if peak is None:
        return "nowhere"
    return region((peak[0] + peak[2]) / 2 / size[1], (peak[1] + peak[3]) / 2 / size[0])


def named_object(pieces: Sequence[str], target: Target) -> tuple[str | None, str | None]:
    r"""Colour and shape of the object that a word of an answer names.

    The noun's own colour word counts (``circle`` in "a red circle" is the red one), and so does a
    colour word's noun. ``(None, None)`` where it names no object.

    Args:
        pieces (sequence of str): text of every token of the answer.
        target (Target): the word.
    """
    words = [piece.strip().lower() for piece in pieces]
    own = target.positions
    inside = [words[p] for p in own]
    color = next((w for w in inside if w in COLORS), None)
    shape = next((_SHAPE_OF[w] for w in inside if w in _SHAPE_OF), None)
    before = words[own[0] - 1] if own[0] > 0 else ""
    after = words[own[-1] + 1] if own[-1] + 1 < len(words) else ""
    if color is None and shape is not None and before in COLORS:
        color = before
    if shape is None and color is not None:
        shape = _SHAPE_OF.get(after)
    return color, shape


def scene_mask(scene: Scene, pieces: Sequence[str], target: Target) -> Tensor | None:
    """Mask (H, W) bool of what a word names; None if it names no object of the scene."""
    color, shape = named_object(pieces, target)
    if color is None and shape is None:
        return None
    mask = torch.from_numpy(scene.mask_of(color, shape))
    return mask if bool(mask.any()) else None


def scene_scores(explanation: Explanation, scene: Scene) -> tuple[LocalizationScores | None, ...]:
    r"""Localisation of every word that names an object of the scene, against its masks.

    Returns:
        tuple: one a target: scalars of :func:`captum_dcam.metrics.localization` on the bilinear map
        in pixels; None for words that name no object, or one that is not in the scene.
    """
    maps = explanation.pixel_maps()
    masks = [scene_mask(scene, explanation.pieces, target) for target in explanation.targets]
    return tuple(
        None if mask is None else localization(own, mask)
        for own, mask in zip(maps, masks, strict=True)
    )
