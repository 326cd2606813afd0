"""The layouts of TAM's public evaluation, and plain folders of one's own pictures."""

import contextlib
import json
from pathlib import Path

import numpy as np
import pytest
from data.faults import replaced
from PIL import Image

from captum_dcam.data import dataset, write_coco
from captum_dcam.data.common import MISSING
from captum_dcam.data.scenes import make_scene

LEVELS = {"person": 1, "wine glass": 46, "dog": 18}


def label_picture(seed: int, size: tuple[int, int]) -> np.ndarray:
    return np.random.default_rng(seed).choice([0, 1, 46], size).astype(np.uint8)


def write_pairs(root: Path, count: int = 4) -> list:
    """``anno.json`` as the public script reads it."""
    (root / "image").mkdir(parents=True)
    (root / "mask").mkdir()
    rows = []
    for number in range(count):
        size = (16 + number, 24)
        Image.new("RGB", size[::-1], (number, 9, 9)).save(root / "image" / f"{number}.jpg")
        Image.fromarray(label_picture(number, size)).save(root / "mask" / f"{number}.png")
        names = {"a person": 1, "a glass": 46, "a dog": 18}
        rows.append([f"image/{number}.jpg", f"text {number}", f"mask/{number}.png", names])
    (root / "anno.json").write_text(json.dumps(rows))
    return rows


def write_minival(root: Path) -> None:
    write_coco(root, "tmp", [make_scene(2, i) for i in range(3)])
    folder = root / "annotations"
    for kind, split in (("instances", "minival2014"), ("captions", "val2014")):
        path = (folder / f"{kind}_tmp.json").rename(folder / f"{kind}_{split}.json")
        table = json.loads(path.read_text())
        table["categories"] = [{"id": one, "name": name} for name, one in LEVELS.items()]
        path.write_text(json.dumps(table))
    for name in ("image", "seg_label"):
        (root / name).mkdir()
    for number in range(1, 4):
        name = f"{number:012d}"
        make_scene(2, number - 1).image.save(root / "image" / f"{name}.jpg")
        labels = Image.fromarray(label_picture(number, (192, 192)))
        labels.save(root / "seg_label" / f"{name}.png")


def test_lists_of_four(tmp_path):
    root = tmp_path / "GranDf"
    write_pairs(root)
    data = dataset("tam", root)
    assert data.ids == ("0", "1", "2", "3") and data.kind == "phrase"
    assert "two sentences" in data[0].prompt
    for number, sample in enumerate(data):
        labels = label_picture(number, (16 + number, 24))
        sample.check()
        assert sample.captions == [f"text {number}"] and sample.extra["unseen"] == ["a dog"]
        assert [i.name for i in sample.objects] == ["a person", "a glass"]
        assert np.array_equal(sample.masks()["a glass"], labels == 46)
        assert np.array_equal(sample.objects[0].mask(), labels == 1)
    root.rename(tmp_path / "OpenPSG")
    assert "three sentences" in dataset("tam", tmp_path / "OpenPSG")[0].prompt
    (tmp_path / "OpenPSG").rename(tmp_path / "mine")
    assert dataset("tam", tmp_path / "mine")[0].prompt is None
    assert dataset("tam", tmp_path / "mine", prompt="say").settings[1] == ("prompt", "say")


def test_minival_as_tam_lays_it_out(tmp_path):
    write_minival(tmp_path)
    data = dataset("tam", tmp_path)
    assert data.ids == (1, 2, 3) and data.kind == "category"
    sample = data.sample(2)
    sample.check()
    assert sample.objects[1].names == ("wine glass", "glass") and "one-sentence" in sample.prompt
    assert sample.captions == list(make_scene(2, 1).captions.values())
    assert np.array_equal(sample.masks()["wine glass"], label_picture(2, (192, 192)) == 46)
    assert sample.extra["unseen"] == []
    (tmp_path / "seg_label" / f"{1:012d}.png").unlink()
    skipping = dataset("tam", tmp_path, missing="skip")
    assert [s.image_id for s in skipping] == [2, 3] and skipping.problems[0].image_id == 1


def test_broken_lists_of_four(tmp_path):
    rows = write_pairs(tmp_path, 6)
    rows[0][2] = ""  # no masks at all: allowed
    rows[1][0] = "../x.jpg"
    rows[2][3] = {"a dog": "18"}
    rows[3] = rows[3][:3]
    (tmp_path / "mask" / "4.png").unlink()
    Image.new("RGB", (24, 21)).save(tmp_path / "mask" / "5.png")
    (tmp_path / "anno.json").write_text(json.dumps(rows))
    with pytest.raises(ValueError, match=r"image entry 1: '\.\./x\.jpg'"):
        dataset("tam", tmp_path)
    data = dataset("tam", tmp_path, missing="skip")
    (only,) = data
    assert only.image_id == "0" and only.masks() == {} and len(only.extra["unseen"]) == 3
    reasons = dict(data.problems)
    assert list(reasons) == ["entry 1", "entry 2", "entry 3", "4", "5"]
    assert "grey level" in reasons["entry 2"] and "expected [image" in reasons["entry 3"]
    assert "missing" in reasons["4"] and "expected one number per pixel" in reasons["5"]
    (tmp_path / "anno.json").write_text("{}")
    with pytest.raises(ValueError, match="expected a list"):
        dataset("tam", tmp_path)


@pytest.fixture
def mine(tmp_path: Path) -> Path:
    """Three pictures; the second is stored lying, as phones do."""
    (tmp_path / "images").mkdir()
    (tmp_path / "masks").mkdir()
    turned = Image.Exif()
    turned[0x0112] = 6
    for number, name in enumerate(("dog.jpg", "my__cat.jpg", "empty.png")):
        picture = Image.new("RGB", (20, 10), (50 * number, 0, 0))
        picture.save(tmp_path / "images" / name, **({"exif": turned} if number == 1 else {}))
    (tmp_path / "images" / "notes.txt").write_text("not a picture")
    for name, size, mode in (
        ("dog__brown_dog", (20, 10), "L"),
        ("dog__ball", (20, 10), "1"),
        ("dog__ball__2", (20, 10), "P"),
        ("my__cat__cat", (10, 20), "L"),
    ):
        mask = Image.new(mode, size, 0)
        mask.putpixel((len(name) % 9, 3), 1)
        mask.save(tmp_path / "masks" / f"{name}.png")
    (tmp_path / "captions.csv").write_text(
        'image,caption\ndog.jpg,"A dog, and a ball"\nmy__cat,A cat\ndog,Brown\n', encoding="utf-8"
    )
    return tmp_path


def test_own_folder(mine):
    data = dataset("folder", mine, prompt="what is this ?")
    assert data.ids == ("dog", "empty", "my__cat") and data.kind == "free"
    dog, empty, cat = data
    for sample in data:
        sample.check()
    assert dog.captions == ["A dog, and a ball", "Brown"] and cat.captions == ["A cat"]
    assert empty.captions == [] and empty.objects == () and dog.prompt == "what is this ?"
    assert [i.name for i in dog.objects] == ["ball", "brown dog"]
    assert np.argwhere(dog.masks()["ball"]).tolist() == [[3, 0], [3, 3]]  # two parts
    assert cat.image().size == (10, 20) and (cat.height, cat.width) == (20, 10)
    assert cat.masks()["cat"].shape == (20, 10)
    Image.new("L", (20, 10), 1).save(mine / "masks" / "empty__all.png")
    assert dataset("folder", mine, prompt="what is this ?").settings != data.settings


def test_own_tables(mine):
    (mine / "masks" / "dog__ball.png").rename(mine / "b.png")
    (mine / "masks.csv").write_text(
        "image,mask,name\ndog,b.png,toy ball\ndog.jpg,masks/dog__brown_dog.png,dog\n"
    )
    data = dataset("folder", mine)
    assert list(data.sample("dog").masks()) == ["toy ball", "dog"]
    (mine / "masks.csv").write_text("image,mask\ndog,b.png\n")
    assert list(dataset("folder", mine).sample("dog").masks()) == ["b"]
    for text, says in (
        ("image;mask\ndog;b.png\n", r"header is \['image;mask'\]: expected image,mask"),
        ("image,mask\nhorse,b.png\n", r"line 2: image 'horse': no image of that name"),
        ("image,mask\ndog,\n", r"line 2: image 'dog': no mask"),
        ("image,mask\ndog,../b.png\n", r"no path inside"),
    ):
        (mine / "masks.csv").write_text(text)
        with pytest.raises(ValueError, match=says):
            dataset("folder", mine)
    (mine / "masks.csv").write_bytes(b"image,mask\ndog,\xff\n")
    with pytest.raises(ValueError, match="no CSV in UTF-8"):
        dataset("folder", mine)


def test_own_folder_with_faults(mine):
    masks, images = mine / "masks", mine / "images"
    Image.new("L", (20, 10), 1).save(masks / "horse__tail.png")
    with pytest.raises(ValueError, match=r"horse__tail\.png belongs to no image"):
        dataset("folder", mine)
    Image.new("L", (20, 10), 1).save(masks / "my__cat__tail.png")  # lying: another size
    Image.new("RGB", (20, 10)).save(images / "dog.png")
    (images / "empty.png").write_bytes(b"no picture")
    Image.new("RGB", (20, 10)).save(images / "bird.png")
    Image.new("L", (20, 10)).save(masks / "bird__wing.png")
    Image.new("RGB", (20, 10)).save(images / "cow.png")
    Image.new("RGBA", (20, 10)).save(masks / "cow__horn.png")
    whole = (images / "cow.png").read_bytes()
    (images / "hen.png").write_bytes(whole[:-30])
    data = dataset("folder", mine, missing="skip")
    assert list(data) == []
    reasons = dict(data.problems)
    assert sorted(reasons) == ["bird", "cow", "dog", "empty", "hen", "horse__tail", "my__cat"]
    assert "share a stem" in reasons["dog"] and "upright image (20, 10)" in reasons["my__cat"]
    assert "is not an image" in reasons["empty"] and "is empty: leave out" in reasons["bird"]
    assert "is RGBA" in reasons["cow"] and "damaged" in reasons["hen"]
    for path in images.iterdir():
        path.unlink()
    with pytest.raises(FileNotFoundError, match="has no images"):
        dataset("folder", mine)


def test_any_odd_value_is_refused_or_skipped(tmp_path):
    """One value of the table replaced: samples that are whole, or an error of the right kind."""
    write_pairs(tmp_path, 2)
    path = tmp_path / "anno.json"
    for place, odd, table in replaced(json.loads(path.read_text())):
        path.write_text(json.dumps(table))
        for missing in MISSING:
            with contextlib.suppress(ValueError, OSError):
                data = dataset("tam", tmp_path, missing=missing)
                whole = len([sample.check() for sample in data])
                assert whole == len(data) or data.problems, (place, odd)
