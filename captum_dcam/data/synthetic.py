r"""The embedded scenes as a data set: no files, exact masks, words that name every object."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial

from PIL import Image

from captum_dcam.data.common import (
    BaseDataset,
    ImageId,
    Ledger,
    Mask,
    ObjectMask,
    Sample,
    Setting,
)
from captum_dcam.data.language import PROMPTS, plural
from captum_dcam.data.registry import register_dataset
from captum_dcam.data.scenes import IMAGE_SIZE, Scene, make_scene
from captum_dcam.errors import InputError

#: the stream of scenes that the embedded model has never seen in training
HELD_OUT = 2_000_003


@dataclass(frozen=True, eq=False, kw_only=True)
class SceneSample(Sample):
    r"""A scene; its objects are kinds such as "red circle", equal ones together."""

    scene: Scene = field(repr=False)

    def image(self) -> Image.Image:
        return self.scene.image


def said(color: str, shape: str) -> tuple[str, ...]:
    r"""Ways to name an object: with its colour, by its shape, by its colour alone."""
    return (f"{color} {shape}", f"{color} {plural(shape)}", plural(shape), shape, color)


def _mask(scene: Scene, color: str, shape: str) -> Mask:
    return scene.mask_of(color, shape)


class SceneDataset(BaseDataset[SceneSample]):
    r"""Scenes ``start`` to ``start + count - 1`` of a stream; an id is a scene's index.

    ``captions`` is the scene's text in the chosen wording, ``extra`` holds all of them under
    ``captions`` and the questions under ``questions``.

    Args:
        count (int): how many.
        start (int): the first one's index.
        seed (int): which stream. Default: the held-out one
        size (int): side of the pictures in pixels.
        max_objects (int): at most so many objects.
        wording (str): ``original``, ``concise`` or ``verbose``: of captions and prompt.
        prompt (str): Default: the wording's
    """

    name = "scenes"
    kind = "category"

    def __init__(
        self,
        count: int,
        start: int = 0,
        seed: int = HELD_OUT,
        *,
        size: int = IMAGE_SIZE,
        max_objects: int = 4,
        wording: str = "original",
        prompt: str | None = None,
    ) -> None:
        for what, value, least in (("count", count, 1), ("start", start, 0), ("seed", seed, 0)):
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise InputError(f"{what} is {value!r}: expected a whole number from {least} on")
        if wording not in PROMPTS:
            raise InputError(f"wording is {wording!r}: expected one of {', '.join(PROMPTS)}")
        self.seed, self.size, self.max_objects = seed, size, max_objects
        self.wording = wording
        self._prompt = PROMPTS[wording][0] if prompt is None else prompt
        make_scene(seed, start, size=size, max_objects=max_objects)  # refuses bad values now
        settings: dict[str, Setting] = {
            "seed": seed,
            "size": size,
            "max_objects": max_objects,
            "wording": wording,
            "prompt": self._prompt,
        }
        super().__init__(range(start, start + count), Ledger("raise"), settings)

    def _sample(self, image_id: ImageId) -> SceneSample:
        scene = make_scene(self.seed, int(image_id), size=self.size, max_objects=self.max_objects)
        return SceneSample(
            image_id=image_id,
            path=None,
            height=self.size,
            width=self.size,
            captions=[scene.captions[self.wording]],
            prompt=self._prompt,
            objects=tuple(
                ObjectMask(
                    f"{group.color} {group.shape}",
                    said(group.color, group.shape),
                    partial(_mask, scene, group.color, group.shape),
                )
                for group in scene.groups
            ),
            extra={"captions": dict(scene.captions), "questions": list(scene.questions)},
            scene=scene,
        )


@register_dataset("scenes")
def open_scenes(
    count: int = 100,
    start: int = 0,
    seed: int = HELD_OUT,
    *,
    size: int = IMAGE_SIZE,
    max_objects: int = 4,
    wording: str = "original",
    prompt: str | None = None,
) -> SceneDataset:
    r"""The embedded model's scenes; see :class:`SceneDataset`."""
    return SceneDataset(
        count, start, seed, size=size, max_objects=max_objects, wording=wording, prompt=prompt
    )
