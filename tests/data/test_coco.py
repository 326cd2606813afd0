"""COCO's format: real photographs, round trips, pycocotools as referee, and errors that teach."""

import contextlib
import io
import json
import pickle
import sys
from collections import namedtuple
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from pycocotools.coco import COCO

from captum_dcam.data.coco import CocoDataset, write_coco
from captum_dcam.data.scenes import make_scene

PHOTOS = Path(__file__).parents[3] / "shared" / "data" / "coco_cc_by"
needs_photos = pytest.mark.skipif(not PHOTOS.is_dir(), reason="shared photographs are not here")
NAMES = ("red circle", "blue ring", "red circle")
Thing = namedtuple("Thing", "category mask")
Picture = namedtuple("Picture", "image objects captions extra", defaults=({},))


def pictures(seed: int = 0, count: int = 3) -> list[Picture]:
    rng = np.random.default_rng(seed)
    made = []
    for i, size in ((i, (11 + i, 7)) for i in range(count)):
        image = Image.fromarray(rng.integers(0, 255, (*size, 3), dtype=np.uint8))
        masks = rng.random(size) > 0.2, rng.random(size) > 0.9, np.eye(*size) > 0
        things = [Thing(*pair) for pair in zip(NAMES, masks, strict=True)]
        made.append(Picture(image, things, [f"picture {i}", "ein Gemälde ●"], {"seed": i}))
    return made


def referee(instances: Path) -> COCO:
    with contextlib.redirect_stdout(io.StringIO()):
        return COCO(str(instances))


def edited(root: Path, change, kind: str = "instances") -> None:
    path = root / "annotations" / f"{kind}_tiny.json"
    change(table := json.loads(path.read_text()))
    path.write_text(json.dumps(table))


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    write_coco(tmp_path, "tiny", pictures())
    return tmp_path


@needs_photos
def test_photographs_equal_pycocotools(capsys):
    data = CocoDataset.open(PHOTOS, "val2017")
    coco, crowds = referee(PHOTOS / "annotations" / "instances_val2017.json"), 0
    for sample in data:
        picture = sample.image()
        assert picture.mode == "RGB" and picture.size == (sample.width, sample.height)
        assert len(sample.captions) == 5 and all(sample.captions)
        assert "creativecommons" in sample.license and "staticflickr" in sample.attribution
        instances = sample.instance_masks()
        for instance in instances:
            expected = coco.annToMask(coco.anns[instance.annotation_id])
            assert instance.mask.dtype == bool and np.array_equal(instance.mask, expected)
        crowds += sum(instance.is_crowd for instance in instances)
        assert list(sample.masks()) == sample.categories
        for name, mask in sample.masks().items():
            members = [i.mask for i in instances if i.category == name]
            assert np.array_equal(mask, np.any(members, axis=0))
    assert len(data) == 16 and crowds == 3 and capsys.readouterr().out == ""


@needs_photos
def test_photographs_survive_a_round_trip(tmp_path):
    originals = [CocoDataset.open(PHOTOS, "val2017")[i] for i in (0, 5, 9)]
    things = [[Thing(*pair) for pair in s.masks().items()] for s in originals]
    scenes = (Picture(s.image(), t, s.captions) for s, t in zip(originals, things, strict=True))
    write_coco(tmp_path, "again", scenes)
    for original, copy in zip(originals, CocoDataset.open(tmp_path, "again"), strict=True):
        assert np.array_equal(np.asarray(original.image()), np.asarray(copy.image()))
        assert original.captions == copy.captions and original.categories == copy.categories
        for name, mask in original.masks().items():
            assert np.array_equal(mask, copy.masks()[name])


def test_round_trip(tiny):
    data, made = CocoDataset.open(tiny, "tiny"), pictures()
    coco = referee(tiny / "annotations" / "instances_tiny.json")
    assert [s.image_id for s in data] == [1, 2, 3] and data[-1].image_id == 3
    for sample, picture in zip(data, made, strict=True):
        assert np.array_equal(np.asarray(sample.image()), np.asarray(picture.image))
        assert sample.captions == picture.captions and sample.extra == picture.extra
        assert sample.categories == ["red circle", "blue ring"]
        for instance, thing in zip(sample.instance_masks(), picture.objects, strict=True):
            assert instance.category == thing.category and not instance.is_crowd
            assert np.array_equal(instance.mask, thing.mask)
            row = coco.anns[instance.annotation_id]
            assert coco.cats[row["category_id"]]["name"] == thing.category
            assert np.array_equal(coco.annToMask(row), thing.mask)
    with pytest.raises(IndexError):
        data[3]


@settings(max_examples=25)
@given(st.integers(1, 40), st.integers(1, 40), st.floats(0, 1), st.integers(0, 999))
def test_any_mask_survives(tmp_path_factory, height, width, share, seed):
    mask = np.random.default_rng(seed).random((height, width)) < share
    mask[seed % height, seed % width] = True
    root = tmp_path_factory.mktemp("any")
    write_coco(root, "tiny", [Picture(Image.new("RGB", (width, height)), [Thing("x", mask)], [])])
    assert np.array_equal(CocoDataset.open(root, "tiny")[0].masks()["x"], mask)
    row = json.loads((root / "annotations" / "instances_tiny.json").read_text())["annotations"][0]
    ys, xs = np.nonzero(mask)
    assert row["area"] == mask.sum()
    assert row["bbox"] == [xs.min(), ys.min(), np.ptp(xs) + 1, np.ptp(ys) + 1]


def test_equal_input_gives_equal_bytes_and_plain_files(tmp_path):
    for name in ("a", "b"):
        made = pictures(seed=4)
        made[0].image.info["icc_profile"] = name.encode()
        write_coco(tmp_path / name, "tiny", iter(made))
    files = [p.relative_to(tmp_path / "a") for p in (tmp_path / "a").rglob("*") if p.is_file()]
    read = [[(tmp_path / name / file).read_bytes() for file in files] for name in ("a", "b")]
    assert len(files) == 5 and read[0] == read[1]  # three pictures, captions, instances


def test_categories_keep_their_ids_across_splits(tmp_path):
    for split in ("train", "val"):
        write_coco(tmp_path, split, pictures(), ["unused", "red circle", "blue ring"])
        table = json.loads((tmp_path / "annotations" / f"instances_{split}.json").read_text())
        assert [c["name"] for c in table["categories"]] == ["unused", "red circle", "blue ring"]
        assert {a["category_id"] for a in table["annotations"]} == {2, 3}
    with pytest.raises(ValueError, match="'blue ring': not among"):
        write_coco(tmp_path, "test", pictures(), ["red circle"])


def test_the_library_s_own_scenes(tmp_path):
    scene = make_scene(0, 0)
    write_coco(tmp_path, "scenes", [scene])
    sample = CocoDataset.open(tmp_path, "scenes")[0]
    assert sample.captions == list(scene.captions.values())
    assert set(sample.masks()) == {item.category for item in scene.objects}


@pytest.mark.parametrize("fresh", [True, False])
def test_all_or_nothing(tmp_path, monkeypatch, fresh):
    root = tmp_path / "new" / "root" if fresh else tmp_path
    if not fresh:
        write_coco(root, "old", pictures())
    before = {p: p.is_file() for p in tmp_path.rglob("*")}
    with pytest.raises(ZeroDivisionError):
        write_coco(root, "tiny", (p if p.extra["seed"] < 2 else 1 / 0 for p in pictures()))
    assert set(tmp_path.rglob("*")) == set(before)
    rename = Path.rename

    def last_one_fails(self, target):
        if target.name == "instances_tiny.json":
            raise OSError("disk full")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", last_one_fails)
    with pytest.raises(OSError, match="disk full"):
        write_coco(root, "tiny", pictures())
    files = {p for p in tmp_path.rglob("*") if p.is_file()}
    assert files == {p for p, is_file in before.items() if is_file}


def test_writer_errors_teach(tmp_path, tiny):
    good = pictures()[0]
    empty = np.zeros((11, 7), bool)
    for bad, says in [
        (
            Picture(good.image, (Thing("a", empty[:2, :2]),), []),
            r"sample 0.*bool \(2, 2\).*\(11, 7\)",
        ),
        (Picture(good.image, (Thing("a", empty),), []), "empty.*cannot be seen"),
        (Picture(good.image, (Thing("a", empty + 1.0),), []), "float64"),
        (Picture(good.image.convert("L"), (), []), r"image is L.*convert\('RGB'\)"),
        (Picture(good.image, (), "a lone string"), "list of strings"),
        (Picture(good.image, (), [], {"x": np.ones(2)}), "plain JSON"),
        (Picture(good.image, (), [], {"x": float("nan")}), "plain JSON"),
    ]:
        with pytest.raises(ValueError, match=says):
            write_coco(tmp_path, "bad", [bad])
    with pytest.raises(ValueError, match="no samples"):
        write_coco(tmp_path, "bad", [])
    for split in ("", "..", "a/b", "annotations"):
        with pytest.raises(ValueError, match="plain name"):
            write_coco(tmp_path, split, pictures())
    with pytest.raises(FileExistsError, match=r"tiny.*another split"):
        write_coco(tiny, "tiny", pictures())


def test_open_lists_what_it_expected(tiny):
    says = r"instances_val2017\.json \(missing\).*images/val2017.*Here: instances_tiny\.json"
    with pytest.raises(FileNotFoundError, match=says):
        CocoDataset.open(tiny, "val2017")
    with pytest.raises(FileNotFoundError, match="no folder"):
        CocoDataset(tiny / "nowhere", tiny / "annotations" / "instances_tiny.json")
    with pytest.raises(FileNotFoundError, match="no file"):
        CocoDataset(tiny / "tiny", tiny / "annotations" / "nothing.json")


def test_layouts_and_missing_captions(tiny):
    (tiny / "annotations" / "captions_tiny.json").unlink()
    (tiny / "images").mkdir()
    (tiny / "tiny").rename(tiny / "images" / "tiny")
    data = CocoDataset.open(tiny, "tiny")
    assert data[0].captions == [] and data[0].image().size == (7, 11)
    mask = pickle.loads(pickle.dumps(data))[1].masks()["blue ring"]  # as loader workers get it
    assert np.array_equal(mask, data[1].masks()["blue ring"])


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda t: t["annotations"][0].update(image_id=77), "annotation 1 names image 77"),
        (lambda t: t["annotations"][0].update(category_id=9), "annotation 1 names category 9"),
        (lambda t: t["annotations"].append(t["annotations"][0]), "id 1 occurs twice in 'annotat"),
        (lambda t: t["images"].append(t["images"][0]), "id 1 occurs twice in 'images'"),
        (lambda t: t["categories"][0].update(name="red circle"), "share a name"),
        (lambda t: t["images"][0].pop("height"), r"'images' lacks \['height'\]"),
        (lambda t: t["images"][0].update(file_name="../secret.png"), "leads out"),
        (lambda t: t.pop("annotations"), r"lacks the lists \['annotations'\]"),
    ],
)
def test_broken_annotations_are_refused(tiny, change, says):
    edited(tiny, change)
    with pytest.raises(ValueError, match=says):
        CocoDataset.open(tiny, "tiny")


def test_broken_captions_and_json_are_refused(tiny):
    edited(tiny, lambda t: t["annotations"][0].update(image_id=77), "captions")
    with pytest.raises(ValueError, match=r"captions_tiny\.json: annotation 1 names image 77"):
        CocoDataset.open(tiny, "tiny")
    (tiny / "annotations" / "instances_tiny.json").write_text('{"images": [')
    with pytest.raises(ValueError, match="no JSON"):
        CocoDataset.open(tiny, "tiny")


@pytest.mark.parametrize(
    ("shape", "says"),
    [
        (None, "segmentation is None"),
        ([], r"segmentation is \[\]"),
        ([[1, 1, 4, 4]], "at least three"),
        ({"size": [7, 11], "counts": [77]}, r"mask \[7, 11\], image \(11, 7\)"),
        ({"size": [11, 7], "counts": [3, 4]}, "do not fill 77"),
        ({"size": [11, 7], "counts": [-3, 80]}, "damaged"),
        ({"size": [11, 7], "counts": [7.5, 69.5]}, "damaged"),
        ({"size": [11, 7], "counts": "0000"}, "do not fill 77"),
    ],
)
def test_broken_segmentations_name_their_annotation(tiny, shape, says):
    edited(tiny, lambda t: t["annotations"][0].update(segmentation=shape))
    data = CocoDataset.open(tiny, "tiny")
    with pytest.raises(ValueError, match=says) as caught:
        data[0].masks()
    assert str(caught.value).startswith("annotation 1 of image 1") and data[1].masks()


def test_crowds_and_plain_run_lengths_count(tiny):
    plain = {"size": [11, 7], "counts": [0, 1, 70, 6]}
    edited(tiny, lambda t: t["annotations"][1].update(segmentation=plain, iscrowd=1))
    sample = CocoDataset.open(tiny, "tiny")[0]
    assert sample.instance_masks()[1].is_crowd
    pixels = [[0, 0], *([y, 6] for y in range(5, 11))]  # counted down the columns
    assert np.argwhere(sample.masks()["blue ring"]).tolist() == pixels


def test_damaged_pictures_name_their_id(tiny):
    first, second, third = (tiny / "tiny" / f"{i:012d}.png" for i in (1, 2, 3))
    first.unlink()
    second.write_bytes(second.read_bytes()[:-60])
    Image.new("RGB", (3, 3)).save(third)
    errors = (FileNotFoundError, OSError, ValueError)
    says = (r"1: .*missing", r"2: .*damaged", r"3: .*\(3, 3\), annotated as \(7, 13\)")
    for sample, error, message in zip(CocoDataset.open(tiny, "tiny"), errors, says, strict=True):
        with pytest.raises(error, match="image " + message):
            sample.image()


def test_grey_and_turned_photographs(tiny):
    exif = Image.Exif()
    exif[0x0112] = 6  # "turn by 90 degrees", which COCO's masks ignore
    Image.new("L", (7, 11), 90).save(tiny / "tiny" / "000000000001.png", exif=exif)
    picture = CocoDataset.open(tiny, "tiny")[0].image()
    assert picture.size == (7, 11) and picture.getpixel((0, 0)) == (90, 90, 90)


def test_without_pycocotools_the_error_says_how_to_get_it(tiny, monkeypatch):
    monkeypatch.setitem(sys.modules, "pycocotools.mask", None)
    with pytest.raises(
        ImportError, match=r"COCO's masks needs .*pip install 'captum-dcam\[data\]'"
    ):
        CocoDataset.open(tiny, "tiny")
