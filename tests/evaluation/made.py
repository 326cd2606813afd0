"""Pictures with masks in memory, tiny plans, and what tests of this folder share."""

from dataclasses import dataclass, field, replace

import numpy as np
import tiny

from captum_dcam.evaluation import Plan, Variant
from captum_dcam.evaluation.store import Store

#: what the pictures show; their captions name two of these
NAMES = ("circle", "square", "triangle", "star", "ring", "heart", "moon", "object", "image")
REFINED = ("min_max", "dacg", "sicd")


@dataclass
class Thing:
    name: str
    seed: int
    size: tuple = (60, 80)
    names: tuple = ()

    def __post_init__(self):
        self.names = (self.name, self.name + "s")

    def mask(self):
        found = np.zeros(self.size, dtype=bool)
        g = np.random.default_rng(self.seed)
        y, x = int(g.integers(0, 40)), int(g.integers(0, 50))
        height, width = g.integers((12, 15), (21, 31))  # no two masks are equally large
        found[y : y + height, x : x + width] = True
        return found


@dataclass
class Sample:
    image_id: object
    prompt: str | None = tiny.PROMPT
    extra: dict = field(default_factory=lambda: {"captions": {"concise": "red circle , star"}})

    def image(self):
        return tiny.picture(int(self.image_id))

    @property
    def captions(self):
        first, second = NAMES[self.image_id % 7], NAMES[(self.image_id + 3) % 7]
        return [f"a red {first} and a {second} ."]

    @property
    def objects(self):
        return [Thing(name, 100 * self.image_id + i) for i, name in enumerate(NAMES)]


class Damaged(Sample):
    def image(self):
        raise OSError(f"image {self.image_id} is damaged: fetch it again")


class Pictures:
    """A data set; images in ``bad`` are damaged."""

    def __init__(self, count, bad=(), first=0):
        self.ids, self.bad = tuple(range(first, first + count)), set(bad)

    def sample(self, image_id):
        return (Damaged if image_id in self.bad else Sample)(image_id)

    def describe(self):
        return {"name": "made", "images": len(self.ids)}


def plan(**changes):
    own = Plan(
        (
            Variant("base", "diffusion_cam", {"refined": False}),
            Variant("refined", "diffusion_cam", {"refined": False}, refinements=REFINED),
            "oracle",
            "random",
            "center_blob",
        ),
        metrics=("localization", "plausibility", "pointing"),
        answer="caption",
        generation={"gen_length": 4},
    )
    return replace(own, **changes)


def adapter(cache="prefix"):
    return tiny.adapter(cache)


def results(folder):
    return (Store.read(folder).folder / "results.jsonl").read_bytes()
