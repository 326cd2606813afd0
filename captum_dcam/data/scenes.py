r"""Synthetic scenes with exact ground truth: coloured shapes on cluttered, textured backgrounds.

A scene is a pure function of ``(seed, index)``: the same pair gives the same pixels, masks,
captions (in four wordings) and questions on every machine. Objects are 3 to 14 patches wide on the
embedded model's 24×24 grid (192 px, patch 8), do not occlude each other, and are the only
saturated things in the image that are larger than a patch. Grey blobs, scribbles and tiny coloured
dots are distractors that no caption names. As a data set (``"scenes"``) they need no files, have
exact masks, and their words name every object.
"""

from __future__ import annotations

import colorsys
import itertools
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor

from captum_dcam import checks
from captum_dcam.data.common import (
    BaseDataset,
    ImageId,
    Ledger,
    ObjectMask,
    Sample,
    Setting,
    register_dataset,
)
from captum_dcam.errors import InputError
from captum_dcam.model.words import Target

SHAPES = ("circle", "square", "triangle", "star", "cross", "ring", "heart", "moon")
#: colour name → hue in degrees
COLORS = {
    "red": 0.0,
    "orange": 29.0,
    "yellow": 56.0,
    "green": 115.0,
    "cyan": 180.0,
    "blue": 226.0,
    "purple": 274.0,
    "pink": 322.0,
}
IMAGE_SIZE = 192
PATCH = 8
_SUPERSAMPLE = 2

# -- the language of scenes ------------------------------------------------------------------------
#
# Words are lower case and separated by blanks, so that a word-level tokenizer sees each of them.

NUMBERS = ("zero", "one", "two", "three", "four", "five", "six")
WORDINGS = ("concise", "original", "verbose", "repeated")
#: function words that the ``repeated`` wording doubles (Appendix D)
FUNCTION_WORDS = frozenset("a an and the is are there of to in".split())
PROMPTS = {
    "original": ("describe the image .", "what is in the image ?", ""),
    "concise": ("list the objects .",),
    "verbose": ("describe the image in detail .",),
}
RELATIONS = ("left", "right", "above", "below")


@dataclass(frozen=True)
class Group:
    """Equal objects of one scene: how many, and their centres (x, y) in pixels."""

    color: str
    shape: str
    count: int
    centers: tuple[tuple[float, float], ...]

    @property
    def words(self) -> str:
        """``"red circle"``, or ``"red circles"`` when there are several."""
        return f"{self.color} {self.shape if self.count == 1 else plural(self.shape)}"

    @property
    def phrase(self) -> str:
        """``"a red circle"``, ``"an orange star"``, ``"two red circles"``."""
        if self.count > 1:
            return f"{NUMBERS[self.count]} {self.words}"
        return f"{_a(self.color)} {self.words}"


def plural(shape: str) -> str:
    """Plural of a shape's name."""
    return shape + ("es" if shape.endswith("s") else "s")


#: a shape by its name, singular or plural
SHAPE_OF = {**{s: s for s in SHAPES}, **{plural(s): s for s in SHAPES}}


def _a(word: str) -> str:
    return "an" if word[0] in "aeiou" else "a"


def _join(parts: list[str]) -> str:
    """``x``, ``x and y``, ``x , y and z``."""
    return parts[0] if len(parts) == 1 else " , ".join(parts[:-1]) + " and " + parts[-1]


def repeat_function_words(text: str) -> str:
    """Every function word twice: the paper's ``repeated`` variant of a caption."""
    return " ".join(f"{w} {w}" if w in FUNCTION_WORDS else w for w in text.split())


def captions(groups: tuple[Group, ...]) -> dict[str, str]:
    """One content in four wordings; objects from left to right.

    Returns:
        dict: ``concise`` ("red circle , two blue stars"), ``original`` ("a red circle and two blue
        stars ."), ``verbose`` ("there is a red circle and there are two blue stars ."),
        ``repeated`` (``original`` with every function word doubled).
    """
    phrases = [g.phrase for g in groups]
    concise = [g.words if g.count == 1 else g.phrase for g in groups]
    verbose = [("there is " if g.count == 1 else "there are ") + g.phrase for g in groups]
    original = _join(phrases) + " ."
    return {
        "concise": " , ".join(concise),
        "original": original,
        "verbose": " and ".join(verbose) + " in the image .",
        "repeated": repeat_function_words(original),
    }


def relation(a: tuple[float, float], b: tuple[float, float]) -> str:
    """Where ``a`` lies as seen from ``b``, along the longer axis."""
    dx, dy = a[0] - b[0], a[1] - b[1]
    if abs(dx) >= abs(dy):
        return "left" if dx < 0 else "right"
    return "above" if dy < 0 else "below"


def question_bank(
    groups: tuple[Group, ...], rng: np.random.Generator
) -> tuple[tuple[str, str, str], ...]:
    """All question kinds that have one right answer in this scene.

    Kinds: ``exist`` (yes/no, as many true as false, half of the false ones near misses),
    ``color``, ``shape``, ``count``, ``relation`` (scenes of exactly two single objects).
    """
    out: list[tuple[str, str, str]] = []
    present = {(g.color, g.shape) for g in groups}
    for g in groups:
        out.append(("exist", f"is there {_a(g.color)} {g.color} {g.shape} ?", "yes"))
        color, shape = _absent(g, present, rng)
        out.append(("exist", f"is there {_a(color)} {color} {shape} ?", "no"))
        if sum(o.shape == g.shape for o in groups) == 1:
            noun, verb = (g.shape, "is") if g.count == 1 else (plural(g.shape), "are")
            out.append(("color", f"what color {verb} the {noun} ?", g.color))
        if sum(o.color == g.color for o in groups) == 1 and g.count == 1:
            out.append(("shape", f"what shape is the {g.color} object ?", g.shape))
        words = f"{g.color} {plural(g.shape)}"
        out.append(("count", f"how many {words} are there ?", NUMBERS[g.count]))
    if len(groups) == 2 and all(g.count == 1 for g in groups):
        for g, o in (groups, groups[::-1]):
            where = relation(g.centers[0], o.centers[0])
            of = "" if where in ("above", "below") else "of "
            answer = f"{where} {of}the {o.color} {o.shape} ."
            out.append(("relation", f"where is the {g.color} {g.shape} ?", answer))
    return tuple(out)


def _absent(
    group: Group, present: set[tuple[str, str]], rng: np.random.Generator
) -> tuple[str, str]:
    """A colour and shape that are not in the scene together; often only one of them differs."""
    while True:
        color, shape = str(rng.choice(tuple(COLORS))), str(rng.choice(SHAPES))
        near = rng.random()
        if near < 0.25:
            color = group.color
        elif near < 0.5:
            shape = group.shape
        if (color, shape) not in present:
            return color, shape


def vocabulary() -> list[str]:
    """Every word that captions, prompts and questions can contain, sorted."""
    words = {*COLORS, *SHAPE_OF, *NUMBERS, *RELATIONS}
    words |= set(", . ? yes no a an and the is are there of to in image".split())
    words |= set("what color shape object objects how many where list describe detail".split())
    words |= set("picture this with left right".split())
    return sorted(words)


# -- scenes ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class SceneObject:
    """One object: what it is, its centre (x, y in pixels), its width, and its pixel mask."""

    shape: str
    color: str
    center: tuple[float, float]
    width: float
    angle: float
    mask: np.ndarray = field(repr=False)

    @property
    def category(self) -> str:
        """The COCO category: colour and shape, e.g. ``"red circle"``."""
        return f"{self.color} {self.shape}"


@dataclass(frozen=True)
class Scene:
    """An image (H, W, 3 uint8), its objects, and the text that belongs to it."""

    seed: int
    index: int
    pixels: np.ndarray = field(repr=False)
    objects: tuple[SceneObject, ...]

    @property
    def image(self) -> Image.Image:
        return Image.fromarray(self.pixels)

    @cached_property
    def groups(self) -> tuple[Group, ...]:
        """Equal objects together, ordered by the centre of their leftmost member."""
        found: dict[tuple[str, str], list[SceneObject]] = {}
        for item in sorted(self.objects, key=lambda o: o.center[0]):
            found.setdefault((item.color, item.shape), []).append(item)
        return tuple(
            Group(color, shape, len(items), tuple(o.center for o in items))
            for (color, shape), items in found.items()
        )

    @cached_property
    def captions(self) -> dict[str, str]:
        """Four wordings of the same content: concise, original, verbose, repeated (Appendix D)."""
        return captions(self.groups)

    @cached_property
    def questions(self) -> tuple[tuple[str, str, str], ...]:
        """``(kind, question, answer)`` triples; all that hold for this scene, in a fixed order."""
        rng = np.random.default_rng([self.seed, self.index, 1])
        return question_bank(self.groups, rng)

    def mask_of(self, color: str | None = None, shape: str | None = None) -> np.ndarray:
        """Union mask (H, W) bool of the objects with this colour and shape (None: any)."""
        out = np.zeros(self.pixels.shape[:2], dtype=bool)
        for item in self.objects:
            if color in (None, item.color) and shape in (None, item.shape):
                out |= item.mask
        return out


def _star_radius(theta: np.ndarray) -> np.ndarray:
    """Boundary radius of a five-pointed star (outer 1, inner 0.45) at polar angle theta."""
    half = math.pi / 5
    t = np.abs((theta + math.pi / 2) % (2 * half) - half)  # 0 at a notch, half at a tip
    inner = 0.45
    tip = np.array([math.cos(half), math.sin(half)])
    notch = np.array([inner, 0.0])
    edge = tip - notch
    # ray (cos t, sin t)·r meets the edge from notch to tip
    return (notch[0] * edge[1]) / (np.cos(t) * edge[1] - np.sin(t) * edge[0])


def shape_mask(shape: str, u: np.ndarray, v: np.ndarray) -> np.ndarray:
    """Inside test of a unit shape at coordinates u (right) and v (down), both about [-1, 1]."""
    r2 = u * u + v * v
    if shape == "circle":
        return r2 <= 1
    if shape == "ring":
        return (r2 <= 1) & (r2 >= 0.55**2)
    if shape == "square":
        return np.maximum(np.abs(u), np.abs(v)) <= 0.86
    if shape == "triangle":
        return (v <= 0.75) & (v >= -1 + np.abs(u) * 1.75)
    if shape == "star":
        return np.sqrt(r2) <= _star_radius(np.arctan2(v, u))
    if shape == "cross":
        a, b = np.abs(u), np.abs(v)
        return ((a <= 0.3) & (b <= 1)) | ((b <= 0.3) & (a <= 1))
    if shape == "heart":
        x, y = u * 1.15, -v * 1.15 + 0.12
        return (x * x + y * y - 1) ** 3 - x * x * y**3 <= 0
    if shape == "moon":
        return (r2 <= 1) & ((u - 0.5) ** 2 + v * v >= 0.75**2)
    raise InputError(f"unknown shape {shape!r}: expected one of {SHAPES}")


def _coverage(shape: str, cx: float, cy: float, width: float, angle: float, size: int) -> tuple:
    """Anti-aliased coverage in [0, 1] of a shape inside its bounding box: (y0, x0, coverage)."""
    radius = width / 2
    x0, y0 = max(int(cx - radius) - 1, 0), max(int(cy - radius) - 1, 0)
    x1, y1 = min(int(cx + radius) + 2, size), min(int(cy + radius) + 2, size)
    k = _SUPERSAMPLE
    xs = (np.arange((x1 - x0) * k, dtype=np.float32) + 0.5) / k + x0 - cx
    ys = (np.arange((y1 - y0) * k, dtype=np.float32) + 0.5) / k + y0 - cy
    gx, gy = np.meshgrid(xs / radius, ys / radius)
    cos, sin = math.cos(angle), math.sin(angle)
    inside = shape_mask(shape, cos * gx + sin * gy, -sin * gx + cos * gy)
    return y0, x0, inside.reshape(y1 - y0, k, x1 - x0, k).mean((1, 3), dtype=np.float32)


def _smooth_noise(rng: np.random.Generator, cells: int, size: int) -> np.ndarray:
    """Noise in [-1, 1] of ``cells`` bumps per side, smoothly enlarged to (size, size)."""
    small = (rng.random((cells, cells), dtype=np.float32) * 255).astype(np.uint8)
    big = Image.fromarray(small).resize((size, size), Image.Resampling.BICUBIC)
    return np.asarray(big, dtype=np.float32) / 127.5 - 1


def _background(rng: np.random.Generator, size: int) -> np.ndarray:
    """A dull textured background (size, size, 3) float32 in [0, 1] with grey clutter on it."""
    value, sat, hue = rng.uniform(0.15, 0.9), rng.uniform(0, 0.14), rng.random()
    base = np.array(colorsys.hsv_to_rgb(hue, sat, value), dtype=np.float32)
    texture = 0.10 * _smooth_noise(rng, int(rng.integers(3, 9)), size)
    kind = rng.integers(4)
    axis = np.arange(size, dtype=np.float32)
    if kind == 0:  # stripes
        a, period = rng.uniform(0, math.pi), rng.uniform(8, 40)
        wave = axis[None, :] * math.cos(a) + axis[:, None] * math.sin(a)
        texture += 0.07 * np.sin(wave * (2 * math.pi / period))
    elif kind == 1:  # checkers
        period = rng.uniform(10, 32)
        tile = (axis // period).astype(int)
        texture += 0.05 * ((tile[:, None] + tile[None, :]) % 2 * 2 - 1)
    elif kind == 2:  # fine weave
        texture += 0.10 * _smooth_noise(rng, 48, size)
    canvas = base + texture[..., None]
    canvas += rng.normal(0, 0.02, (size, size, 1)).astype(np.float32)
    layer = Image.fromarray((canvas.clip(0, 1) * 255).astype(np.uint8))
    _clutter(rng, ImageDraw.Draw(layer), size)
    return np.asarray(layer, dtype=np.float32) / 255


def _clutter(rng: np.random.Generator, draw: ImageDraw.ImageDraw, size: int) -> None:
    """Grey scribbles and irregular blobs, and coloured dots smaller than a patch."""
    for _ in range(rng.integers(0, 7)):
        g = int(rng.integers(30, 226))
        x, y = rng.uniform(0, size, 2)
        dx, dy = rng.normal(0, 28, 2)
        draw.line((x, y, x + dx, y + dy), fill=(g, g, g), width=int(rng.integers(1, 4)))
    for _ in range(rng.integers(0, 4)):
        g = int(rng.integers(40, 216))
        x, y = rng.uniform(0, size, 2)
        angles = np.sort(rng.uniform(0, 2 * math.pi, 6))
        radii = rng.uniform(4, 22) * rng.uniform(0.5, 1, 6)
        points = [
            (x + r * math.cos(a), y + r * math.sin(a)) for a, r in zip(angles, radii, strict=True)
        ]
        draw.polygon(points, fill=(g, g, g))
    for _ in range(rng.integers(0, 9)):
        rgb = colorsys.hsv_to_rgb(rng.random(), rng.uniform(0.5, 1), rng.uniform(0.5, 1))
        x, y = rng.uniform(0, size, 2)
        r = rng.uniform(0.8, 2.6)
        draw.ellipse((x - r, y - r, x + r, y + r), fill=tuple(int(c * 255) for c in rgb))


def _paint(rng: np.random.Generator, color: str, like: np.ndarray) -> np.ndarray:
    """Object colour with jitter and shading, (h, w, 3), for a box of ``like``'s size."""
    hue = (COLORS[color] + rng.uniform(-6, 6)) / 360 % 1
    rgb = colorsys.hsv_to_rgb(hue, rng.uniform(0.72, 1.0), rng.uniform(0.72, 1.0))
    h, w = like.shape
    slope = rng.uniform(-0.14, 0.14, 2).astype(np.float32)
    shade = 1 + slope[0] * np.linspace(-1, 1, h, dtype=np.float32)[:, None]
    shade = shade + slope[1] * np.linspace(-1, 1, w, dtype=np.float32)[None]
    shade += rng.normal(0, 0.03, (h, w)).astype(np.float32)
    return np.array(rgb, dtype=np.float32) * shade[..., None]


def _count(rng: np.random.Generator, most: int) -> int:
    """How many objects a scene gets. Up to four the draw is the same for all ``most``, so that
    scenes stay what they were before there could be more."""
    if most <= 4:
        return min(most, 1 + int(rng.choice(4, p=(0.15, 0.3, 0.3, 0.25))))
    odds = np.array((0.1, 0.15, 0.2, 0.2, 0.2, 0.15))[:most]
    return 1 + int(rng.choice(most, p=odds / odds.sum()))


def _place(rng: np.random.Generator, size: int, max_objects: int) -> list[tuple]:
    """Kinds, centres and widths of 1..max_objects objects that do not touch one another.

    Centres differ by at least 12 px in x, so that "from left to right" is always clear.
    """
    kinds: list[tuple[str, str]] = []
    for _ in range(_count(rng, max_objects)):
        if kinds and rng.random() < 0.22 and kinds.count(kinds[0]) < 3:
            kinds.append(kinds[0])  # a repeated object
        else:
            kinds.append((str(rng.choice(tuple(COLORS))), str(rng.choice(SHAPES))))
    low, high = 3 * PATCH, 14 * PATCH * min(1.0, 1.75 / len(kinds) ** 0.5 / 1.25)
    placed: list[tuple] = []
    for color, shape in kinds:
        width = math.exp(rng.uniform(math.log(low), math.log(high)))
        for _ in range(40):
            r = width / 2 * 1.06 + 1  # corners of a rotated square stay inside
            cx, cy = rng.uniform(r, size - r, 2)
            clear = all(
                math.hypot(cx - x, cy - y) > r + w / 2 * 1.06 + 3 and abs(cx - x) >= 12
                for _, _, x, y, w in placed
            )
            if clear:
                placed.append((color, shape, float(cx), float(cy), width))
                break
            width = max(low, width * 0.95)
    return placed


def make_scene(seed: int, index: int, *, size: int = IMAGE_SIZE, max_objects: int = 4) -> Scene:
    r"""Draw scene ``index`` of the stream ``seed``.

    Args:
        seed (int): which stream of scenes; splits use different seeds.
        index (int): position in the stream.
        size (int, optional): side of the square image in pixels. Default: 192
        max_objects (int, optional): largest number of objects, 1 to 6; where there is no room for
            one, it is left out. Default: 4

    Returns:
        Scene: pixels (size, size, 3) uint8, objects with masks (size, size) bool.

    Raises:
        ValueError: ``max_objects`` or ``size`` out of range.
    """
    if not 1 <= max_objects <= 6:
        raise InputError(f"max_objects is {max_objects}: expected 1 to 6")
    if size < 128:
        raise InputError(f"size is {size} px: at least 128 are needed to place objects apart")
    rng = np.random.default_rng([seed, index])
    canvas = _background(rng, size)
    objects = []
    for color, shape, cx, cy, width in _place(rng, size, max_objects):
        angle = float(rng.uniform(-0.3, 0.3))
        y0, x0, cover = _coverage(shape, cx, cy, width, angle, size)
        h, w = cover.shape
        box = canvas[y0 : y0 + h, x0 : x0 + w]
        box += cover[..., None] * (_paint(rng, color, cover) - box)
        mask = np.zeros((size, size), dtype=bool)
        mask[y0 : y0 + h, x0 : x0 + w] = cover >= 0.5
        objects.append(SceneObject(shape, color, (cx, cy), width, angle, mask))
    pixels = (canvas.clip(0, 1) * 255).round().astype(np.uint8)
    return Scene(seed, index, pixels, tuple(objects))


def scene_stream(seed: int, start: int = 0, stop: int | None = None) -> Iterator[Scene]:
    """Scenes ``start, start + 1, …`` of a stream, without end when ``stop`` is None."""
    indices: Iterable[int] = itertools.count(start) if stop is None else range(start, stop)
    return (make_scene(seed, index) for index in indices)


def named_object(token_texts: Sequence[str], target: Target) -> tuple[str | None, str | None]:
    r"""Colour and shape of the object that a word of an answer names.

    A noun takes the colour word before it (``circle`` in "a red circle" is the red one), and a
    colour word the noun after it. ``(None, None)`` where the word names no object.

    Args:
        token_texts (sequence of str): text of every token of the answer.
        target (Target): the word.
    """
    words = [text.strip().lower() for text in token_texts]
    own = target.positions
    inside = [words[p] for p in own]
    color = next((w for w in inside if w in COLORS), None)
    shape = next((SHAPE_OF[w] for w in inside if w in SHAPE_OF), None)
    before = words[own[0] - 1] if own[0] > 0 else ""
    after = words[own[-1] + 1] if own[-1] + 1 < len(words) else ""
    if color is None and shape is not None and before in COLORS:
        color = before
    if shape is None and color is not None:
        shape = SHAPE_OF.get(after)
    return color, shape


def scene_mask(scene: Scene, token_texts: Sequence[str], target: Target) -> Tensor | None:
    """Mask (H, W) bool of what a word names; None if it names no object of the scene."""
    color, shape = named_object(token_texts, target)
    if color is None and shape is None:
        return None
    mask = torch.from_numpy(scene.mask_of(color, shape))
    return mask if bool(mask.any()) else None


# -- as a data set ---------------------------------------------------------------------------------

#: the stream of scenes that the embedded model has never seen in training
HELD_OUT = 2_000_003


@dataclass(frozen=True, eq=False, kw_only=True)
class SceneSample(Sample):
    r"""A scene; its objects are kinds such as "red circle". Objects of a kind share one mask."""

    scene: Scene = field(repr=False)

    def image(self) -> Image.Image:
        return self.scene.image


def said(color: str, shape: str) -> tuple[str, ...]:
    r"""Ways to name an object: with its colour, by its shape, by its colour alone."""
    return (f"{color} {shape}", f"{color} {plural(shape)}", plural(shape), shape, color)


@register_dataset("scenes")
class SceneDataset(BaseDataset[SceneSample]):
    r"""Scenes ``start`` to ``start + count - 1`` of a stream; an id is a scene's index.

    ``captions`` is the scene's text in the chosen wording, ``extra`` holds all of them under
    ``captions`` and the questions under ``questions``.

    Args:
        count (int): how many. Default: 100
        start (int): the first one's index.
        seed (int): which stream. Default: the held-out one
        size (int): side of the images in pixels.
        max_objects (int): largest number of objects per scene.
        wording (str): ``original``, ``concise`` or ``verbose``: of captions and prompt.
        prompt (str): Default: the wording's
    """

    name = "scenes"
    kind = "category"

    def __init__(
        self,
        count: int = 100,
        start: int = 0,
        seed: int = HELD_OUT,
        *,
        size: int = IMAGE_SIZE,
        max_objects: int = 4,
        wording: str = "original",
        prompt: str | None = None,
    ) -> None:
        count, start = checks.whole("count", count), checks.whole("start", start, 0)
        seed = checks.whole("seed", seed, 0)
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
                    partial(scene.mask_of, group.color, group.shape),
                )
                for group in scene.groups
            ),
            extra={"captions": dict(scene.captions), "questions": list(scene.questions)},
            scene=scene,
        )
