"""COCO files as tools write them: taken as they are meant, or refused by the annotation's id.

Every case of the tables is (what stands in the file, words of the message). Nothing of it reaches
pycocotools, which writes beyond its memory at large numbers.
"""

import json

import numpy as np
import pytest
from PIL import Image

from captum_dcam.data import dataset
from captum_dcam.data.coco import CocoDataset
from captum_dcam.errors import DcamError, InputError

H, W = 20, 30
SQUARE = [2, 3, 10, 3, 10, 9, 2, 9]
MASK = np.zeros((H, W), bool)
MASK[3:9, 2:10] = True
INF, NAN = float("inf"), float("nan")


def write(root, segmentation=(SQUARE,), images=2, change=None, exif=None, size=(H, W)):
    """A data set with one annotation per image; ``change`` edits the table."""
    (root / "annotations").mkdir()
    (root / "val").mkdir()
    table = {"images": [], "annotations": [], "categories": [{"id": 3, "name": "dog"}]}
    for number in range(1, images + 1):
        name = f"{number}.png"
        options = {}
        if exif is not None:
            options["exif"] = Image.Exif()
            options["exif"][0x0112] = exif
        pixels = np.arange(H * W * 3, dtype=np.uint8).reshape(H, W, 3)
        Image.fromarray(pixels).save(root / "val" / name, **options)
        sides = {"height": size[0], "width": size[1]}
        table["images"].append({"id": number, "file_name": name, **sides})
        row = {"id": 10 + number, "image_id": number, "category_id": 3, "segmentation": [SQUARE]}
        table["annotations"].append(row)
    table["annotations"][0]["segmentation"] = segmentation
    if change is not None:
        change(table)
    (root / "annotations" / "instances_val.json").write_text(json.dumps(table))


def opened(root, **options):
    return CocoDataset.open(root, "val", **options)


# -- outlines --------------------------------------------------------------------------------------


def with_point(x, y=5):
    return [2, 3, x, y, 10, 9]


OUTLINES = [
    ([with_point(1e30)], "a polygon goes to x = 1e[+]30, far outside .* of 30×20 px"),
    ([with_point(-1e30)], "goes to x = -1e[+]30"),
    ([with_point(5, 1e30)], "goes to y = 1e[+]30"),
    ([with_point(1e308)], "goes to x = 1e[+]308"),
    ([with_point(4.3e8)], "goes to x = 430000000.0"),
    ([with_point(2**31)], "goes to x = 2147483648"),
    ([with_point(10**400)], "goes to x = 1000.*another size"),
    ([with_point(61)], "goes to x = 61"),
    ([with_point(-31)], "goes to x = -31"),
    ([with_point(5, 41)], "goes to y = 41"),
    ([SQUARE, with_point(1e30)], "goes to x = 1e[+]30"),
    ([with_point(INF)], "goes to x = inf"),
    ([with_point(NAN)], "goes to x = nan"),
    ([with_point("5")], "expected polygons of at least three points"),
    ([with_point(None)], "expected polygons"),
    ([with_point(True)], "expected polygons"),
    ([with_point([5])], "expected polygons"),
    ([[2, 3, 10, 3, 10, 9, 2]], "expected polygons"),
    ([[1, 1, 4, 4]], "expected polygons of at least three points"),
    ([[1, 1]], "expected polygons"),
    ([[]], "expected polygons"),
    ([], "expected polygons"),
    (SQUARE, "expected polygons"),
    (["23"], "expected polygons"),
    ([[0, 0, 29, 19] * 50000], "polygons are .* px long: expected"),
    ([[5, 5, 5, 5, 5, 5]], "its mask has no pixel"),
    ([[5.1, 5.1, 5.2, 5.1, 5.2, 5.2]], "its mask has no pixel"),
    ([[-20, -15, -10, -15, -10, -5]], "its mask has no pixel"),
    ([[35, 25, 40, 25, 40, 30]], "its mask has no pixel"),
]


@pytest.fixture
def no_engine(monkeypatch):
    """pycocotools is there, and draws nothing that is out of bounds."""
    from pycocotools import mask

    draw = mask.frPyObjects

    def checked(shape, *size):
        numbers = np.array([x for part in shape for x in part])
        assert np.abs(numbers).max() < 3 * max(size) and len(numbers) < 200000
        return draw(shape, *size)

    monkeypatch.setattr(mask, "frPyObjects", checked)


@pytest.mark.parametrize("shape, words", OUTLINES)
def test_an_outline_that_cannot_be_drawn_names_its_annotation(tmp_path, no_engine, shape, words):
    write(tmp_path, shape)
    with pytest.raises(InputError, match=f"annotation 11 of image 1:? ?.*{words}"):
        opened(tmp_path)[0].masks()
    with pytest.raises(InputError, match="annotation 11 of image 1"):
        opened(tmp_path)[0].instance_masks()
    data = opened(tmp_path, missing="skip")
    assert [s.image_id for s in data] == [2]  # left out whole, and the other one is not
    assert [p.image_id for p in data.problems] == [1] and "11" in data.problems[0].reason


@pytest.mark.parametrize("counts", ("o" * 10**6, "oooooooooooooo0", "\x00\x01", "é"))
def test_run_lengths_that_are_no_numbers_name_their_annotation(tmp_path, counts):
    write(tmp_path, {"size": [H, W], "counts": counts})
    with pytest.raises(InputError, match="annotation 11 of image 1 is damaged: its runs"):
        opened(tmp_path)[0].masks()


@pytest.mark.parametrize("counts", ([H * W], [0, 0, H * W]))
def test_run_lengths_without_a_pixel_name_their_annotation(tmp_path, counts):
    write(tmp_path, {"size": [H, W], "counts": counts})
    with pytest.raises(InputError, match="annotation 11 of image 1: its mask has no pixel; leave"):
        opened(tmp_path)[0].masks()


@pytest.mark.parametrize(
    "shape",
    (
        [SQUARE, [1, 1, 4, 4]],
        [[1, 1, 4, 4], SQUARE],
        [[1, 1], SQUARE, [], [7.5, 7, 8, 8.25]],
        [[*SQUARE, 2, 3]],
        [[float(x) for x in SQUARE]],
    ),
)
def test_parts_that_enclose_nothing_lose_nothing(tmp_path, shape):
    write(tmp_path, shape)
    assert np.array_equal(opened(tmp_path)[0].masks()["dog"], MASK)


def test_an_outline_may_pass_the_border(tmp_path):
    write(tmp_path, [[-1.5, 3, 31, 3, 31, 9, -1.5, 9]])
    found = opened(tmp_path)[0].masks()["dog"]
    assert found[3:9].all() and not found[9:].any() and not found[:3].any()


def test_an_empty_annotation_beside_others_of_its_category_adds_nothing(tmp_path):
    def more(table):
        empty = {"id": 99, "image_id": 1, "category_id": 3, "segmentation": [[5, 5, 5, 5, 5, 5]]}
        table["annotations"].append(empty)

    write(tmp_path, change=more)
    sample = opened(tmp_path)[0]
    assert np.array_equal(sample.masks()["dog"], MASK)
    with pytest.raises(InputError, match="annotation 99 of image 1: its mask has no pixel"):
        sample.instance_masks()


# -- sizes -----------------------------------------------------------------------------------------

SIZES = [
    ((10**9, W), "expected at most .* pixels, as Pillow"),
    ((H, 10**9), "expected at most"),
    ((10**5, 10**5), "expected at most"),
    ((10**30, 10**30), "expected at most"),
    ((0, W), "expected whole numbers of pixels"),
    ((-H, W), "expected whole numbers"),
    ((20.0, W), "expected whole numbers"),
    (("20", W), "expected whole numbers"),
    ((True, W), "expected whole numbers"),
    ((None, W), "expected whole numbers"),
]


@pytest.mark.parametrize("size, words", SIZES)
def test_a_size_that_no_image_has_is_refused_when_the_file_is_read(tmp_path, size, words):
    def change(table):
        table["images"][0] |= {"height": size[0], "width": size[1]}

    write(tmp_path, change=change)
    with pytest.raises(InputError, match=f"image 1: its size is .*{words}"):
        opened(tmp_path)
    assert [s.image_id for s in opened(tmp_path, missing="skip")] == [2]


def test_a_size_of_another_image_is_refused(tmp_path):
    def change(table):
        table["images"][0]["height"] = H + 1

    write(tmp_path, change=change)
    with pytest.raises(InputError, match=r"1.png is \(30, 20\), annotated as \(30, 21\)"):
        opened(tmp_path)[0].image()


# -- ids -------------------------------------------------------------------------------------------


def named(field, value, kind="annotations"):
    def change(table):
        table[kind][0][field] = value

    return change


@pytest.mark.parametrize("value", ("1", 1.0, "01", "000000000001"))
@pytest.mark.parametrize("missing", ("raise", "skip"))
def test_an_image_id_means_the_image_whatever_its_type(tmp_path, value, missing):
    write(tmp_path, change=named("image_id", value))
    data = opened(tmp_path, missing=missing)
    assert [list(s.masks()) for s in data] == [["dog"], ["dog"]] and data.problems == ()


@pytest.mark.parametrize("value", ("3", 3.0, "03"))
def test_a_category_id_means_the_category_whatever_its_type(tmp_path, value):
    write(tmp_path, change=named("category_id", value))
    assert opened(tmp_path)[0].categories == ["dog"]


def test_images_with_ids_as_text(tmp_path):
    def change(table):
        for row in table["images"]:
            row["id"] = str(row["id"])

    write(tmp_path, change=change)
    data = opened(tmp_path)
    assert data.ids == ("1", "2") and [list(s.masks()) for s in data] == [["dog"], ["dog"]]


def test_an_id_as_it_stands_comes_first(tmp_path):
    def change(table):
        other = {"id": "1", "file_name": "2.png", "height": H, "width": W}
        table["images"][1] = other
        table["annotations"][1]["image_id"] = "1"

    write(tmp_path, change=change)
    data = opened(tmp_path)
    assert data.ids == (1, "1") and [len(s.objects) for s in data] == [1, 1]


@pytest.mark.parametrize(
    "value, words",
    [
        (77, "names image 77, not listed"),
        ("x", "names image x, not listed"),
        ("９", "names image"),
        ("9" * 5000, "not listed"),
        (True, r"lacks \['image_id'\]"),
        (1.5, r"lacks \['image_id'\]"),
        (None, r"lacks \['image_id'\]"),
        ([1], r"lacks \['image_id'\]"),
        ({"id": 1}, r"lacks \['image_id'\]"),
    ],
)
def test_an_image_id_that_means_no_image_is_refused(tmp_path, value, words):
    write(tmp_path, change=named("image_id", value))
    with pytest.raises(InputError, match=words):
        opened(tmp_path)
    assert opened(tmp_path, missing="skip").problems


@pytest.mark.parametrize(
    "field, value", [("category_id", 9), ("category_id", None), ("id", None), ("id", 12)]
)
@pytest.mark.parametrize("image_id", (1, "1", 1.0))
def test_what_cannot_be_used_leaves_its_image_out_whole(tmp_path, field, value, image_id):
    def change(table):
        row = table["annotations"][0]
        row |= {"image_id": image_id, field: value}
        good = {"id": 50, "image_id": 1, "category_id": 3, "segmentation": [SQUARE]}
        table["annotations"] = [table["annotations"][1], row, good]

    write(tmp_path, change=change)
    data = opened(tmp_path, missing="skip")
    assert [s.image_id for s in data] == [2] and data.problems[0].image_id == 1
    with pytest.raises(DcamError):
        opened(tmp_path)


def test_captions_of_ids_of_another_type(tmp_path):
    write(tmp_path)
    captions = {
        "images": [],
        "annotations": [
            {"id": 1, "image_id": "1", "caption": "a dog"},
            {"id": 2, "image_id": 2.0, "caption": 7},
        ],
    }
    (tmp_path / "annotations" / "captions_val.json").write_text(json.dumps(captions))
    with pytest.raises(InputError, match="caption 2 is 7: expected text"):
        opened(tmp_path)
    data = opened(tmp_path, missing="skip")
    assert [(s.image_id, s.captions) for s in data] == [(1, ["a dog"])]


@pytest.mark.parametrize("ids", (["1"], [1.0], [np.int64(1)], ["000000000001"], [1]))
def test_ids_that_are_asked_for(tmp_path, ids):
    write(tmp_path)
    assert opened(tmp_path, ids=ids).ids == (1,)


@pytest.mark.parametrize("ids", ([True], [[1]], [None], ["one"], [1.5], [{"id": 1}]))
def test_ids_that_are_none(tmp_path, ids):
    write(tmp_path)
    with pytest.raises(InputError, match="is not among the 2 annotated images"):
        opened(tmp_path, ids=ids)


def test_openpsgs_split_goes_by_ids_of_any_type(tmp_path):
    table = {
        "data": [
            {
                "image_id": n,
                "file_name": f"{n}.jpg",
                "pan_seg_file_name": f"{n}.png",
                "height": H,
                "width": W,
                "segments_info": [],
            }
            for n in ("1", "2")
        ],
        "thing_classes": ["dog"],
        "stuff_classes": [],
        "predicate_classes": [],
        "test_image_ids": [1],
    }
    (tmp_path / "psg").mkdir()
    for name in ("val2017", "panoptic_val2017"):
        (tmp_path / "coco" / name).mkdir(parents=True)
    (tmp_path / "psg" / "psg.json").write_text(json.dumps(table))
    assert dataset("openpsg", tmp_path).ids == ("1",)
    table["data"][0]["height"] = 10**9
    (tmp_path / "psg" / "psg.json").write_text(json.dumps(table))
    with pytest.raises(InputError, match="expected at most"):
        dataset("openpsg", tmp_path)


# -- images that EXIF turns ------------------------------------------------------------------------


@pytest.mark.parametrize("orientation", (5, 6, 7, 8))
def test_an_upright_annotation_is_refused_by_name_or_read_upright(tmp_path, orientation):
    tall = [2, 3, 10, 3, 10, 25, 2, 25]
    write(tmp_path, [tall], images=1, exif=orientation, size=(W, H))
    words = r"1\.png is \(30, 20\), annotated as \(20, 30\).*EXIF.*turned='upright'"
    with pytest.raises(InputError, match=words):
        opened(tmp_path)[0].image()
    assert list(opened(tmp_path, missing="skip")) == []
    data = opened(tmp_path, turned="upright")
    image, mask = data[0].image(), data[0].masks()["dog"]
    assert image.size == (H, W) and mask.shape == (W, H) and mask[24, 9] and not mask[25, 9]
    assert dict(data.settings)["turned"] == "upright"
    assert "turned" not in dict(opened(tmp_path).settings)  # stores of before keep their key
    chosen = dataset("coco", tmp_path, split="val", turned="upright")
    assert [s.image().size for s in chosen] == [(H, W)]


def test_a_stored_annotation_is_read_as_stored_or_refused_by_name(tmp_path):
    write(tmp_path, images=1, exif=6)
    sample = opened(tmp_path)[0]
    pixels = np.arange(H * W * 3, dtype=np.uint8).reshape(H, W, 3)
    assert np.array_equal(np.asarray(sample.image()), pixels)
    assert not sample.image().getexif()  # nobody turns it later
    with pytest.raises(InputError, match=r"EXIF.*of the image stored; .*turned='stored'"):
        opened(tmp_path, turned="upright")[0].image()


def test_an_unknown_way_is_refused(tmp_path):
    write(tmp_path)
    with pytest.raises(InputError, match="turned is 'exif': expected one of stored, upright"):
        opened(tmp_path, turned="exif")
