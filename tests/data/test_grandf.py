"""GranD-f: both published forms against pycocotools, real photographs, and damaged entries."""

import contextlib
import json
from pathlib import Path

import numpy as np
import pytest
from data.faults import replaced
from PIL import Image
from pycocotools import mask as engine

from captum_dcam.data import dataset
from captum_dcam.data.coco import CocoDataset
from captum_dcam.data.common import MISSING
from captum_dcam.data.grandf import SPLITS, GrandfDataset
from captum_dcam.data.scenes import make_scene

PHOTOS = Path(__file__).parents[3] / "shared" / "data" / "coco_cc_by"
needs_photos = pytest.mark.skipif(not PHOTOS.is_dir(), reason="shared photographs are not here")


def runs(mask: np.ndarray) -> dict:
    found = engine.encode(np.asfortranarray(mask, dtype=np.uint8))
    return {"size": list(map(int, found["size"])), "counts": found["counts"].decode()}


def entry(number: int, sizes: bool = True) -> dict:
    """A scene as an entry of a training list: a phrase a group, a mask an object."""
    scene = make_scene(4, number)
    caption = scene.captions["original"]
    groundings = {}
    for group in scene.groups:
        start = caption.index(group.phrase)
        masks = [o.mask for o in scene.objects if (o.color, o.shape) == (group.color, group.shape)]
        groundings[group.phrase] = {
            "token_positives": [start, start + len(group.phrase)],
            "rle_masks": [runs(m) for m in masks],
        }
    size = {"height": 192, "width": 192} if sizes else {}
    name = {"file_name": f"sa_{100 - number}.jpg"}
    return {**name, **size, "caption": f'"{caption}" ', "groundings": groundings}


def write_list(root: Path, split: str = "ha_train", count: int = 6, sizes: bool = True) -> Path:
    images = root / SPLITS[split].images
    images.mkdir(parents=True)
    rows = [entry(number, sizes) for number in range(count)]
    for number, row in enumerate(rows):
        make_scene(4, number).image.save(images / row["file_name"], quality=95)
    path = root / "GranDf" / "annotations" / SPLITS[split].annotations[0]
    path.parent.mkdir(parents=True)
    path.write_text(json.dumps(rows))
    return path


def write_tables(root: Path, split: str = "val", count: int = 3) -> tuple[Path, Path]:
    images = root / SPLITS[split].images
    images.mkdir(parents=True)
    rows = [entry(number) for number in range(count)]
    listed, texts, masks = [], [], []
    for number, row in enumerate(rows):
        one = Path(row["file_name"]).stem
        make_scene(4, number).image.save(images / row["file_name"])
        listed.append({"id": one, "height": 192, "width": 192})
        flat = [(p, m) for p, g in row["groundings"].items() for m in g["rle_masks"]]
        labels = [p for p, _ in flat]
        texts.append({"id": number, "image_id": one, "caption": row["caption"], "labels": labels})
        for _, m in flat:
            place = {"id": len(masks), "image_id": one, "category_id": 1, "iscrowd": 0}
            masks.append({**place, "segmentation": m})
    paths = [root / "GranDf" / "annotations" / one for one in SPLITS[split].annotations]
    paths[0].parent.mkdir(parents=True)
    paths[0].write_text(json.dumps({"images": listed, "annotations": texts}))
    kinds = [{"id": 1, "name": "object"}]
    table = {"images": listed, "annotations": masks, "categories": kinds}
    paths[1].write_text(json.dumps(table))
    return paths[0], paths[1]


def edited(path: Path, change) -> None:
    change(table := json.loads(path.read_text()))
    path.write_text(json.dumps(table))


@pytest.mark.parametrize("sizes", [True, False])
@pytest.mark.parametrize("split", ["ha_train", "openpsg_val"])
def test_training_lists_equal_pycocotools(tmp_path, split, sizes):
    write_list(tmp_path, split, sizes=sizes)
    data = dataset("grandf", tmp_path, split=split)
    assert data.ids == ("sa_100", "sa_95", "sa_96", "sa_97", "sa_98", "sa_99")
    assert data.kind == "phrase"
    assert ("two" if split == "ha_train" else "three") + " sentences" in data[0].prompt
    for sample in data:
        row = entry(100 - int(sample.image_id[3:]))
        sample.check()
        assert sample.captions == [row["caption"].strip('" ')]
        assert [i.name for i in sample.objects] == list(row["groundings"])
        for item in sample.objects:
            shapes = [engine.decode(r) for r in row["groundings"][item.name]["rle_masks"]]
            assert np.array_equal(item.mask(), np.sum(shapes, axis=0) > 0)
            start, end = sample.extra["spans"][item.name]
            assert sample.captions[0][start:end] == item.name == item.names[0]


def test_spans_count_from_either_text(tmp_path):
    path = write_list(tmp_path, count=1)
    plain = dataset("grandf", tmp_path)[0]
    spans = plain.extra["spans"]
    assert spans  # as the fixture counts: from the stripped text

    def stored(rows):
        for one in rows[0]["groundings"].values():
            one["token_positives"] = [at + 1 for at in one["token_positives"]]  # after the quote

    edited(path, stored)
    assert dataset("grandf", tmp_path)[0].extra["spans"] == spans
    edited(path, stored)  # fits neither
    found = dataset("grandf", tmp_path)[0]
    assert found.extra["spans"] == {} and found.masks().keys() == plain.masks().keys()


def test_root_may_be_the_folder_itself(tmp_path):
    write_list(tmp_path)
    assert len(dataset("grandf", tmp_path / "GranDf")) == 6  # as the project's page shows it
    (tmp_path / "GranDf_HA_images").rename(tmp_path / "GranDf" / "GranDf_HA_images")
    assert len(dataset("grandf", tmp_path)) == 6  # as its code reads it
    elsewhere = tmp_path / "GranDf" / "GranDf_HA_images" / "train"
    moved = elsewhere.rename(tmp_path / "pictures")
    assert dataset("grandf", tmp_path, images=moved)[0].image().size == (192, 192)
    with pytest.raises(ValueError, match="split is 'train': expected one of ha_train, val"):
        dataset("grandf", tmp_path, split="train")


def test_val_and_test_tables(tmp_path):
    write_tables(tmp_path)
    data = dataset("grandf", tmp_path, split="val")
    for sample in data:
        row = entry(100 - int(sample.image_id[3:]))
        sample.check()
        assert sample.masks().keys() == row["groundings"].keys()
        for name, mask in sample.masks().items():
            shapes = [engine.decode(r) for r in row["groundings"][name]["rle_masks"]]
            assert np.array_equal(mask, np.any(shapes, axis=0))
    assert len(data) == 3 and "two sentences" in data[0].prompt


def test_tables_that_disagree(tmp_path):
    captions, masks = write_tables(tmp_path)
    edited(masks, lambda t: t["annotations"].pop(0))
    edited(captions, lambda t: t["annotations"].append({**t["annotations"][1], "id": 77}))
    with pytest.raises(ValueError, match=r"image sa_100: it has .* masks and the labels"):
        dataset("grandf", tmp_path, split="val")
    data = dataset("grandf", tmp_path, split="val", missing="skip")
    assert [s.image_id for s in data] == ["sa_98"]
    assert "2 captions" in dict(data.problems)["sa_99"]
    edited(masks, lambda t: t["annotations"][0].update(image_id="sa_1"))
    found = dataset("grandf", tmp_path, split="val", missing="skip").problems
    assert any("names image sa_1, not listed" in p.reason for p in found)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda r: r.pop("caption"), "lacks a caption"),
        (lambda r: r.update(file_name="/etc/x.jpg"), "inside its folder"),
        (lambda r: r["groundings"].update({"a dog": {}}), "'a dog' has no list 'rle_masks'"),
        (lambda r: r["groundings"].update({"a dog": {"rle_masks": [None]}}), "'a dog'.*is None"),
        (
            lambda r: r["groundings"].update(
                {"a dog": {"rle_masks": [{"size": [192, 192], "counts": "00"}]}}
            ),
            "'a dog'.*do not fill",
        ),
        (
            lambda r: r["groundings"].update({"a dog": {"rle_masks": [runs(np.ones((5, 5)))]}}),
            r"'a dog'.*\[5, 5\]",
        ),
    ],
)
def test_damaged_entries_are_named_and_skipped(tmp_path, change, says):
    path = write_list(tmp_path)
    edited(path, lambda rows: change(rows[2]))
    with pytest.raises(ValueError, match=says):
        [s.check() for s in dataset("grandf", tmp_path)]
    data = dataset("grandf", tmp_path, missing="skip")
    assert len(list(data)) == 5 and len(data.problems) == 1
    assert data.problems[0].image_id in ("sa_98", "x")


def test_phrases_without_masks_and_repeated_pictures(tmp_path):
    path = write_list(tmp_path)
    edited(path, lambda rows: rows[0]["groundings"].update({"a dog": {"rle_masks": []}}))
    edited(path, lambda rows: rows.append(rows[0]))
    data = dataset("grandf", tmp_path)
    assert len(data) == 7 and "sa_100#2" in data.ids
    sample = data.sample("sa_100#2")
    assert sample.extra["ungrounded"] == ["a dog"] and "a dog" not in sample.masks()
    assert sample.path == data.sample("sa_100").path


def test_missing_pictures_and_no_list(tmp_path):
    path = write_list(tmp_path, sizes=False)
    images = tmp_path / SPLITS["ha_train"].images
    (images / "sa_97.jpg").unlink()
    (images / "sa_96.jpg").write_bytes((images / "sa_96.jpg").read_bytes()[:900])
    (images / "sa_95.jpg").write_bytes(b"")
    with pytest.raises(FileNotFoundError, match=r"image sa_97: .*missing"):
        dataset("grandf", tmp_path).sample("sa_97")
    data = dataset("grandf", tmp_path, missing="skip")
    assert [s.image_id for s in data] == ["sa_100", "sa_98", "sa_99"]
    assert [p.image_id for p in data.problems] == ["sa_95", "sa_96", "sa_97"]
    path.write_text("{}")
    with pytest.raises(ValueError, match="is a dict: expected a list"):
        dataset("grandf", tmp_path)
    with pytest.raises(ValueError, match="3 annotation files"):
        GrandfDataset((path, path, path), images)


@needs_photos
def test_photographs_in_this_form(tmp_path):
    originals = list(CocoDataset.open(PHOTOS, "val2017", limit=5))
    rows = []
    images = tmp_path / SPLITS["ha_train"].images
    images.mkdir(parents=True)
    for sample in originals:
        (images / sample.file_name).symlink_to(sample.path)
        caption = "; ".join(sample.categories)
        groundings = {
            name: {
                "token_positives": [caption.index(name), caption.index(name) + len(name)],
                "rle_masks": [runs(i.mask) for i in sample.instance_masks() if i.category == name],
            }
            for name in sample.categories
        }
        rows.append({"file_name": sample.file_name, "caption": caption, "groundings": groundings})
    path = tmp_path / "GranDf" / "annotations" / SPLITS["ha_train"].annotations[0]
    path.parent.mkdir(parents=True)
    path.write_text(json.dumps(rows))
    data = dataset("grandf", tmp_path)
    for original in originals:
        copy = data.sample(Path(original.file_name).stem)
        assert copy.image().size == Image.open(original.path).size
        for name, mask in original.masks().items():
            assert np.array_equal(copy.masks()[name], mask)


def test_any_odd_value_is_refused_or_skipped(tmp_path):
    """One value of the table replaced: samples that are whole, or an error of the right kind."""
    path = write_list(tmp_path, count=2)
    for place, odd, table in replaced(json.loads(path.read_text())):
        path.write_text(json.dumps(table))
        for missing in MISSING:
            with contextlib.suppress(ValueError, OSError):
                data = dataset("grandf", tmp_path, missing=missing)
                whole = len([sample.check() for sample in data])
                assert whole == len(data) or data.problems, (place, odd)
