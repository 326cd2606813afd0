"""RefCOCO, Flickr30k Entities, RePOPE and HalLoc: made-up files in the formats as published."""

import json
import pickle
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as engine

from captum_dcam.data import dataset, write_spans

SIZE = (30, 40)
SOURCES = ("refcoco", "flickr30k", "repope", "halloc")


def image(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", SIZE[::-1], "white").save(path)


def write(path: Path, text: str | bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(text if isinstance(text, bytes) else text.encode())


# -- RefCOCO ---------------------------------------------------------------------------------------

OUTLINE = [[2.0, 3.0, 20.5, 4.0, 18.0, 25.0, 4.0, 20.0]]
NAME = "COCO_train2014_000000581857.jpg"


def refs() -> list[dict]:
    def sentence(number: int, text: str) -> dict:
        return {"tokens": text.split(), "raw": text.upper(), "sent_id": number, "sent": text}

    def ref(number: int, split: str, *sentences: dict) -> dict:
        return {
            "sent_ids": [one["sent_id"] for one in sentences],
            "file_name": "COCO_train2014_000000581857_16.jpg",
            "ann_id": 1719310,
            "ref_id": number,
            "image_id": 581857,
            "split": split,
            "sentences": list(sentences),
            "category_id": 1,
        }

    two = sentence(10, "the lady with the blue shirt"), sentence(9, "lady with back to us")
    return [ref(5, "val", *two), ref(6, "testA", sentence(0, "left man"))]


def refcoco(root: Path) -> None:
    image(root / "images/mscoco/images/train2014" / NAME)
    annotation = {"id": 1719310, "image_id": 581857, "category_id": 1, "iscrowd": 0}
    table = {
        "info": {},
        "images": [{"id": 581857, "file_name": NAME, "height": SIZE[0], "width": SIZE[1]}],
        "annotations": [{**annotation, "segmentation": OUTLINE, "bbox": [2.0, 3.0, 18.5, 22.0]}],
        "categories": [{"id": 1, "name": "person", "supercategory": "person"}],
    }
    write(root / "refcoco" / "instances.json", json.dumps(table))
    write(root / "refcoco" / "refs(unc).p", pickle.dumps(refs(), protocol=2))


def test_refcoco(tmp_path):
    refcoco(tmp_path)
    data = dataset("refcoco", tmp_path)
    assert data.ids == (9, 10) and data.kind == "phrase"
    mask = engine.decode(engine.merge(engine.frPyObjects(OUTLINE, *SIZE))).astype(bool)
    texts = "lady with back to us", "the lady with the blue shirt"
    for sample, text in zip(data, texts, strict=True):
        sample.check()
        assert sample.captions == [text] and sample.path.name == NAME
        (span,) = sample.spans
        assert span.text == text and span.label is None
        assert np.array_equal(sample.masks()[text], mask)
    assert dataset("refcoco", tmp_path, split="testA").ids == (0,)
    with pytest.raises(ValueError, match=r"no split 'testB'; it has testA, val"):
        dataset("refcoco", tmp_path, split="testB")
    with pytest.raises(ValueError, match="which is 'refclef': expected one of refcoco"):
        dataset("refcoco", tmp_path, which="refclef")


class Harmful:
    def __reduce__(self):
        return print, ("harm",)


def test_a_pickle_runs_nothing(tmp_path, capsys):
    refcoco(tmp_path)
    path = tmp_path / "refcoco" / "refs(unc).p"
    whole = path.read_bytes()
    for data, says in (
        (pickle.dumps(Harmful()), r"no plain pickle \(it would run builtins\.print\)"),
        (whole[:-20], "is damaged"),
        (pickle.dumps({}), "is a dict: expected a list"),
    ):
        path.write_bytes(data)
        with pytest.raises(ValueError, match=says):
            dataset("refcoco", tmp_path)
    assert capsys.readouterr().out == ""
    changed = refs()
    changed[0]["ann_id"] = 3
    path.write_bytes(pickle.dumps(changed, protocol=2))
    with pytest.raises(ValueError, match=r"refs\(unc\)\.p, ref 5: annotation 3 is not in"):
        dataset("refcoco", tmp_path)
    assert list(dataset("refcoco", tmp_path, missing="skip")) == []


# -- Flickr30k Entities ----------------------------------------------------------------------------

CAPTIONS = """\
[/EN#1/people Two young guys] with [/EN#2/bodyparts shaggy hair] in [/EN#8/scene the yard] .
[/EN#1/people Two men] hold [/EN#0/notvisual each other] , [/EN#5/bodyparts/people an arm] .

"""
BOXES = """\
<annotation>
	<filename>1000092795.jpg</filename>
	<size><width>40</width><height>30</height><depth>3</depth></size>
	<object>
		<name>1</name><name>5</name>
		<bndbox><xmin>1</xmin><ymin>11</ymin><xmax>10</xmax><ymax>30</ymax></bndbox>
	</object>
	<object>
		<name>1</name>
		<bndbox><xmin>31</xmin><ymin>1</ymin><xmax>40</xmax><ymax>2</ymax></bndbox>
	</object>
	<object><name>8</name><scene>1</scene><nobndbox>0</nobndbox></object>
	<object><name>2</name><scene>0</scene><nobndbox>1</nobndbox></object>
</annotation>
"""


def flickr30k(root: Path) -> None:
    image(root / "flickr30k-images" / "1000092795.jpg")
    write(root / "Sentences" / "1000092795.txt", CAPTIONS)
    write(root / "Annotations" / "1000092795.xml", BOXES)
    write(root / "test.txt", "1000092795\n")


def test_flickr30k(tmp_path):
    flickr30k(tmp_path)
    data = dataset("flickr30k", tmp_path)
    assert data.ids == ("1000092795#1", "1000092795#2")
    one, two = data
    assert one.captions == ["Two young guys with shaggy hair in the yard ."]
    assert two.text == "Two men hold each other , an arm ." and "one-sentence" in two.prompt
    for sample in data:
        sample.check()
        assert all(sample.text[s.start : s.stop] == s.text for s in sample.spans)
    assert [s.text for s in one.spans] == ["Two young guys", "shaggy hair", "the yard"]
    assert [s.kind for s in two.spans] == ["people", "notvisual", "bodyparts/people"]
    first, second = np.zeros((2, *SIZE), dtype=bool)
    first[10:30, :10] = True  # from pixel 11 to pixel 30, both inside
    second[:2, 30:] = True
    assert one.masks().keys() == {"Two young guys"} and two.masks().keys() == {"Two men", "an arm"}
    assert np.array_equal(one.objects[0].mask(), first | second)
    assert np.array_equal(two.objects[1].mask(), first)
    assert two.objects[1].names == ("an arm", "arm")
    write(tmp_path / "UNRELATED_CAPTIONS", "# format: <imageID> <sentence number>\n1000092795 1")
    assert dataset("flickr30k", tmp_path).ids == ("1000092795#2",)


@pytest.mark.parametrize(
    ("folder", "content", "says"),
    [
        ("Annotations", BOXES[:-30], "is damaged or no XML"),
        ("Annotations", BOXES.replace("<xmax>10", "<xmax>ten"), "xmax is 'ten'"),
        ("Annotations", BOXES.replace("<xmax>10", "<xmax>44"), "of 40×30 px"),
        ("Annotations", BOXES.replace("<width>40</width>", ""), "size/width is None"),
        ("Annotations", None, "No such file"),
        ("Sentences", CAPTIONS.replace("guys]", "guys"), "image 1000092795: the caption"),
        ("Sentences", b"\xff", "no text in UTF-8"),
    ],
)
def test_flickr30k_with_faults(tmp_path, folder, content, says):
    flickr30k(tmp_path)
    path = tmp_path / folder / f"1000092795.{'xml' if folder == 'Annotations' else 'txt'}"
    if content is None:
        path.unlink()
    else:
        write(path, content)
    with pytest.raises(ValueError, match=says):
        list(dataset("flickr30k", tmp_path))
    data = dataset("flickr30k", tmp_path, missing="skip")
    assert list(data) == [] and data.problems


# -- RePOPE ----------------------------------------------------------------------------------------


def repope(root: Path) -> None:
    name = "COCO_val2014_000000310196.jpg"
    image(root / "val2014" / name)
    rows = [
        {"question_id": number, "image": name, "text": f"Is there {what} in the image?", **label}
        for number, what, label in (
            (1, "a snowboard", {"label": "yes"}),
            (2, "a dining table", {"label": "no"}),
            (11, "an apple", {"label": "no"}),
        )
    ]
    text = "".join(json.dumps(row) + "\n" for row in rows)
    write(root / "annotations" / "coco_repope_random.json", text)


def test_repope(tmp_path):
    repope(tmp_path)
    data = dataset("repope", tmp_path)
    assert data.ids == (1, 2, 11)
    found = [(s.prompt, *((one.text, one.label, one.kind) for one in s.spans)) for s in data]
    assert found == [
        ("Is there a snowboard in the image?", ("snowboard", "true", "object")),
        ("Is there a dining table in the image?", ("dining table", "invented", "object")),
        ("Is there an apple in the image?", ("apple", "invented", "object")),
    ]
    assert all(s.captions == [] and s.objects == () and s.text == s.prompt for s in data)
    path = tmp_path / "annotations" / "coco_repope_random.json"
    pope = path.rename(tmp_path / "coco_pope_random.json")
    assert dataset("repope", tmp_path, annotations=pope).settings == data.settings
    for old, new, says in (
        ('"no"', '"maybe"', "line 2: label is 'maybe': expected yes or no"),
        ("Is there an", "Are there", "line 3: the question is 'Are there apple"),
        ('"question_id": 1,', '"question": 1,', "line 1: question_id is 'None'"),
    ):
        write(path, pope.read_text().replace(old, new))
        with pytest.raises(ValueError, match=says):
            dataset("repope", tmp_path)
    with pytest.raises(ValueError, match="split is 'easy': expected one of random"):
        dataset("repope", tmp_path, split="easy")


# -- HalLoc ----------------------------------------------------------------------------------------

ANSWER = "A purple dog sits on the roof in the snow ."


def annotation(**parts: str) -> dict:
    def one(name: str) -> dict:
        at = ANSWER.index(name)
        return {"name": name, "char_index": f"{at}:{at + len(name)}", "token_index": "1:2"}

    return {role: one(name) for role, name in parts.items()}


def halloc_entry(number: int, image_id: object, **annotations: list) -> dict:
    return {
        "id": f"caption_{number}",
        "image_id": image_id,
        "prompt": "<image> Describe the image briefly.",
        "hallucinated_text": ANSWER,
        "tokenized_text": ANSWER.split(),
        "annotations": {"object": [], "attribute": [], "other": [], **annotations},
    }


def halloc(root: Path) -> None:
    image(root / "VG_100K" / "2.jpg")
    image(root / "VG_100K_2" / "2315.jpg")
    wrong = {
        "attribute": [annotation(obj="dog", att="purple")],
        "relationship": [annotation(obj1="dog", rel="sits on", obj2="roof")],
        "scene": [annotation(entity="snow")],
    }
    rows = [halloc_entry(1, "2", **wrong), halloc_entry(2, 2315)]
    write(root / "data" / "test.json", json.dumps(rows))


def test_halloc(tmp_path):
    halloc(tmp_path)
    data = dataset("halloc", tmp_path)
    assert data.ids == ("caption_1", "caption_2")
    one, two = data
    for sample in data:
        sample.check()
    assert [s.path.parent.name for s in data] == ["VG_100K", "VG_100K_2"]
    assert one.prompt == "Describe the image briefly." and one.captions == [ANSWER]
    assert [(s.text, s.kind) for s in one.spans] == [
        *(("dog", "attribute"), ("purple", "attribute"), ("dog", "relationship")),
        *(("sits on", "relationship"), ("roof", "relationship"), ("snow", "scene")),
    ]
    assert {s.label for s in one.spans} == {"invented"}
    assert all(ANSWER[s.start : s.stop] == s.text for s in one.spans)
    assert two.spans == () and one.objects == ()
    image(tmp_path / "val2014" / "COCO_val2014_000000000002.jpg")
    coco = dataset("halloc", tmp_path, images=tmp_path / "val2014", limit=1)
    assert coco[0].path.name == "COCO_val2014_000000000002.jpg" and coco[0].image()


@pytest.mark.parametrize(
    ("entry", "says"),
    [
        ({"id": 1}, "entry 0: hallucinated_text is 'None'"),
        (halloc_entry(1, 2, taste=[]), "annotations of 'taste': expected object, attribute"),
        (halloc_entry(1, 2, scene=[{}]), "has no part with name and char_index"),
        (halloc_entry(1, 2, scene=[{"entity": {"char_index": "4"}}]), "expected 'start:stop'"),
        (
            halloc_entry(1, 2, scene=[{"entity": {"name": "snow", "char_index": "0:4"}}]),
            "is 'A pu', not 'snow'",
        ),
        (halloc_entry(1, None), "image_id is None"),
        (halloc_entry(1, 77), r"77\.jpg is missing"),
    ],
)
def test_halloc_with_faults(tmp_path, entry, says):
    halloc(tmp_path)
    write(tmp_path / "data" / "test.json", json.dumps([entry]))
    with pytest.raises((ValueError, OSError), match=says):
        list(dataset("halloc", tmp_path))
    data = dataset("halloc", tmp_path, missing="skip")
    assert list(data) == [] and len(data.problems) == 1
    write(tmp_path / "data" / "test.json", "{}")
    with pytest.raises(ValueError, match="is a dict: expected a list of texts"):
        dataset("halloc", tmp_path)


@pytest.mark.parametrize("name", SOURCES)
def test_every_source_becomes_lines_of_one_format(name, tmp_path):
    globals()[name](tmp_path)
    data = dataset(name, tmp_path)
    assert data.describe()["name"] == name and len(data) > 1
    write_spans(tmp_path / "spans.jsonl", data)
    again = dataset("spans", tmp_path, images=data.images_dir, prompt=data[0].prompt)
    assert again.ids == data.ids
    for one, other in zip(data, again, strict=True):
        assert (one.text, one.prompt, one.path) == (other.text, other.prompt, other.path)
        spans = [[(s.text, s.start, s.label, s.kind) for s in x.spans] for x in (one, other)]
        assert spans[0] == spans[1]
        masks = one.masks(), other.masks()
        assert masks[0].keys() == masks[1].keys()
        assert all(np.array_equal(masks[0][key], masks[1][key]) for key in masks[0])
