"""What may stand for an image: read by one rule everywhere, or refused by name.

Every case of :data:`REFUSED` is (kind, what is given, exception, words of its message): the message
names what was given, what was expected and the next step, and nothing is left behind.
"""

import io
import os
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
from PIL import Image

import captum_dcam
from captum_dcam.data import dataset
from captum_dcam.errors import FileError, InputTypeError, MissingFileError, PictureError
from captum_dcam.model.images import as_image
from captum_dcam.model.prompts import Video
from captum_dcam.viewer.overlay import overlay

TURN = 0x0112
#: an orientation, and what undoes it
TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
RGB = np.random.default_rng(0).integers(0, 256, (6, 9, 3), dtype=np.uint8)
PLAIN = Image.fromarray(RGB)


def saved(image, kind="PNG", **options):
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def turned(orientation, kind="PNG"):
    exif = Image.Exif()
    exif[TURN] = orientation
    return saved(PLAIN, kind, exif=exif)


def frames(kind, count=3):
    made = [Image.new("RGB", (8, 8), (40 * n, 0, 0)) for n in range(count)]
    return saved(made[0], kind, save_all=True, append_images=made[1:])


def opened(data):
    return Image.open(io.BytesIO(data))


def png16(values, transparency=None):
    """A 16-bit grey PNG, perhaps with a transparent value."""
    import struct
    import zlib

    height, width = values.shape
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)

    def chunk(name, data):
        body = name + data
        return struct.pack(">I", len(data)) + body + struct.pack(">I", zlib.crc32(body))

    header = struct.pack(">IIBBBBB", width, height, 16, 0, 0, 0, 0)
    clear = b"" if transparency is None else chunk(b"tRNS", struct.pack(">H", transparency))
    parts = (
        chunk(b"IHDR", header),
        clear,
        chunk(b"IDAT", zlib.compress(rows)),
        chunk(b"IEND", b""),
    )
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


HEIC = b"\0\0\0\x18ftypheic" + bytes(40)
HALF_PNG, HALF_JPEG = (
    data[: len(data) // 2]
    for data in (saved(tiny.picture(size=(90, 70))), saved(tiny.picture(size=(90, 70)), "JPEG"))
)
NAN = np.full((4, 5), 0.5, np.float32)
NAN[1, 2] = np.nan
INF = torch.zeros(3, 4, 5)
INF[0, 0, 0] = torch.inf


def closed():
    image = opened(saved(PLAIN))
    image.close()
    return image


# -- refused ---------------------------------------------------------------------------------------

REFUSED = [
    ("address", "https://example.org/cat.jpg", PictureError, "is an address.*nothing is fetched"),
    ("address", "http://localhost:8000/a.png?b=c", PictureError, "is an address.*save the image"),
    ("address", "HTTPS://EXAMPLE.ORG/CAT.JPG", PictureError, "is an address"),
    ("address", "file:///tmp/a.png", PictureError, "is an address"),
    ("address", "s3://bucket/a.png", PictureError, "is an address"),
    ("address", "data:image/png;base64,iVBORw0KGgo=", PictureError, "is an address"),
    ("address", "data:image/png;base64," + "A" * 9000, PictureError, "is an address"),
    ("address", Path("https://example.org/cat.jpg"), PictureError, "is an address"),
    ("address", "www.example.org/cat.jpg", PictureError, "is an address"),
    ("path", "photo.jpg", MissingFileError, "photo.jpg: no such file"),
    ("path", Path("no") / "where.png", MissingFileError, "where.png: no such file"),
    ("path", "", MissingFileError, "'': no such file"),
    ("path", "a\0b.png", MissingFileError, "no such file"),
    ("path", "A" * 9000, MissingFileError, "AAA: no such file"),
    ("path", "folder", PictureError, "folder is a folder: expected an image file"),
    ("path", "pipe", PictureError, "pipe is no regular file"),
    ("file", "empty.png", PictureError, "empty.png is empty"),
    ("file", "text.png", PictureError, "text.png is not an image in a format.*JPEG"),
    ("file", "half.png", PictureError, "half.png is damaged or truncated"),
    ("file", "half.jpg", PictureError, "half.jpg is damaged or truncated"),
    ("file", "moving.gif", PictureError, r"moving.gif holds 3 frames: choose one.*Video"),
    ("file", "photo.heic", PictureError, "HEIC image.*pip install pillow-heif.*JPEG"),
    ("bytes", b"", PictureError, "of 0 bytes is empty"),
    ("bytes", b"no image", PictureError, "of 8 bytes is not an image"),
    ("bytes", b"\x89PNG\r\n\x1a\n", PictureError, "not an image|damaged"),
    ("bytes", HALF_PNG, PictureError, "damaged or truncated"),
    ("bytes", bytearray(HALF_JPEG), PictureError, "damaged or truncated"),
    ("bytes", HEIC, PictureError, "HEIC image.*pip install pillow-heif"),
    ("frames", frames("GIF"), PictureError, "holds 3 frames"),
    ("frames", frames("WEBP"), PictureError, "holds 3 frames"),
    ("frames", frames("TIFF"), PictureError, "holds 3 frames"),
    ("frames", frames("PNG"), PictureError, "holds 3 frames"),
    ("frames", lambda: opened(frames("GIF", 2)), PictureError, "image holds 2 frames"),
    ("PIL", lambda: opened(HALF_PNG), PictureError, "image is damaged or truncated"),
    ("PIL", lambda: opened(HALF_JPEG), PictureError, "image is damaged or truncated"),
    ("PIL", closed, PictureError, "image is damaged or truncated.*closed"),
    ("EXIF", saved(PLAIN, exif=b"Exif\0\0garbage"), PictureError, "EXIF data that cannot be read"),
    ("empty", Image.new("RGB", (0, 5)), PictureError, "is 0×5 px: it has no pixels to explain"),
    ("empty", Image.new("L", (5, 0)), PictureError, "is 5×0 px"),
    ("empty", np.zeros((0, 5, 3), np.uint8), PictureError, r"shape \(0, 5, 3\): it has no pixels"),
    ("empty", torch.zeros(3, 4, 0), PictureError, r"shape \(3, 4, 0\): it has no pixels"),
    ("range", Image.fromarray(np.full((3, 3), -1.0, np.float32)), PictureError, "from -1.0 to -1"),
    ("range", Image.fromarray(np.full((3, 3), 7e4, np.float32)), PictureError, "0 to 65535"),
    ("range", Image.fromarray(np.full((3, 3), 70000, np.int32)), PictureError, "from 70000 to"),
    ("range", Image.fromarray(np.full((3, 3), -3, np.int32)), PictureError, "scale them first"),
    ("range", np.full((3, 3), -1, np.int8), PictureError, "from -1 to -1: expected 0 to 255"),
    ("range", torch.randn(3, 8, 8), PictureError, "normalised are no image any more"),
    ("finite", Image.fromarray(NAN), PictureError, "holds 1 values that are NaN or infinite"),
    ("finite", NAN, PictureError, "holds 1 values"),
    ("finite", np.full((4, 4, 3), np.inf), PictureError, "holds 48 values"),
    ("finite", INF, PictureError, "holds 1 values"),
    ("finite", INF.to(torch.bfloat16), PictureError, "holds 1 values"),
    ("shape", np.zeros(5, np.uint8), PictureError, r"shape \(5,\): expected an array \(H, W, C\)"),
    ("shape", np.zeros((2, 4, 4, 3), np.uint8), PictureError, "one image at a time"),
    ("shape", np.zeros((6, 6, 5), np.uint8), PictureError, "one image at a time, with C of 1 to 4"),
    ("shape", np.zeros((3, 40, 50), np.uint8), PictureError, r"image\.transpose\(1, 2, 0\)"),
    ("shape", torch.zeros(1, 3, 4, 5), PictureError, r"expected a tensor \(C, H, W\); one image"),
    ("shape", torch.zeros(40, 50, 3), PictureError, r"image\.permute\(2, 0, 1\)"),
    ("type", None, InputTypeError, "image is a NoneType: expected a path, bytes of a file, a PIL"),
    ("type", 7, InputTypeError, "image is a int"),
    ("type", {"path": "a.png"}, InputTypeError, "image is a dict"),
    ("type", io.BytesIO(b"x"), InputTypeError, "image is a BytesIO"),
    ("type", np.array([["a"]]), InputTypeError, "array of <U1: expected numbers"),
    ("type", np.ma.masked_array(RGB, RGB > 9), InputTypeError, r"masked array.*give filled\(\)"),
    ("type", np.array([[None]]), InputTypeError, "array of object"),
    ("type", {PLAIN.size}, InputTypeError, "image is a set"),
    ("shape", np.array(5), PictureError, r"shape \(\): expected an array"),
    ("type", np.zeros((3, 3), complex), InputTypeError, "array of complex128"),
    ("type", torch.zeros(3, 3, dtype=torch.complex64), InputTypeError, "array of complex64"),
]
CASES = [pytest.param(*case, id=f"{n}-{case[0]}") for n, case in enumerate(REFUSED)]


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A folder with bad files, which is the current one."""
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / "pipe")
    files = {
        "empty.png": b"",
        "text.png": b"no image",
        "half.png": HALF_PNG,
        "half.jpg": HALF_JPEG,
        "moving.gif": frames("GIF"),
        "photo.heic": HEIC,
    }
    for name, data in files.items():
        (tmp_path / name).write_bytes(data)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "pillow_heif", None)
    before = sorted(os.listdir(tmp_path))
    yield tmp_path
    assert sorted(os.listdir(tmp_path)) == before


@pytest.fixture(scope="module")
def adapter():
    made = tiny.adapter("prefix")
    yield made
    assert not tiny.hooks(made.model)


@pytest.mark.parametrize("_kind, given, error, words", CASES)
def test_refused_by_name(here, adapter, _kind, given, error, words):
    def value():
        return given() if callable(given) else given

    with pytest.raises(error, match=words):
        as_image(value())
    with pytest.raises(error, match=words):
        captum_dcam.explain(adapter, value(), tiny.PROMPT, gen_length=2)
    with pytest.raises((error, TypeError), match=words.replace("image ", "image.*")):
        adapter.prepare([[tiny.picture(), value()]], [tiny.PROMPT])
    with pytest.raises(error, match=words.replace("image ", "frame 1.*|image ")):
        Video([PLAIN, value()])
    assert not tiny.hooks(adapter.model)


@pytest.mark.parametrize("name", ("half.png", "photo.heic", "no.png", "https://a.org/b.png"))
def test_the_command_line_refuses_in_one_line(here, monkeypatch, capsys, name):
    from captum_dcam.cli import app

    monkeypatch.setattr(sys, "argv", ["captum-dcam", "explain", name, "-o", str(here / "out")])
    with pytest.raises(SystemExit) as ended:
        app.main()
    err = capsys.readouterr().err
    assert ended.value.code == 2 and name.split("/")[-1] in err and "Traceback" not in err


def test_a_bomb_is_refused(monkeypatch):
    data = saved(Image.new("RGB", (60, 60)))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    with pytest.raises(PictureError, match="too large to be opened safely"):
        as_image(data)


# -- read by one rule ------------------------------------------------------------------------------


def test_one_image_in_every_form_gives_the_same_pixels(tmp_path, adapter):
    (tmp_path / "a.png").write_bytes(saved(PLAIN))
    forms = [
        tmp_path / "a.png",
        str(tmp_path / "a.png"),
        saved(PLAIN),
        bytearray(saved(PLAIN)),
        memoryview(saved(PLAIN)),
        PLAIN,
        opened(saved(PLAIN)),
        RGB,
        RGB.astype(np.uint16) * 257,
        RGB.astype(np.int64),
        RGB / 255,
        (RGB / 255).astype(np.float32),
        RGB[:, ::-1][:, ::-1],  # not contiguous
        torch.from_numpy(RGB).permute(2, 0, 1),
        torch.from_numpy(RGB).permute(2, 0, 1) / 255,
        np.dstack((RGB, np.full(RGB.shape[:2], 255, np.uint8))),
    ]
    expected = adapter.prepare([[PLAIN]], [""]).pixels
    for form in forms:
        found = as_image(form)
        assert found.mode == "RGB" and np.array_equal(np.asarray(found), RGB)
        assert torch.equal(adapter.prepare([[form]], [""]).pixels, expected)
    assert as_image(PLAIN) is PLAIN  # what is upright RGB is not copied


@pytest.mark.parametrize("orientation", TURNS)
def test_exif_is_turned_for_files_bytes_and_opened_images(tmp_path, orientation):
    (tmp_path / "a.png").write_bytes(data := turned(orientation))
    expected = np.asarray(PLAIN.transpose(TURNS[orientation]))
    for form in (tmp_path / "a.png", data, opened(data)):
        found = as_image(form)
        assert np.array_equal(np.asarray(found), expected)
        assert np.array_equal(np.asarray(as_image(found)), expected)  # and not once more
    stored = as_image(data, upright=False)
    assert np.array_equal(np.asarray(stored), RGB)
    assert np.array_equal(np.asarray(as_image(stored)), RGB)  # its masks fit the stored pixels


@pytest.mark.parametrize("orientation", (0, 9, 42))
def test_an_orientation_that_does_not_exist_turns_nothing(orientation):
    assert np.array_equal(np.asarray(as_image(turned(orientation))), RGB)


def test_stored_pixels_need_no_exif():
    data = saved(PLAIN, exif=b"Exif\0\0garbage")
    assert np.array_equal(np.asarray(as_image(data, upright=False)), RGB)


def test_explain_sees_what_the_command_line_sees(adapter, tmp_path):
    (tmp_path / "a.jpg").write_bytes(data := turned(6, "JPEG"))
    found = [
        captum_dcam.explain(adapter, form, tiny.PROMPT, gen_length=2)
        for form in (tmp_path / "a.jpg", opened(data), as_image(data))
    ]
    for one in found:
        assert one.images[0].size == (6, 9) and one.pixel_maps().shape[1:] == (9, 6)
        assert torch.equal(one.maps[0], found[0].maps[0])
    heat = overlay(opened(data), found[0].pixel_maps()[0])
    assert heat.size == (6, 9)


GREY = np.array([[0, 51, 102], [153, 204, 255]])


@pytest.mark.parametrize(
    "given",
    [
        GREY.astype(np.uint8),
        GREY.astype(np.uint16) * 257,
        Image.fromarray(GREY.astype(np.uint16) * 257),  # I;16
        png16(GREY * 257),
        Image.fromarray(GREY.astype(np.int32)),  # I: 255 is white
        Image.fromarray(GREY.astype(np.int32) * 257),  # or 65535
        Image.fromarray((GREY / 255).astype(np.float32)),  # F: 1 is white
        Image.fromarray(GREY.astype(np.float32)),  # or 255
        Image.fromarray(GREY.astype(np.float32) * 257),  # or 65535
        GREY / 255,
        torch.from_numpy(GREY / 255).to(torch.float32)[None],
        torch.from_numpy(GREY),
        GREY.astype(np.uint8)[..., None],
    ],
)
def test_what_is_white(given):
    assert np.array_equal(np.asarray(as_image(given)), np.repeat(GREY[..., None], 3, 2))


def test_white_of_16_bits_does_not_depend_on_the_image():
    dark = np.full((2, 2), 257 * 3, np.uint16)
    for given in (dark, Image.fromarray(dark), png16(dark)):
        assert as_image(given).getpixel((0, 0)) == (3, 3, 3)
    truth = np.array([[True, False]])
    assert np.asarray(as_image(truth))[0, :, 0].tolist() == [255, 0]


def test_transparent_pixels_are_white():
    clear = Image.new("RGBA", (4, 4), (255, 0, 0, 0))
    palette = Image.new("P", (4, 4), 1)
    palette.putpalette([0, 0, 0, 9, 9, 9])
    keyed = np.full((2, 2), 700, np.uint16)
    keyed[0, 0] = 0
    white = [
        clear,
        saved(clear),
        saved(palette, transparency=1),
        saved(palette, "GIF", transparency=1),
        Image.new("LA", (4, 4), (9, 0)),
        np.zeros((4, 4, 4), np.uint8),
        np.zeros((4, 4, 2), np.uint8),
        saved(Image.new("RGB", (4, 4), (1, 2, 3)), transparency=(1, 2, 3)),
        png16(keyed, transparency=700),
    ]
    for given in white:
        assert as_image(given).getpixel((1, 1)) == (255, 255, 255)
    half = Image.new("RGBA", (1, 1), (0, 0, 0, 128))
    assert as_image(half).getpixel((0, 0)) == (127, 127, 127)
    assert as_image(png16(keyed, transparency=700)).getpixel((0, 0)) == (0, 0, 0)


@pytest.mark.parametrize("mode", ("1", "L", "P", "RGBX", "CMYK", "YCbCr", "HSV"))
def test_other_modes_are_converted_as_pillow_does(mode):
    given = tiny.picture(size=(12, 8)).convert("HSV" if mode == "HSV" else mode)
    assert np.array_equal(np.asarray(as_image(given)), np.asarray(given.convert("RGB")))


def test_a_mode_that_cannot_be_converted_is_named(monkeypatch):
    def refuse(self, mode=None, *_args, **_options):
        raise ValueError(f"conversion from {self.mode} to {mode} not supported")

    image = Image.new("LAB", (2, 2))
    monkeypatch.setattr(Image.Image, "convert", refuse)
    with pytest.raises(PictureError, match=r"mode LAB, which is not converted.*convert it first"):
        as_image(image)


def test_the_first_frame_of_a_phones_file_is_the_image():
    both = [tiny.picture(n, (16, 12)) for n in (1, 2)]
    data = saved(both[0], "MPO", save_all=True, append_images=both[1:])
    assert opened(data).n_frames == 2
    found = as_image(data)
    assert np.array_equal(np.asarray(found), np.asarray(opened(data).convert("RGB")))


def test_a_chosen_frame_is_an_image():
    moving = opened(frames("GIF"))
    moving.seek(2)
    assert as_image(moving.copy()).getpixel((0, 0))[0] > 60
    assert as_image(frames("GIF", 1)).size == (8, 8)


@pytest.mark.parametrize("form", (Image.new("RGB", (1, 1)), np.zeros((1, 1), np.uint8)))
def test_one_pixel_is_an_image(adapter, form):
    found = captum_dcam.explain(adapter, form, tiny.PROMPT, gen_length=2)
    assert found.pixel_maps().shape[1:] == (1, 1)


def test_heic_goes_through_its_plug_in(monkeypatch, tmp_path):
    from PIL import ImageFile

    class Heic(ImageFile.ImageFile):
        format = "HEIF"

        def _open(self):
            self._mode, self._size, self.tile = "RGB", (5, 4), []

        def load(self):
            if self._im is None:
                self.im = Image.new("RGB", (5, 4), (1, 2, 3)).im
            return super().load()

    known = dict(Image.OPEN), list(Image.ID)
    plugin = types.ModuleType("pillow_heif")
    plugin.register_heif_opener = lambda: Image.register_open(
        "HEIF", Heic, lambda head: head[4:12] == b"ftypheic"
    )
    monkeypatch.setitem(sys.modules, "pillow_heif", plugin)
    (tmp_path / "a.heic").write_bytes(HEIC)
    try:
        for form in (tmp_path / "a.heic", HEIC):
            assert as_image(form).getpixel((0, 0)) == (1, 2, 3)
    finally:
        Image.OPEN.clear()
        Image.OPEN.update(known[0])
        Image.ID[:] = known[1]


# -- readers ---------------------------------------------------------------------------------------


def test_readers_use_the_same_gate(tmp_path):
    (tmp_path / "images").mkdir()
    (tmp_path / "masks").mkdir()
    files = {
        "turned.png": (turned(6), PLAIN.transpose(TURNS[6])),
        "clear.png": (
            saved(Image.new("RGBA", (3, 2), (9, 9, 9, 0))),
            Image.new("RGB", (3, 2), "white"),
        ),
        "wide.png": (
            png16(GREY * 257),
            Image.fromarray(np.repeat(GREY[..., None].astype(np.uint8), 3, 2)),
        ),
    }
    for name, (data, _) in files.items():
        (tmp_path / "images" / name).write_bytes(data)
    found = {sample.image_id: sample for sample in dataset("folder", tmp_path)}
    for name, (_, expected) in files.items():
        sample = found[Path(name).stem]
        assert np.array_equal(np.asarray(sample.image()), np.asarray(expected))
        assert (sample.height, sample.width) == expected.size[::-1]


@pytest.mark.parametrize("name, data", [("a.heic", HEIC), ("a.gif", frames("GIF"))])
def test_readers_leave_no_image_out_silently(tmp_path, monkeypatch, name, data):
    (tmp_path / "images").mkdir()
    (tmp_path / "masks").mkdir()
    PLAIN.save(tmp_path / "images" / "b.png")
    (tmp_path / "images" / name).write_bytes(data)
    monkeypatch.setitem(sys.modules, "pillow_heif", None)
    with pytest.raises(FileError, match=r"image a: .*(pip install pillow-heif|holds 3 frames)"):
        dataset("folder", tmp_path)[0].image()
    skipping = dataset("folder", tmp_path, missing="skip")
    assert [s.image_id for s in skipping] == ["b"] and skipping.problems[0].image_id == "a"


@pytest.mark.parametrize(
    "data, words",
    [
        (HALF_PNG, "image a: .*a.png is damaged.*fetch it again"),
        (frames("PNG"), "image a: .*holds 3 frames"),
        (png16(GREY)[:50], "image a: .*damaged"),
    ],
)
def test_readers_name_the_image(tmp_path, data, words):
    (tmp_path / "images").mkdir()
    (tmp_path / "masks").mkdir()
    (tmp_path / "images" / "a.png").write_bytes(data)
    with pytest.raises(FileError, match=words):
        for sample in dataset("folder", tmp_path):
            sample.image()
    skipping = dataset("folder", tmp_path, missing="skip")
    assert list(skipping) == [] and skipping.problems[0].image_id == "a"


def test_files_that_macos_leaves_are_passed_over(tmp_path):
    for name in ("images", "masks"):
        (tmp_path / name).mkdir()
    mask = Image.new("L", PLAIN.size, 255)
    PLAIN.save(tmp_path / "images" / "x.png")
    mask.save(tmp_path / "masks" / "x__dog.png")
    for name in ("images/._x.png", "images/._x.jpg", "images/.DS_Store", "masks/._x__dog.png"):
        (tmp_path / name).write_bytes(b"\0\5\26\7")
    data = dataset("folder", tmp_path)
    assert data.ids == ("x",) and list(data[0].masks()) == ["dog"]
