"""Texts with labelled spans: the format's own lines, what is refused, and a measurement on them."""

import contextlib
import json
from pathlib import Path

import numpy as np
import pytest
import tiny
from data.faults import replaced
from PIL import Image

from captum_dcam.data import SpansDataset, dataset, write_spans
from captum_dcam.data.common import MISSING
from captum_dcam.data.scenes import make_scene
from captum_dcam.evaluation import Plan, evaluate

TEXT = "A red dog and a Red dog ."
SPANS = [
    {"start": 0, "stop": 9, "boxes": [[1, 2, 5, 4], [10, 0, 12, 1]]},
    {"start": 2, "stop": 5, "text": "Red", "label": "invented", "kind": "attribute"},
    {"start": 14, "stop": 23, "label": "true", "mask": [[4, 4, 9, 4, 9, 8, 4, 8]]},
]


def lines() -> list[dict]:
    question = "what color is the star ?"
    star = {"start": 18, "stop": 22, "label": "invented"}
    return [
        {"id": 7, "image": "images/a.png", "text": TEXT, "spans": SPANS},
        {"image": "images/b.png", "height": 10, "width": 20, "prompt": question, "spans": [star]},
    ]


@pytest.fixture
def root(tmp_path: Path) -> Path:
    (tmp_path / "images").mkdir()
    for name in "ab":
        Image.new("RGB", (20, 10), "red").save(tmp_path / "images" / f"{name}.png")
    write(tmp_path, *lines())
    return tmp_path


def write(root: Path, *rows: dict) -> None:
    texts = [json.dumps(row, ensure_ascii=False) for row in rows]
    (root / "spans.jsonl").write_text("\n\n".join(texts) + "\n", encoding="utf-8")


def test_lines_of_the_format(root):
    data = dataset("spans", root, prompt="say")
    assert isinstance(data, SpansDataset) and data.kind == "phrase" and data.ids == (7, "line 3")
    first, second = data
    for sample in data:
        sample.check()
    assert (first.text, first.captions, first.prompt) == (TEXT, [TEXT], "say")
    assert [s.text for s in first.spans] == ["A red dog", "red", "a Red dog"]
    assert [s.label for s in first.spans] == [None, "invented", "true"]
    assert [s.kind for s in first.spans] == [None, "attribute", None]
    boxes, polygon = np.zeros((2, 10, 20), dtype=bool)
    boxes[2:4, 1:5] = boxes[0, 10:12] = True
    polygon[4:8, 4:9] = True
    assert np.array_equal(first.spans[0].read(), boxes) and first.spans[1].read is None
    assert np.array_equal(first.spans[2].read(), polygon)
    (item,) = first.objects  # one wording, case aside
    assert item.names == ("A red dog", "red dog") and np.array_equal(item.mask(), boxes | polygon)
    assert second.text == second.prompt == "what color is the star ?" and second.captions == []
    assert [(s.text, s.label) for s in second.spans] == [("star", "invented")]
    assert second.objects == () and (second.height, second.width) == (10, 20)


def test_a_box_holds_the_pixels_whose_centres_it_holds(root):
    box = [0.5, 0.6, 3.5, 9.4]
    write(root, {**lines()[0], "spans": [{"start": 0, "stop": 1, "boxes": [box]}]})
    (mask,) = dataset("spans", root)[0].masks().values()
    x, y = np.meshgrid(np.arange(20) + 0.5, np.arange(10) + 0.5)
    inside = (x >= box[0]) & (x < box[2]) & (y >= box[1]) & (y < box[3])
    assert np.array_equal(mask, inside)


def test_what_is_written_is_read_again(root, tmp_path):
    data = dataset("spans", root)
    write_spans(tmp_path / "copy" / "mine.jsonl", data)
    again = dataset("spans", tmp_path / "copy", file="mine.jsonl", images=root)
    assert again.ids == data.ids
    assert [again.line(one) for one in data.ids] == [data.line(one) for one in data.ids]
    for one, other in zip(data, again, strict=True):
        assert (one.path, one.text, one.prompt) == (other.path, other.text, other.prompt)
        assert one.masks().keys() == other.masks().keys()
    (root / "images" / "b.png").unlink()
    write_spans(tmp_path / "copy" / "mine.jsonl", dataset("spans", root, missing="skip"))
    assert dataset("spans", tmp_path / "copy", file="mine.jsonl", images=root).ids == (7,)
    write(root, {**lines()[0], "text": TEXT.replace("dog", "cat")})
    assert dataset("spans", root).settings != data.settings


def span(**change) -> dict:
    return {**lines()[0], "spans": [{"start": 0, "stop": 9, **change}]}


REFUSED = (
    ({"text": "no image"}, "line 1: image is 'None': expected text"),
    ({**lines()[0], "image": "../a.png"}, "expected a path inside the folder of the images"),
    ({**lines()[0], "id": 1.5}, "id is 1.5: expected a whole number or text"),
    ({**lines()[0], "height": 10}, r"its size is \(10, None\)"),
    ({"image": "images/a.png", "spans": []}, "neither text nor prompt"),
    ({**lines()[0], "span": []}, "a line has no 'span'; it may have id, image"),
    ({**lines()[0], "spans": {}}, "spans is '{}': expected a list"),
    (span(box=[]), "a span has no 'box'; it may have start, stop"),
    (span(stop=26), "span 0 to 26 is outside of its text, which has 25 characters"),
    (span(start=9), "outside of its text"),
    (span(start=True), "start is 'True': expected a whole number"),
    (span(text="A red cat"), "is 'A red dog', not 'A red cat': does it count from another text"),
    (span(label="wrong"), "label of 'A red dog' is 'wrong': expected true or invented"),
    (span(kind=3), "kind is '3': expected text"),
    (span(boxes=[], mask=[]), "boxes and a mask: give one"),
    (span(boxes=[[0, 0, 1]]), r"the box \[0, 0, 1\] is not \[left, top, right, bottom\]"),
    (span(boxes=[[0, 0, float("nan"), 1]]), "is not"),
    (span(boxes=[[0, 0, 10**400, 1]]), "is outside of the image"),
    (span(boxes=[[5, 5, 3, 2]]), r"is empty: .*COCO's own boxes are \[left, top, width, height\]"),
    (span(boxes=[[0, 0, 21, 1]]), "image 7: the box .* of 'A red dog' is outside .* of 20×10 px"),
    (span(boxes=[[0.1, 0, 0.2, 1]]), "the boxes of 'A red dog' hold no pixel"),
    (span(mask=[[1, 1]]), "annotation 'A red dog' of image 7: segmentation is"),
    ({**lines()[0], "image": "images/c.png"}, r"image 7: .*c\.png is missing"),
    ({**lines()[1], "width": 21}, r"annotated as \(21, 10\)"),
)


@pytest.mark.parametrize(("row", "says"), REFUSED)
def test_what_is_refused_is_named_and_can_be_skipped(root, row, says):
    write(root, row, {**lines()[1], "id": "whole"})
    with pytest.raises((ValueError, OSError), match=says):
        [sample.check() for sample in dataset("spans", root)]
    data = dataset("spans", root, missing="skip")
    assert [sample.image_id for sample in data] == ["whole"] and len(data.problems) == 1


def test_lines_that_are_no_json_and_ids_that_occur_twice(root):
    path = root / "spans.jsonl"
    path.write_text(path.read_text() + '{"image": \n')
    with pytest.raises(ValueError, match=r"spans\.jsonl, line 4 is damaged or no JSON"):
        dataset("spans", root)
    path.write_bytes(b"\xff\n")
    with pytest.raises(ValueError, match="no text in UTF-8"):
        dataset("spans", root)
    write(root, lines()[0], lines()[0])
    with pytest.raises(ValueError, match="line 3: the id 7 occurs twice"):
        dataset("spans", root)
    path.write_text(json.dumps({**lines()[1], "prompt": "\ud800 the star now ? please"}) + "\n")
    assert len(dataset("spans", root)) == 1  # half a character is the model's to refuse
    path.write_text(json.dumps({**lines()[1], "prompt": "what\u2028color is the star ?"}))
    assert dataset("spans", root).ids == ("line 1",)


def test_any_odd_value_is_refused_or_skipped(root):
    """One value of a line replaced: samples that are whole, or an error of the right kind."""
    for place, odd, row in replaced(lines()[0]):
        write(root, row)
        for missing in MISSING:
            with contextlib.suppress(ValueError, OSError):
                data = dataset("spans", root, missing=missing)
                whole = len([sample.check() for sample in data])
                assert whole == len(data) or data.problems, (place, odd)


def test_words_are_measured_on_spans(root, tmp_path):
    scene = make_scene(7, 0)
    scene.image.save(root / "images" / "a.png")
    text, phrase = scene.captions["original"], scene.groups[0].phrase
    start = text.index(phrase)
    place = {"start": start, "stop": start + len(phrase), "boxes": [[8, 16, 64, 80]]}
    write(root, {"image": "images/a.png", "text": text, "spans": [place]})
    plan = Plan(
        ("oracle",),
        dataset="spans",
        metrics=("localization",),
        words=("object", "modifier"),
        answer="caption",
        prompt="describe the image .",
    )
    evaluate(plan, tmp_path / "out", root=root, adapter=tiny.adapter("prefix"))
    (record,) = map(json.loads, (tmp_path / "out" / "results.jsonl").read_text().splitlines())
    assert [word["text"] for word in record["words"]] == phrase.split()
    assert all(word["objects"] == [phrase] for word in record["words"])
    assert record["id"] == "line 1" and record["variants"]["oracle"]
