"""OpenPSG: panoptic pictures decoded as by hand, unions, relations, and errors that name images."""

import contextlib
import json
from pathlib import Path

import numpy as np
import pytest
from data.faults import replaced
from PIL import Image

from captum_dcam.data import dataset
from captum_dcam.data.common import MISSING
from captum_dcam.data.files import panoptic_labels
from captum_dcam.data.openpsg import OpenPsgDataset, spoken

THINGS, STUFF = ["person", "dog"], ["wall-brick", "tree-merged"]
IDS = (7, 300, 70_000, 9_000_000)  # each needs one byte more, the last all three


def write_psg(root: Path, count: int = 4, nested: bool = True) -> dict:
    """The published layout with noise for pictures; returns the table."""
    rng = np.random.default_rng(0)
    coco, psg = (root / "coco", root / "psg") if nested else (root, root)
    rows = []
    for number in range(count):
        height, width = 20 + number, 30
        part = ("train2017", "val2017")[number % 2]
        labels = np.zeros((height, width), dtype=np.int64)
        for band, one in enumerate(IDS):
            labels[band * 5 : band * 5 + 4, 2:] = one  # gaps stay void
        colours = np.stack([labels % 256, labels // 256 % 256, labels // 65536], axis=-1)
        for folder, name in ((coco / part, "jpg"), (coco / f"panoptic_{part}", "png")):
            folder.mkdir(parents=True, exist_ok=True)
            path = folder / f"{number:012d}.{name}"
            content = colours if name == "png" else rng.integers(0, 255, (height, width, 3))
            Image.fromarray(content.astype(np.uint8)).save(path)
        kinds = (0, 0, 2, 3)
        segments = [
            {"id": one, "category_id": kind, "iscrowd": 0, "isthing": int(kind < 2), "area": 112}
            for one, kind in zip(IDS, kinds, strict=True)
        ]
        rows.append(
            {
                "image_id": str(90 - number),
                "coco_image_id": str(number),
                "file_name": f"{part}/{number:012d}.jpg",
                "height": height,
                "width": width,
                "pan_seg_file_name": f"panoptic_{part}/{number:012d}.png",
                "segments_info": segments,
                "annotations": [{"bbox": [2, 0, 30, 4], "category_id": k} for k in kinds],
                "relations": [[0, 2, 1], [1, 3, 0]],
            }
        )
    table = {
        "data": rows,
        "thing_classes": THINGS,
        "stuff_classes": STUFF,
        "predicate_classes": ["over", "in front of"],
        "test_image_ids": ["90", "88"],
    }
    psg.mkdir(parents=True, exist_ok=True)
    (psg / "psg.json").write_text(json.dumps(table))
    return table


@pytest.fixture
def root(tmp_path: Path) -> Path:
    write_psg(tmp_path)
    return tmp_path


def edited(root: Path, change) -> None:
    path = root / "psg" / "psg.json"
    change(table := json.loads(path.read_text()))
    path.write_text(json.dumps(table))


def test_ids_are_decoded_as_by_hand(tmp_path):
    pixels = np.array([[[1, 0, 0], [0, 1, 0]], [[0, 0, 1], [255, 255, 255]]], dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "x.png")
    expected = [[1, 256], [65_536, 256**3 - 1]]
    assert panoptic_labels(tmp_path / "x.png", 1).tolist() == expected


def test_masks_are_unions_of_segments(root):
    data = dataset("openpsg", root, split="all")
    assert data.ids == ("87", "88", "89", "90")
    for sample in data:
        number = 90 - int(sample.image_id)
        raw = np.asarray(Image.open(root / "coco" / data._rows[sample.image_id]["file_name"]))
        assert np.array_equal(np.asarray(sample.image()), raw) and sample.captions == []
        by_hand = {name: np.zeros((20 + number, 30), bool) for name in ("p", "w", "t")}
        by_hand["p"][0:4, 2:] = by_hand["p"][5:9, 2:] = True
        by_hand["w"][10:14, 2:] = by_hand["t"][15:19, 2:] = True
        masks = sample.masks()
        assert list(masks) == ["person", "wall-brick", "tree-merged"]
        for item, truth in zip(sample.objects, by_hand.values(), strict=True):
            assert np.array_equal(masks[item.name], truth) and masks[item.name].dtype == bool
            assert np.array_equal(item.mask(), truth)
        assert sample.extra["relations"] == [(0, "in front of", 2), (1, "over", 3)]
        assert [s["isthing"] for s in sample.extra["segments"]] == [True, True, False, False]
    assert "three sentences" in data[0].prompt and dict(data.settings)["split"] == "all"


def test_splits_and_layouts(root, tmp_path):
    assert dataset("openpsg", root).ids == ("88", "90")
    assert dataset("openpsg", root, split="train", limit=1).ids == ("87",)
    with pytest.raises(ValueError, match="split is 'val'"):
        dataset("openpsg", root, split="val")
    flat = tmp_path / "flat"
    write_psg(flat, nested=False)
    for part in ("train", "val"):  # where COCO's own archive has them
        target = flat / "annotations" / f"panoptic_{part}2017"
        target.parent.mkdir(exist_ok=True)
        (flat / f"panoptic_{part}2017").rename(target)
    assert sum(bool(s.masks()) for s in dataset("openpsg", flat, split="all")) == 4
    again = dataset("openpsg", flat, annotations=root / "psg" / "psg.json")
    assert again.ids == ("88", "90")


def test_words():
    assert spoken("person") == ("person",)
    assert spoken("tree-merged") == ("tree-merged", "tree")
    assert spoken("wall-other-merged") == ("wall-other-merged", "wall")
    assert spoken("wall-brick") == ("wall-brick", "brick wall", "wall brick", "wall")


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda r: r.pop("pan_seg_file_name"), r"lacks \['pan_seg_file_name'\]"),
        (lambda r: r.update(file_name="../secret.jpg"), "leads out"),
        (lambda r: r["segments_info"][0].update(category_id=4), "category that is not listed"),
        (lambda r: r["relations"].append([0, 4, 0]), r"relation \[0, 4, 0\]"),
        (lambda r: r["segments_info"][0].update(id=8), r"no pixel of label \[8\].*'person'"),
        (lambda r: r.update(height=99), "99"),
    ],
)
def test_damaged_entries_are_named_and_skipped(root, change, says):
    edited(root, lambda t: change(t["data"][0]))
    with pytest.raises(ValueError, match=says) as caught:
        [s.check() for s in dataset("openpsg", root, split="all")]
    assert "image 90" in str(caught.value)
    data = dataset("openpsg", root, split="all", missing="skip")
    assert [s.image_id for s in data] == ["87", "88", "89"]
    assert [p.image_id for p in data.problems] == ["90"]


def test_missing_and_truncated_pictures(root):
    (root / "coco" / "panoptic_train2017" / f"{0:012d}.png").unlink()
    damaged = root / "coco" / "panoptic_val2017" / f"{1:012d}.png"
    damaged.write_bytes(damaged.read_bytes()[:-30])
    (root / "coco" / "train2017" / f"{2:012d}.jpg").unlink()
    data = dataset("openpsg", root, split="all", missing="skip")
    assert [s.image_id for s in data] == ["87"]
    reasons = {p.image_id: p.reason for p in data.problems}
    assert sorted(reasons) == ["88", "89", "90"]
    assert "panoptic_train2017" in reasons["90"] and "is missing" in reasons["90"]
    assert "is damaged" in reasons["89"] and "train2017" in reasons["88"]
    with pytest.raises(FileNotFoundError, match="image 90"):
        dataset("openpsg", root).sample("90").objects[0].mask()


def test_no_openpsg(root):
    edited(root, lambda t: t["data"].append(t["data"][0]))
    with pytest.raises(ValueError, match="image 90: its id occurs twice"):
        dataset("openpsg", root)
    edited(root, lambda t: t.pop("stuff_classes"))
    with pytest.raises(ValueError, match=r"lacks the lists \['stuff_classes'\]"):
        dataset("openpsg", root)
    (root / "psg" / "psg.json").write_text("[1,")
    with pytest.raises(ValueError, match="no JSON"):
        dataset("openpsg", root)
    with pytest.raises(FileNotFoundError, match="OpenPSG annotations"):
        OpenPsgDataset(root / "x.json", root, root)


def test_any_odd_value_is_refused_or_skipped(tmp_path):
    """One value of the table replaced: samples that are whole, or an error of the right kind."""
    write_psg(tmp_path, count=2)
    path = tmp_path / "psg" / "psg.json"
    for place, odd, table in replaced(json.loads(path.read_text())):
        path.write_text(json.dumps(table))
        for missing in MISSING:
            with contextlib.suppress(ValueError, OSError):
                data = dataset("openpsg", tmp_path, split="all", missing=missing)
                whole = len([sample.check() for sample in data])
                assert whole == len(data) or data.problems, (place, odd)
