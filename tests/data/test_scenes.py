"""Scenes: a function of (seed, index), with exact masks, true captions and true answers."""

import hashlib
import re
from collections import Counter
from itertools import pairwise

import numpy as np
import pytest
from PIL import Image

from captum_dcam.data.scenes import (
    COLORS,
    FUNCTION_WORDS,
    NUMBERS,
    PATCH,
    SHAPES,
    Group,
    captions,
    make_scene,
    plural,
    relation,
    repeat_function_words,
    scene_stream,
    shape_mask,
)

SCENES = [make_scene(5, i) for i in range(120)]
SINGULAR = {**{s: s for s in SHAPES}, **{plural(s): s for s in SHAPES}}


def truth(scene):
    return Counter((o.color, o.shape) for o in scene.objects)


def test_the_same_pair_gives_the_same_bits():
    one, two = make_scene(5, 7), make_scene(5, 7)
    assert one.pixels.tobytes() == two.pixels.tobytes() and one.pixels.dtype == np.uint8
    assert one.captions == two.captions and one.questions == two.questions
    for a, b in zip(one.objects, two.objects, strict=True):
        assert np.array_equal(a.mask, b.mask) and a.center == b.center
    pictures = {hashlib.sha256(s.pixels.tobytes()).digest() for s in SCENES}
    assert len(pictures) == len(SCENES)
    assert not np.array_equal(make_scene(6, 7).pixels, one.pixels)
    assert [s.index for s in scene_stream(5, 3, 6)] == [3, 4, 5]
    assert isinstance(one.image, Image.Image) and one.image.size == (192, 192)


def test_masks_are_disjoint_and_objects_have_their_size():
    for scene in SCENES:
        masks = np.stack([o.mask for o in scene.objects])
        assert masks.sum(0).max() == 1
        assert 1 <= len(masks) <= 4
        for item in scene.objects:
            assert 3 * PATCH - 1e-9 <= item.width <= 14 * PATCH + 1e-9
            ys, xs = np.nonzero(item.mask)
            assert 0 < ys.min() and ys.max() < 191 and 0 < xs.min() and xs.max() < 191
            for at, low, high in zip(
                item.center, (xs.min(), ys.min()), (xs.max(), ys.max()), strict=True
            ):
                assert low - 1 <= at <= high + 1
                assert high - low + 1 <= item.width * 1.3 + 2
        everything = np.zeros_like(masks[0])
        for color, shape in truth(scene):
            chosen = [o.mask for o in scene.objects if (o.color, o.shape) == (color, shape)]
            assert np.array_equal(scene.mask_of(color, shape), np.logical_or.reduce(chosen))
            everything |= scene.mask_of(color)
        assert np.array_equal(everything, scene.mask_of())
        xs = sorted(o.center[0] for o in scene.objects)
        assert all(b - a >= 12 for a, b in pairwise(xs))


def test_objects_have_their_colour_and_the_rest_is_dull():
    for scene in SCENES[:40]:
        hsv = np.asarray(scene.image.convert("HSV")).astype(float)
        hue, saturation = hsv[..., 0] * 360 / 255, hsv[..., 1]
        for item in scene.objects:
            off = (hue[item.mask] - COLORS[item.color] + 180) % 360 - 180
            assert abs(np.median(off)) < 12
            assert np.median(saturation[item.mask]) > 140
        assert np.median(saturation[~scene.mask_of()]) < 100


@pytest.mark.parametrize("shape", SHAPES)
def test_every_shape_is_a_shape(shape):
    axis = (np.arange(200) + 0.5) / 100 - 1
    inside = shape_mask(shape, *np.meshgrid(axis, axis))
    share = inside.mean()
    expected = {
        "circle": np.pi / 4,
        "ring": np.pi / 4 * (1 - 0.55**2),
        "square": 0.86**2,
        "cross": (2 * 0.6 * 2 - 0.36) / 4,
        "triangle": 1.75**2 / 1.75 / 4,
    }
    if shape in expected:
        assert share == pytest.approx(expected[shape], abs=0.01)
    assert 0.15 < share < 0.8
    assert np.array_equal(inside, inside[:, ::-1]) == (shape != "moon")
    with pytest.raises(ValueError, match="unknown shape 'blob'"):
        shape_mask("blob", axis, axis)


def spoken(text):
    """Objects that a caption names, counted by its number words: a parser of our own."""
    found = Counter()
    for phrase in re.split(r" , | and | \.", text):
        words = phrase.replace("there is ", "").replace("there are ", "")
        words = words.replace(" in the image", "").split()
        if words:
            *number, color, shape = words
            count = {"a": 1, "an": 1}.get(number[0]) if number else 1
            found[color, SINGULAR[shape]] += count or NUMBERS.index(number[0])
    return found


def test_captions_name_exactly_the_objects():
    for scene in SCENES:
        for wording in ("original", "concise", "verbose"):
            assert spoken(scene.captions[wording]) == truth(scene), scene.captions[wording]
        first = {}
        for item in sorted(scene.objects, key=lambda o: o.center[0]):
            first.setdefault((item.color, item.shape))
        assert list(spoken(scene.captions["original"])) == list(first)  # from left to right


def test_repeated_wording_doubles_function_words_alone():
    for scene in SCENES:
        words = scene.captions["repeated"].split()
        kept, at = [], 0
        while at < len(words):
            kept.append(words[at])
            if words[at] in FUNCTION_WORDS:
                assert words[at + 1] == words[at]
                at += 1
            at += 1
        assert " ".join(kept) == scene.captions["original"]
    assert repeat_function_words("a red circle") == "a a red circle"


def test_forms_of_language():
    groups = (
        Group("red", "circle", 1, ((0.0, 0.0),)),
        Group("orange", "star", 1, ((1.0, 0.0),)),
        Group("blue", "cross", 2, ((2.0, 0.0), (3.0, 0.0))),
    )
    assert captions(groups) == {
        "concise": "red circle , orange star , two blue crosses",
        "original": "a red circle , an orange star and two blue crosses .",
        "verbose": "there is a red circle and there is an orange star and there are two blue "
        "crosses in the image .",
        "repeated": "a a red circle , an an orange star and and two blue crosses .",
    }
    assert captions(groups[:1])["original"] == "a red circle ."
    assert captions(groups[:2])["original"] == "a red circle and an orange star ."
    assert plural("cross") == "crosses" and plural("moon") == "moons"
    assert relation((0, 0), (9, 5)) == "left" and relation((9, 5), (0, 0)) == "right"
    assert relation((0, 0), (5, 9)) == "above" and relation((5, 9), (0, 0)) == "below"


def answer(scene, question):
    """The right answer, worked out from the objects and the words of the question alone."""
    objects, words = scene.objects, question.rstrip(" ?").split()
    colors = [w for w in words if w in COLORS]
    shapes = [SINGULAR[w] for w in words if w in SINGULAR]
    if question.startswith("is there"):
        assert words[2] == ("an" if words[3][0] in "aeiou" else "a")
        return "yes" if (colors[0], shapes[0]) in truth(scene) else "no"
    if question.startswith("how many"):
        return NUMBERS[truth(scene)[colors[0], shapes[0]]]
    if question.startswith("what color"):
        (found,) = {o.color for o in objects if o.shape == shapes[0]}
        several = sum(o.shape == shapes[0] for o in objects) > 1
        assert (words[2], words[-1]) == (
            ("are", plural(shapes[0])) if several else ("is", shapes[0])
        )
        return found
    if question.startswith("what shape"):
        (found,) = [o.shape for o in objects if o.color == colors[0]]
        return found
    assert question.startswith("where is the") and len(objects) == 2
    me, other = sorted(objects, key=lambda o: (o.color, o.shape) != (colors[0], shapes[0]))
    dx, dy = (a - b for a, b in zip(me.center, other.center, strict=True))
    if abs(dx) >= abs(dy):
        where = "left of" if dx < 0 else "right of"
    else:
        where = "above" if dy < 0 else "below"
    return f"{where} the {other.color} {other.shape} ."


def test_questions_have_the_right_answers():
    kinds, replies = Counter(), Counter()
    for scene in SCENES:
        assert len({q for _, q, _ in scene.questions}) >= len(scene.groups)
        for kind, question, given in scene.questions:
            assert answer(scene, question) == given, (question, scene.captions["original"])
            kinds[kind] += 1
            if kind == "exist":
                replies[given] += 1
    assert set(kinds) == {"exist", "color", "shape", "count", "relation"}
    assert replies["yes"] == replies["no"]


def test_sizes_and_numbers_of_objects():
    assert make_scene(1, 1, size=256).pixels.shape == (256, 256, 3)
    assert all(len(make_scene(1, i, max_objects=1).objects) == 1 for i in range(5))
    for most in (5, 6):
        counts = [len(make_scene(1, i, max_objects=most).objects) for i in range(40)]
        assert max(counts) == most and min(counts) == 1 and counts.count(most) >= 4
    for bad in ({"max_objects": 0}, {"max_objects": 7}, {"size": 100}):
        with pytest.raises(ValueError, match=r"expected|needed"):
            make_scene(1, 1, **bad)
