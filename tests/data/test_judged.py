"""Which words of an answer a data set calls true: damaged scenes, COCO, RePOPE, HalLoc, spans."""

import numpy as np
import pytest

from captum_dcam.data import dataset
from captum_dcam.data.coco_words import CATEGORY_OF, named_categories
from captum_dcam.data.common import Sample, Span
from captum_dcam.data.halloc import HallocSample
from captum_dcam.data.scenes import COLORS, SHAPES, make_scene
from captum_dcam.data.spans import SpanSample


def labels(spans):
    return {span.text: span.label for span in spans}


def degraded(damage, strength=0.0, **more):
    return dataset("degraded", damage=damage, strength=strength, count=6, **more)


@pytest.mark.parametrize(
    ("damage", "strength"), [("noise", 0.8), ("blur", 4), ("occlusion", 0.5), ("occlusion", 1)]
)
def test_damaged_scenes_keep_their_objects_and_nothing_else(damage, strength):
    data, clean = degraded(damage, strength), dataset("scenes", count=6)
    for sample, plain in zip(data, clean, strict=True):
        image, other = np.asarray(sample.image()), np.asarray(plain.image())
        assert (image != other).any() and image.shape == other.shape
        assert np.array_equal(image, np.asarray(data.sample(sample.image_id).image()))
        every = {(o.color, o.shape) for o in plain.scene.objects}
        gone = every - sample.visible
        assert len(gone) == (1 if strength == 1 and damage == "occlusion" else 0) or len(
            plain.scene.objects
        ) > len(every)
        color, shape = sorted(every)[0]
        absent = next(s for s in SHAPES if all(s != o for _, o in every))
        found = labels(sample.judged(f"a {color} {shape} and two {color} {absent}s ."))
        assert found[f"{color} {absent}s"] == "invented"
        assert found[f"{color} {shape}"] == ("invented" if (color, shape) in gone else "true")


def test_a_sign_parts_a_colour_from_a_shape():
    sample = degraded("none").sample(0)
    assert [s.text for s in sample.judged("red , circle red\ncircle")] == [
        "red", "circle", "red\ncircle",
    ]  # fmt: skip


def test_noise_has_its_standard_deviation():
    sample = degraded("noise", 0.2).sample(0)
    grey = make_scene(sample.scene.seed, 0).pixels.astype(float)
    away = np.asarray(sample.image()).astype(float) - grey
    inside = (grey > 90) & (grey < 165)  # far from the ends, where nothing is clipped
    assert away[inside].std() == pytest.approx(0.2 * 127.5, rel=0.05)


def test_a_question_with_a_false_premise_has_no_true_answer():
    for sample in degraded("premise"):
        shapes = {o.shape for o in sample.scene.objects}
        there = {o.color for o in sample.scene.objects if o.shape == sample.asked}
        assert sample.asked.rstrip("s") in sample.prompt and "what color" in sample.prompt
        if sample.image_id % 2 == 0:
            assert sample.asked not in shapes
        for color in COLORS:
            expected = "true" if color in there else "invented"
            assert labels(sample.judged(f"{color} .")) == {color: expected}


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"damage": "fog"}, "expected one of none, noise"),
        ({"damage": "noise", "strength": 0}, "strength is 0: expected the standard deviation"),
        ({"damage": "occlusion", "strength": 2}, "at most 1"),
        ({"damage": "premise", "strength": 0, "prompt": "why ?"}, "asks its own"),
    ],
)
def test_errors_teach(settings, says):
    with pytest.raises(ValueError, match=says):
        dataset("degraded", **settings)


def test_coco_names_are_found_in_all_their_forms():
    assert len(set(CATEGORY_OF.values())) == 80
    text = "Two dogs and a man eat a hot dog on a dining table near a red stop sign."
    found = [(text[a:b], c) for a, b, c in named_categories(text)]
    assert found == [
        ("dogs", "dog"),
        ("man", "person"),
        ("hot dog", "hot dog"),
        ("dining table", "dining table"),
        ("stop sign", "stop sign"),
    ]
    assert named_categories("a view over train tracks at night") == []


def sample(kind=SpanSample, **given):
    own = {"image_id": 1, "path": None, "height": 8, "width": 8, "captions": [], "prompt": None}
    return kind(**own, objects=(), **given)


@pytest.mark.parametrize(
    ("label", "answer", "expected"),
    [
        ("true", "Yes, there is.", {"Yes": "true"}),
        ("true", "No.", {"No": "invented"}),
        ("invented", "yes", {"yes": "invented"}),
        ("invented", "No, nothing.", {"No": "true"}),
        ("true", "Perhaps.", {}),
    ],
)
def test_an_answer_to_a_question_is_true_where_it_is_right(label, answer, expected):
    asked = sample(text="Is there a car in the image?", spans=(Span(11, 14, "car", label),))
    assert labels(asked.judged(answer)) == expected


def test_texts_of_the_data_set_carry_their_spans():
    text = "A red dog sleeps on grass"
    spans = (Span(2, 5, "red", "invented"), Span(20, 25, "grass", None))
    given = sample(text=text, spans=spans).judged
    with pytest.raises(ValueError, match="no span has a label"):
        sample(text=text, spans=spans[1:]).judged(text)
    with_text = {"text": text, "spans": spans}
    own = {"image_id": 1, "path": None, "height": 8, "width": 8, "captions": [text], "prompt": None}
    one = SpanSample(**own, objects=(), **with_text)
    assert [(s.start, s.stop, s.label) for s in one.judged(f" {text}.")] == [(3, 6, "invented")]
    with pytest.raises(ValueError, match="force the sample's text"):
        one.judged("A cat")
    assert given("no text of its own") is not None
    rest = HallocSample(**own, objects=(), **with_text).judged(text)
    assert labels(rest) == {"red": "invented", "dog": "true", "sleeps": "true", "grass": "true"}


def test_a_data_set_without_labels_says_so():
    with pytest.raises(ValueError, match="does not say which words are true"):
        sample(Sample).judged("a dog")
