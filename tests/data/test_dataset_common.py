"""What all data sets share: registry, ids, limits, missing files, settings, flat memory, words."""

import contextlib
import io
import json
import pickle
import tracemalloc
from collections import namedtuple
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from data.faults import replaced
from PIL import Image
from pycocotools.coco import COCO

from captum_dcam.data import dataset, dataset_names, register_dataset, write_coco
from captum_dcam.data.coco import CocoDataset
from captum_dcam.data.common import DATASETS, MISSING, Ledger, Sample
from captum_dcam.data.files import distinct, select
from captum_dcam.data.scenes import COLORS, HELD_OUT, SHAPE_OF, make_scene
from captum_dcam.errors import UnknownNameError

PHOTOS = Path(__file__).parents[3] / "shared" / "data" / "coco_cc_by"
Thing = namedtuple("Thing", "category mask")
Picture = namedtuple("Picture", "image objects captions")
needs_photos = pytest.mark.skipif(not PHOTOS.is_dir(), reason="shared photographs are not here")


@pytest.fixture
def official(tmp_path: Path) -> Path:
    """Ten scenes in COCO 2014's own layout, ids unsorted, the last half called minival."""
    write_coco(tmp_path, "val2014", [make_scene(9, i) for i in range(10)])
    for kind in ("instances", "captions"):
        path = tmp_path / "annotations" / f"{kind}_val2014.json"
        table = json.loads(path.read_text())
        for row in table["images"]:
            name = f"COCO_val2014_{row['id'] * 7:012d}.png"
            file = tmp_path / "val2014" / row["file_name"]
            if kind == "instances":
                file.rename(file.with_name(name))
            row.update(id=row["id"] * 7, file_name=name)
        for row in table["annotations"]:
            row["image_id"] *= 7
        table["images"].reverse()
        path.write_text(json.dumps(table))
        if kind == "instances":
            table["images"] = [row for row in table["images"] if row["id"] > 35]
            kept = [row for row in table["annotations"] if row["image_id"] > 35]
            mini = {**table, "annotations": kept}
            (tmp_path / "annotations" / "instances_minival2014.json").write_text(json.dumps(mini))
    return tmp_path


def test_registry():
    own = ("coco", "degraded", "flickr30k", "folder", "grandf", "halloc", "openpsg", "refcoco")
    assert dataset_names() == (*own, "repope", "scenes", "spans", "tam")
    with pytest.raises(UnknownNameError, match="did you mean 'grandf'"):
        dataset("grandff", "x")
    with pytest.raises(
        TypeError, match=r"data set 'coco' has no setting 'splitt'; it has root, split, ids, limit"
    ):
        dataset("coco", "x", splitt="val2014")
    with pytest.raises(TypeError, match="needs root"):
        dataset("coco")
    with pytest.raises(TypeError, match="takes no root"):
        dataset("scenes", "x")
    with pytest.raises(ValueError, match=r"'coco' belongs to captum_dcam\.data\.coco.*already"):
        register_dataset("coco")(test_registry)
    assert register_dataset("coco")(DATASETS["coco"]) is DATASETS["coco"]


@pytest.mark.parametrize("name", [n for n in dataset_names() if n not in ("degraded", "scenes")])
def test_a_root_without_the_files_says_what_is_expected_where(name, tmp_path):
    says = {
        "coco": r"instances_val2014\.json \(missing\).*val2014 or .*images/val2014.*\(missing\)",
        "flickr30k": r"test\.txt \(missing\).*Sentences.*Annotations.*flickr30k-images or",
        "folder": r"images in .*images \(missing\); masks in .*masks or .*masks\.csv \(missing\)",
        "grandf": r"annotations/train/GranDf_HA_GCG_train\.json.*GranDf_HA_images/train",
        "halloc": r"test\.json or .*data/test\.json.*VG_100K or .*VG_100K_2 \(missing\)",
        "openpsg": r"psg/psg\.json.*train2017.*panoptic_train2017 or .*panoptic_val2017.*missing",
        "refcoco": r"refcoco/refs\(unc\)\.p.*refcoco/instances\.json.*train2014.*missing",
        "repope": r"annotations/coco_repope_random\.json.*val2014 or .*coco/val2014",
        "spans": r"spans\.jsonl \(missing\)",
        "tam": r"anno\.json \(missing\).*instances_minival2014\.json \(missing\).*seg_label",
    }
    with pytest.raises(FileNotFoundError, match=says[name]) as caught:
        dataset(name, tmp_path)
    assert str(tmp_path) in str(caught.value)


def test_official_layout_is_ordered_by_id(official):
    data = dataset("coco", official)
    assert data.ids == tuple(range(7, 71, 7)) and len(data) == 10 and data.kind == "category"
    with contextlib.redirect_stdout(io.StringIO()):
        coco = COCO(str(official / "annotations" / "instances_val2014.json"))
    for number, sample in enumerate(data):
        scene = make_scene(9, number)
        assert isinstance(sample, Sample) and sample.image_id == data.ids[number]
        assert np.array_equal(np.asarray(sample.image()), scene.pixels)
        assert sample.captions == list(scene.captions.values()) and "one-sentence" in sample.prompt
        for item in sample.objects:
            rows = coco.loadAnns(coco.getAnnIds(imgIds=[sample.image_id]))
            mine = [r for r in rows if coco.cats[r["category_id"]]["name"] == item.name]
            assert np.array_equal(item.mask(), np.any([coco.annToMask(r) for r in mine], axis=0))
        assert sample.masks().keys() == {item.name for item in sample.objects}
    assert data.problems == ()
    with pytest.raises(UnknownNameError, match=r"no image 5 among the 10 ids \(7 to 70\)"):
        data.sample(5)


def test_minival_by_its_annotations_or_by_an_id_list(official):
    listed = official / "minival.txt"
    listed.write_text("000000000070\n42\n49\n56\n63\n")
    for data in (
        dataset("coco", official, split="minival2014"),
        dataset("coco", official, ids=listed),
        dataset("coco", official, ids=[70, 42, 63, 49, 56]),
    ):
        assert data.ids == (42, 49, 56, 63, 70)
        assert [s.captions[1] for s in data] == [
            make_scene(9, i).captions["original"] for i in range(5, 10)
        ]
    listed.write_text("[7, 70]")
    assert dataset("coco", official, ids=listed).ids == (7, 70)
    assert dataset("coco", official, ids=listed, limit=1).ids == (7,)
    listed.write_text("7\n8\n")
    with pytest.raises(ValueError, match=r"minival\.txt: '8' is not among the 10 annotated"):
        dataset("coco", official, ids=listed)
    data = dataset("coco", official, ids=listed, missing="skip")
    assert data.ids == (7,) and data.problems[0].image_id == "8"
    for text, says in (("", "lists no ids"), ("[7,", "no id list")):
        listed.write_text(text)
        with pytest.raises(ValueError, match=says):
            dataset("coco", official, ids=listed)
    with pytest.raises(FileNotFoundError, match="expected image ids there"):
        dataset("coco", official, ids=official / "nothing.txt")
    for limit in (0, -1, True, 2.5):
        with pytest.raises(ValueError, match="limit is"):
            dataset("coco", official, limit=limit)


def test_missing_and_damaged_files_are_reported_and_skipped(official):
    data = dataset("coco", official, missing="skip")
    path = official / "val2014" / f"COCO_val2014_{14:012d}.png"
    path.write_bytes(path.read_bytes()[:-4000])
    (official / "val2014" / f"COCO_val2014_{28:012d}.png").unlink()
    table = json.loads((official / "annotations" / "instances_val2014.json").read_text())
    next(r for r in table["annotations"] if r["image_id"] == 42)["segmentation"] = []
    next(r for r in table["annotations"] if r["image_id"] == 56)["category_id"] = 99
    odd = {**table["annotations"][0], "id": 5000, "image_id": 12345}
    table["annotations"].append(odd)
    (official / "annotations" / "instances_val2014.json").write_text(json.dumps(table))
    with pytest.raises(ValueError, match="12345, not listed"):
        dataset("coco", official)
    data = dataset("coco", official, missing="skip")
    assert len(data) == 10 and len(data.problems) == 2  # known before any picture is opened
    for _ in range(2):  # the second time adds nothing
        assert [s.image_id for s in data] == [7, 21, 35, 49, 63, 70]
        reasons = dict(data.problems)
        assert list(reasons) == [12345, 56, 14, 28, 42] and len(data.problems) == 5
    assert "damaged" in reasons[14] and "is missing" in reasons[28]
    assert "segmentation is []" in reasons[42] and "category 99" in reasons[56]
    assert [s.image_id for s in data.samples(data.ids[::3])] == [7, 49, 70]
    with pytest.raises(ValueError, match="category 99"):
        data.sample(56)
    table["annotations"] = [r for r in table["annotations"] if r["image_id"] not in (12345, 56)]
    (official / "annotations" / "instances_val2014.json").write_text(json.dumps(table))
    data = dataset("coco", official)
    assert data[0].image() and data.sample(14).masks()  # lazily: nothing else is read
    with pytest.raises(OSError, match=r"image 14: .*damaged"):
        data.sample(14).image()
    with pytest.raises(ValueError, match="image 42"):
        data.sample(42).check()
    with pytest.raises(ValueError, match="missing is 'ignore': expected one of raise, skip"):
        dataset("coco", official, missing="ignore")


@pytest.mark.parametrize("kind", ["images", "annotations"])
def test_broken_rows_name_their_image(official, kind):
    path = official / "annotations" / "instances_val2014.json"
    table = json.loads(path.read_text())
    row = table[kind][0]
    key = "id" if kind == "images" else "image_id"
    whose = row[key]
    table[kind].append(row)  # twice
    path.write_text(json.dumps(table))
    data = dataset("coco", official, missing="skip")
    assert [p.image_id for p in data.problems] == [whose] and "twice" in data.problems[0].reason
    assert whose not in [s.image_id for s in data] and len(list(data)) == 9
    table[kind][-1] = {"id": ["a list"]}
    path.write_text(json.dumps(table))
    (problem,) = dataset("coco", official, missing="skip").problems
    assert problem.image_id is None and "lacks" in problem.reason


def test_captions_that_are_no_text(official):
    path = official / "annotations" / "captions_val2014.json"
    table = json.loads(path.read_text())
    table["annotations"][0]["caption"] = None
    path.write_text(json.dumps(table))
    with pytest.raises(ValueError, match="caption 1 is None: expected text"):
        dataset("coco", official)


@pytest.mark.parametrize("kind", ["instances", "captions"])
def test_any_odd_value_is_refused_or_skipped(tmp_path, kind):
    """One value of the table replaced: samples that are whole, or an error of the right kind."""
    write_coco(tmp_path, "val2014", [make_scene(1, i) for i in range(2)])
    path = tmp_path / "annotations" / f"{kind}_val2014.json"
    for place, odd, table in replaced(json.loads(path.read_text())):
        path.write_text(json.dumps(table))
        for missing in MISSING:
            with contextlib.suppress(ValueError, OSError):
                data = dataset("coco", tmp_path, missing=missing)
                whole = len([sample.check() for sample in data])
                assert whole == len(data) or data.problems, (place, odd)


def test_settings_are_keys(official):
    data = dataset("coco", official)
    moved = dataset("coco", official, limit=3)
    assert hash(data.settings) == hash(moved.settings) and data.settings == moved.settings
    assert json.loads(json.dumps(data.settings)) == [list(pair) for pair in data.settings]
    record = json.loads(json.dumps(data.describe()))
    assert record["name"] == "coco" and record["images"] == 10
    assert moved.describe()["ids"] != record["ids"]
    assert dataset("coco", official, prompt="hi").settings != data.settings
    assert str(official) not in json.dumps(record)  # the same wherever the files lie
    path = official / "annotations" / "instances_val2014.json"
    path.write_text(path.read_text() + " ")
    assert dataset("coco", official).settings != data.settings
    back = pickle.loads(pickle.dumps(data))
    assert np.array_equal(back[3].objects[0].mask(), data[3].objects[0].mask())
    assert pickle.loads(pickle.dumps(data[3])).masks().keys() == data[3].masks().keys()


def test_memory_stays_flat_over_many_samples(tmp_path):
    noise = np.random.default_rng(0).integers(0, 255, (96, 96, 3), dtype=np.uint8)
    side = np.arange(96 * 96).reshape(96, 96) % 96 < 40
    things = [Thing("left", side), Thing("right", ~side)]
    picture = Picture(Image.fromarray(noise), things, ["a picture"])
    write_coco(tmp_path, "many", [picture] * 160)
    data = CocoDataset.open(tmp_path, "many", missing="skip")
    tracemalloc.start()
    try:
        peaks, seen = [], 0
        for number, sample in enumerate(data):
            seen += sample.image().size == (96, 96) and len(sample.masks()) == 2
            del sample
            if number in (39, 159):
                peaks.append(tracemalloc.get_traced_memory())
                tracemalloc.reset_peak()
    finally:
        tracemalloc.stop()
    (early, early_peak), (late, late_peak) = peaks
    assert seen == 160
    # 120 more samples were read: kept pixels would be 3.3 MB, one kept mask of each 1.1 MB.
    assert late - early < 300_000
    assert late_peak < early_peak + 300_000 < 3_000_000


def test_scenes_equal_the_generator():
    data = dataset("scenes", count=5, start=3)
    assert data.ids == (3, 4, 5, 6, 7) and dict(data.settings)["seed"] == HELD_OUT
    for sample in data:
        scene = make_scene(HELD_OUT, sample.image_id)
        assert np.array_equal(np.asarray(sample.image()), scene.pixels) and sample.path is None
        assert sample.captions == [scene.captions["original"]]
        assert sample.prompt == "describe the image ."
        sample.check()
        assert {i.name for i in sample.objects} == {o.category for o in scene.objects}
        for item in sample.objects:
            assert np.array_equal(item.mask(), scene.mask_of(*item.name.split()))
    verbose = dataset("scenes", count=1, wording="verbose")[0]
    assert verbose.prompt == "describe the image in detail ."
    assert verbose.captions[0].startswith("there ")
    assert pickle.loads(pickle.dumps(data))[1].captions == data[1].captions
    for bad in ({"count": 0}, {"start": -1}, {"wording": "repeated"}, {"max_objects": 9}):
        with pytest.raises(ValueError, match=f"{next(iter(bad))} is"):
            dataset("scenes", **bad)


def test_the_names_of_scenes_are_what_words_need():
    """Longest run of words around a word that is a name = the rule that scenes are scored by."""
    for sample in dataset("scenes", count=40, seed=5):
        words = sample.captions[0].split()
        for before, word in pairwise(words):
            shape = SHAPE_OF.get(word)
            if shape is None or before not in COLORS:
                continue
            named = [i for i in sample.objects if f"{before} {word}" in i.names]
            assert len(named) == 1
            assert np.array_equal(named[0].mask(), sample.scene.mask_of(before, shape))
            for alone, truth in (
                (word, sample.scene.mask_of(None, shape)),
                (before, sample.scene.mask_of(before, None)),
            ):
                masks = [i.mask() for i in sample.objects if alone in i.names]
                assert np.array_equal(np.any(masks, axis=0), truth)


def test_samples_without_a_file_and_masks_of_another_size():
    bare = Sample(
        image_id=1, path=None, height=2, width=2, captions=[], prompt=None, objects=(), extra={}
    )
    with pytest.raises(NotImplementedError, match="image 1"):
        bare.image()
    sample = dataset("scenes", count=1)[0]
    wrong = type(sample)(**{**sample.__dict__, "height": 100})
    with pytest.raises(ValueError, match=r"\(192, 192\), the image \(100, 192\)"):
        wrong.check()


def test_small_parts():
    assert distinct(["a", "b", "a", "a"]) == ["a", "b", "a#2", "a#3"]
    assert MISSING == ("raise", "skip")
    assert select({3, "b", 1, "a"}, None, None, Ledger("raise")) == [1, 3, "a", "b"]
    assert select({"7"}, [7], None, Ledger("raise")) == ["7"]


@needs_photos
def test_photographs_through_the_registry():
    data = dataset("coco", PHOTOS, split="val2017", limit=4)
    assert data.ids == (790, 62554, 99053, 107438)
    for sample in data:
        sample.check()
        assert len(sample.captions) == 5 and sample.objects[0].names[0] == sample.objects[0].name
