r"""Scenes that make the embedded model invent: noise, blur, a covered object, a false premise.

On clean scenes it names no object that is not there. A damaged scene is a pure function of the
scene, the damage and its strength; what is there is known, so every phrase of an answer can be
judged.
"""

from __future__ import annotations

import re
from collections.abc import Collection
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageFilter

from captum_dcam import checks
from captum_dcam.data.common import ImageId, Span, register_dataset
from captum_dcam.data.scenes import (
    COLORS,
    HELD_OUT,
    SHAPE_OF,
    SHAPES,
    Scene,
    SceneDataset,
    SceneSample,
    plural,
)
from captum_dcam.errors import InputError

#: what is done to a scene → the unit of its strength
DAMAGES = {
    "none": "nothing is done, so 0",
    "noise": "standard deviation of Gaussian noise, in halves of the range of pixels",
    "blur": "standard deviation of a Gaussian blur in pixels",
    "occlusion": "share of the width of one object that is covered, up to 1",
    "premise": "nothing is done to the image, so 0: the question asks for the color of a shape, "
    "which in every other scene is not there",
}


@dataclass(frozen=True, eq=False, kw_only=True)
class DegradedSample(SceneSample):
    r"""A damaged scene.

    Attributes:
        damage (str): what was done.
        strength (float): how much.
        visible (frozenset): colour and shape of every object of which something is to be seen.
        asked (str or None): the shape whose colour is asked for.
    """

    damage: str
    strength: float
    visible: frozenset[tuple[str, str]]
    asked: str | None = None

    def image(self) -> Image.Image:
        return damaged(self.scene, self.damage, self.strength)

    def judged(self, answer: str) -> tuple[Span, ...]:
        r"""The phrases "colour shape", colours and shapes of an answer: whether they are there."""
        return tuple(
            Span(start, stop, answer[start:stop], "true" if true else "invented", "object")
            for start, stop, true in _found(answer, self.visible, self.asked)
        )


def damaged(scene: Scene, damage: str, strength: float) -> Image.Image:
    r"""The image of a scene after a damage of :data:`DAMAGES`."""
    pixels = scene.pixels
    rng = np.random.default_rng([scene.seed, scene.index, 2])
    if damage == "noise":
        noisy = pixels + rng.normal(0, strength * 127.5, pixels.shape)
        return Image.fromarray(noisy.clip(0, 255).round().astype(np.uint8))
    if damage == "blur":
        return scene.image.filter(ImageFilter.GaussianBlur(strength))
    if damage == "occlusion":
        rows, columns = scene.objects[_covered(scene)].mask.nonzero()
        x0, y0, y1 = columns.min(), rows.min(), rows.max() + 1
        x1 = x0 + round(strength * (columns.max() + 1 - x0))
        covered = pixels.copy()
        covered[y0:y1, x0:x1] = np.median(pixels.reshape(-1, 3), axis=0)
        return Image.fromarray(covered)
    return scene.image


def _covered(scene: Scene) -> int:
    """Which object is covered."""
    return int(np.random.default_rng([scene.seed, scene.index, 3]).integers(len(scene.objects)))


def _found(
    answer: str, visible: Collection[tuple[str, str]], asked: str | None
) -> list[tuple[int, int, bool]]:
    """Characters of every phrase of an answer, and whether it is true."""
    words = [(m.start(), m.end(), m[0].lower()) for m in re.finditer(r"\w+", answer)]
    out = []
    place = 0
    while place < len(words):
        start, stop, word = words[place]
        color = word if word in COLORS else None
        shape = SHAPE_OF.get(word)
        place += 1
        joined = place < len(words) and not answer[stop : words[place][0]].strip()
        if color is not None and joined and words[place][2] in SHAPE_OF:
            stop, shape = words[place][1], SHAPE_OF[words[place][2]]
            place += 1
        if color is not None or shape is not None:
            meant = asked if shape is None else shape
            there = any(color in (None, c) and meant in (None, s) for c, s in visible)
            out.append((start, stop, there))
    return out


@register_dataset("degraded")
class DegradedScenes(SceneDataset):
    r"""Scenes ``start`` to ``start + count - 1`` of a stream, damaged.

    Args:
        damage (str): one of :data:`DAMAGES`. Default: ``"noise"``
        strength (float): in the unit that :data:`DAMAGES` says. Default: 0.8
        count, start, seed: as :class:`~captum_dcam.data.scenes.SceneDataset`.
        prompt (str): what to ask, but for ``premise``. Default: the scenes' own
    """

    name = "degraded"

    def __init__(
        self,
        damage: str = "noise",
        strength: float = 0.8,
        count: int = 100,
        start: int = 0,
        seed: int = HELD_OUT,
        *,
        prompt: str | None = None,
    ) -> None:
        if damage not in DAMAGES:
            raise InputError(f"damage is {damage!r}: expected one of {', '.join(DAMAGES)}")
        unit = DAMAGES[damage]
        most = {"none": 0.0, "premise": 0.0, "occlusion": 1.0}.get(damage, 100.0)
        self.strength = checks.real("strength", strength, 0, most)
        if self.strength == 0 and most != 0:
            raise InputError(f"strength is 0: expected the {unit}; or damage 'none'")
        if damage == "premise" and prompt is not None:
            raise InputError("prompt beside damage 'premise', which asks its own: leave it out")
        self.damage = damage
        super().__init__(count, start, seed, prompt=prompt)
        self.settings = tuple(
            sorted({**dict(self.settings), "damage": damage, "strength": self.strength}.items())
        )

    def _sample(self, image_id: ImageId) -> DegradedSample:
        sample = super()._sample(image_id)
        scene, prompt, asked = sample.scene, sample.prompt, None
        if self.damage == "premise":
            asked, prompt = _premise(scene)
        gone = _covered(scene) if self.damage == "occlusion" and self.strength == 1 else None
        seen = (o for n, o in enumerate(scene.objects) if n != gone)
        own = {**vars(sample), "prompt": prompt, "asked": asked}
        return DegradedSample(
            **own,
            damage=self.damage,
            strength=self.strength,
            visible=frozenset((o.color, o.shape) for o in seen),
        )


def _premise(scene: Scene) -> tuple[str, str]:
    """A shape and the question for its color: of scenes with an even index one that is not there;
    of the others one that is there in one color, or else one that is not."""
    rng = np.random.default_rng([scene.seed, scene.index, 4])
    groups = scene.groups
    known = [s for s in SHAPES if sum(g.shape == s for g in groups) == 1]
    if scene.index % 2 and known:
        shape = str(rng.choice(known))
        count = next(g.count for g in groups if g.shape == shape)
    else:
        shape = str(rng.choice([s for s in SHAPES if all(g.shape != s for g in groups)]))
        count = 1
    noun, verb = (shape, "is") if count == 1 else (plural(shape), "are")
    return shape, f"what color {verb} the {noun} ?"
