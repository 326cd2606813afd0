r"""The language of the synthetic scenes: captions in four wordings, questions with answers.

Words are lower case and separated by blanks, so that a word-level tokenizer sees each of them.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

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
        return f"{'an' if self.color[0] in 'aeiou' else 'a'} {self.words}"


def plural(shape: str) -> str:
    """Plural of a shape's name."""
    return shape + ("es" if shape.endswith("s") else "s")


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
    groups: tuple[Group, ...],
    rng: np.random.Generator,
    colors: tuple[str, ...],
    shapes: tuple[str, ...],
) -> tuple[tuple[str, str, str], ...]:
    """All question kinds that have one right answer in this scene.

    Kinds: ``exist`` (yes/no, as many true as false, half of the false ones near misses),
    ``color``, ``shape``, ``count``, ``relation`` (scenes of exactly two single objects).
    """
    out: list[tuple[str, str, str]] = []
    present = {(g.color, g.shape) for g in groups}
    for g in groups:
        out.append(("exist", f"is there {_a(g.color)} {g.color} {g.shape} ?", "yes"))
        color, shape = _absent(g, present, rng, colors, shapes)
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


def _a(word: str) -> str:
    return "an" if word[0] in "aeiou" else "a"


def _absent(
    group: Group,
    present: set[tuple[str, str]],
    rng: np.random.Generator,
    colors: tuple[str, ...],
    shapes: tuple[str, ...],
) -> tuple[str, str]:
    """A colour and shape that are not in the scene together; often only one of them differs."""
    while True:
        color, shape = str(rng.choice(colors)), str(rng.choice(shapes))
        near = rng.random()
        if near < 0.25:
            color = group.color
        elif near < 0.5:
            shape = group.shape
        if (color, shape) not in present:
            return color, shape


def vocabulary(colors: tuple[str, ...], shapes: tuple[str, ...]) -> list[str]:
    """Every word that captions, prompts and questions can contain, sorted."""
    words = set(colors) | set(shapes) | {plural(s) for s in shapes} | set(NUMBERS) | set(RELATIONS)
    words |= set(", . ? yes no a an and the is are there of to in image".split())
    words |= set("what color shape object objects how many where list describe detail".split())
    words |= set("picture this with left right".split())
    return sorted(words)
