r"""Images at one gate: whatever a user gives for an image becomes upright RGB here, or is refused.

The rules:

* A path (``str`` or ``Path``), encoded ``bytes``, a PIL image, an array (H, W) or (H, W, C) and a
  tensor (C, H, W) are images; C is 1, 2, 3 or 4 (grey or colour, perhaps with opacity). Nothing is
  fetched: an address is refused.
* An image is turned upright as its EXIF data say, whoever opened it.
* White of 8 bits is 255, of 16 bits (``I;16``, uint16) 65535. Types that do not say what is white
  (``I``, ``F``, floats, other integers) have the least of 255 and 65535, with ``F`` and floats of
  1, 255 and 65535, that no value exceeds. Values outside 0 to 65535, NaN and infinity are refused.
* Transparent pixels are shown on white. CMYK, palettes and others are converted as Pillow does it,
  without colour profiles; a mode that it cannot convert is refused.
* An image without a pixel, one that ends early and one of several frames (a GIF, a WebP, pages of a
  TIFF) are refused. Of MPO and PSD the first frame is the image.
"""

from __future__ import annotations

import io
import re
import struct
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from captum_dcam.errors import InputTypeError, MissingFileError, PictureError
from captum_dcam.files import reading

T = TypeVar("T")

#: which of these Pillow raises at a damaged file depends on its format
DAMAGED = (
    OSError,
    SyntaxError,
    ValueError,
    EOFError,
    struct.error,
    Image.DecompressionBombError,
)
#: what :func:`as_image` takes
ImageLike = str | Path | bytes | bytearray | memoryview | Image.Image | NDArray[Any] | Tensor
KINDS = (str, Path, bytes, bytearray, memoryview, Image.Image, np.ndarray, Tensor)
EXPECTED = "a path, bytes of a file, a PIL image, an array (H, W, 3) or a tensor (3, H, W)"
#: how the names of images end
SUFFIXES = (
    *(".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff", ".gif", ".avif"),
    *(".heic", ".heif"),  # by a plug-in of Pillow
)
#: formats whose first frame is the whole image; the others are previews or layers
FIRST_IS_WHOLE = ("MPO", "PSD")
#: the brands of HEIF files, which Pillow reads with a plug-in
HEIF = (b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1")
#: largest values that may be white, where a type does not say which is
WHITE = (255, 65535)
#: where the EXIF orientation is kept in ``Image.info``
_EXIF = ("exif", "xmp", "XML:com.adobe.xmp", "Raw profile type exif")


def as_image(given: ImageLike, *, name: str = "image", upright: bool = True) -> Image.Image:
    r"""An RGB image of whatever stands for one, decoded to its end; see the module for the rules.

    Args:
        given (path, bytes, PIL.Image.Image, array or Tensor): the image. A PIL image that is
            upright RGB already comes back as it is.
        name (str, optional): what errors call an image that has no path. Default: ``"image"``
        upright (bool, optional): turn it as its EXIF data say. False keeps the pixels as they are
            stored, and forgets those data, for masks that were drawn on stored pixels.
            Default: True

    Raises:
        MissingFileError: no such file.
        PictureError: an address, a folder, a file that is no image, damaged, truncated, of several
            frames, too large to be opened safely or of values that have no rule.
        InputTypeError: something else.
    """
    source: Path | io.BytesIO
    if isinstance(given, str | Path):
        where, source = str(given)[:200], _file(given)
    elif isinstance(given, bytes | bytearray | memoryview):
        where, source = f"{name} of {len(given)} bytes", io.BytesIO(given)
    elif isinstance(given, Image.Image):
        return _decoded(given, name, upright)
    elif isinstance(given, np.ndarray | Tensor):
        made = _from_array(given, name)
        return to_rgb(made, name)
    else:
        raise InputTypeError(f"{name} is a {type(given).__name__}: expected {EXPECTED}")
    try:
        with opened(source, where) as file:
            made = _decoded(file, where, upright)
            return made.copy() if made is file else made
    except Image.DecompressionBombError as error:
        raise PictureError(f"{where} is too large to be opened safely: {error}") from error
    except PermissionError as error:
        raise PictureError(f"{where} may not be read: {error.strerror}") from error


def _file(path: str | Path) -> Path:
    """A path to a file that is there."""
    text = str(path)
    shown, path = text[:200], Path(path)
    address = re.match(r"[A-Za-z][A-Za-z0-9+.-]+:/|data:|www\.", text)
    try:
        if path.is_file() and text:
            return path
        there = bool(text) and path.exists()
    except PermissionError as error:
        raise PictureError(f"{shown} may not be read: {error.strerror}") from error
    except (OSError, ValueError):  # too long for a name, a zero byte
        there = False
    if address:
        raise PictureError(
            f"{shown!r} is an address, and nothing is fetched here: save the image to a file and "
            "give its path, or give its bytes"
        )
    if not there:
        raise MissingFileError(
            f"{shown if shown.isprintable() and shown else repr(shown)}: no such file"
        )
    kind = "a folder" if path.is_dir() else "no regular file"
    raise PictureError(f"{shown} is {kind}: expected an image file")


def hidden(path: Path) -> bool:
    r"""Whether a file is none of the user's: macOS puts ``._dog.jpg`` beside ``dog.jpg``."""
    return path.name.startswith(".")


def images_in(folder: Path) -> list[Path]:
    r"""The images of a folder, sorted; MissingFileError without any."""
    with reading(folder):
        if not folder.is_dir():
            raise MissingFileError(f"{folder} is no folder: expected one with images in it")
        found = [p for p in sorted(folder.iterdir()) if p.suffix.lower() in SUFFIXES]
        found = [p for p in found if not hidden(p) and p.is_file()]
    if not found:
        raise MissingFileError(f"{folder} has no images: expected {', '.join(SUFFIXES)}")
    return found


def evenly(items: Sequence[T], most: int | None) -> list[T]:
    """The first of ``most`` equal parts' items; all where there are no more."""
    count = len(items) if most is None else min(most, len(items))
    return [items[n * len(items) // count] for n in range(count)]


def frames_of(path: Path, most: int | None = None) -> list[Image.Image]:
    r"""The frames of an animated image, at most ``most`` of them, evenly spaced.

    Raises:
        MissingFileError, PictureError: as :func:`as_image`; a video file, which Pillow cannot read.
    """
    try:
        with opened(_file(path), str(path)) as file:
            every = range(getattr(file, "n_frames", 1))
            return [_frame(file, n, str(path)) for n in evenly(every, most)]
    except Image.DecompressionBombError as error:
        raise PictureError(f"{path} is too large to be opened safely: {error}") from error
    except PermissionError as error:
        raise PictureError(f"{path} may not be read: {error.strerror}") from error
    except PictureError as error:
        if "is not an image" not in str(error):
            raise
        raise PictureError(
            f"{path} is no animated image (GIF, WebP, PNG): of a video file save the frames into a "
            f"folder, as ffmpeg -i {path.name} -vf fps=1 frames/%04d.png does, and give the folder"
        ) from error


def _frame(file: Image.Image, number: int, where: str) -> Image.Image:
    try:
        file.seek(number)
        return to_rgb(file.copy(), where)
    except Image.DecompressionBombError:
        raise
    except DAMAGED as error:
        raise PictureError(f"{where} is damaged or truncated at frame {number}: {error}") from error


def opened(source: Path | io.BytesIO, where: str) -> Image.Image:
    """Pillow's image of a file, not decoded yet; HEIF by its plug-in.

    Raises:
        PictureError: not an image, or damaged; ``where`` names it.
        PermissionError, DecompressionBombError: as Pillow has them.
    """
    try:
        return Image.open(source)
    except UnidentifiedImageError as error:
        head = _head(source)
        if head[4:8] != b"ftyp" or head[8:12] not in HEIF:
            what = "is empty" if not head else "is not an image in a format that Pillow reads"
            raise PictureError(f"{where} {what}: give a JPEG, PNG or similar") from error
    except (Image.DecompressionBombError, PermissionError):
        raise
    except DAMAGED as error:
        raise PictureError(f"{where} is damaged or truncated: {error}") from error
    try:
        import_module("pillow_heif").register_heif_opener()
        return Image.open(source)
    except ImportError as error:
        raise PictureError(
            f"{where} is a HEIC image, which Pillow reads by a plug-in: pip install pillow-heif, "
            "or save it as JPEG"
        ) from error
    except DAMAGED as error:
        raise PictureError(f"{where} is a HEIC image that is damaged: {error}") from error


def _head(source: Path | io.BytesIO) -> bytes:
    """The first bytes of a file."""
    if isinstance(source, Path):
        with source.open("rb") as file:
            return file.read(12)
    source.seek(0)
    head = source.read(12)
    source.seek(0)
    return head


def _decoded(image: Image.Image, where: str, upright: bool) -> Image.Image:
    """An opened image, read to its end, turned, and in RGB."""
    if not all(image.size):
        raise PictureError(
            f"{where} is {image.width}×{image.height} px: it has no pixels to explain"
        )
    try:
        frames = getattr(image, "n_frames", 1) if image.format not in FIRST_IS_WHOLE else 1
        if frames == 1:
            image.load()  # Pillow reads lazily: a truncated file shows here, not later
    except Image.DecompressionBombError:
        raise
    except DAMAGED as error:
        raise PictureError(f"{where} is damaged or truncated: {error}") from error
    if frames != 1:
        raise PictureError(
            f"{where} holds {frames} frames: choose one (image.seek(number), then image.copy()), "
            "or give all as a captum_dcam.Video (Video.read(path); --video PATH)"
        )
    return to_rgb(_turned(image, where) if upright else _as_stored(image), where)


def _turned(image: Image.Image, where: str) -> Image.Image:
    """The image upright; itself where it is."""
    try:
        if image.getexif().get(ExifTags.Base.Orientation, 1) not in range(2, 9):
            return image
        return ImageOps.exif_transpose(image)
    except DAMAGED as error:
        raise PictureError(
            f"{where} has EXIF data that cannot be read ({error}), so nobody knows whether it is "
            "turned: save it without them"
        ) from error


def _as_stored(image: Image.Image) -> Image.Image:
    """The image without what says that it is turned, or the next one who looks would turn it."""
    if not any(key in image.info for key in _EXIF):
        return image
    image = image.copy()
    image.info = {key: value for key, value in image.info.items() if key not in _EXIF}
    return image


def to_rgb(image: Image.Image, name: str = "image") -> Image.Image:
    """RGB of any mode by the rules above; the pixels are not turned."""
    if image.mode == "RGB" and "transparency" not in image.info:
        return image
    if image.mode[0] in "IF":
        grey = _eight_bits(np.asarray(image), name)
        if isinstance(clear := image.info.get("transparency"), int):
            grey = np.where(np.asarray(image) == clear, np.uint8(255), grey)
        return Image.fromarray(grey).convert("RGB")
    try:
        if image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info:
            rgba = (image.convert("LA") if image.mode == "La" else image).convert("RGBA")
            white = Image.new("RGBA", rgba.size, (255, 255, 255, 255))
            return Image.alpha_composite(white, rgba).convert("RGB")
        return image.convert("RGB")
    except ValueError as error:
        raise PictureError(
            f"{name} has mode {image.mode}, which is not converted to RGB here ({error}): convert "
            "it first"
        ) from error


def _from_array(given: NDArray[Any] | Tensor, name: str) -> Image.Image:
    """An image of an array (H, W) or (H, W, C), or a tensor (H, W) or (C, H, W)."""
    tensor = isinstance(given, Tensor)
    shape, channels = tuple(given.shape), (1, 2, 3, 4)
    here, there = (0, -1) if tensor else (-1, 0)
    if len(shape) not in (2, 3) or (len(shape) == 3 and shape[here] not in channels):
        form = "a tensor (C, H, W)" if tensor else "an array (H, W, C)"
        hint = "one image at a time, with C of 1 to 4"
        if len(shape) == 3 and shape[there] in channels:
            hint = "give image.permute(2, 0, 1)" if tensor else "give image.transpose(1, 2, 0)"
        raise PictureError(f"{name} has shape {shape}: expected {form}; {hint}")
    if 0 in shape:
        raise PictureError(f"{name} has shape {shape}: it has no pixels to explain")
    if isinstance(given, Tensor):
        values = given.detach().cpu()
        values = values.float() if values.is_floating_point() else values
        array = (values.permute(1, 2, 0) if len(shape) == 3 else values).numpy()
    else:
        array = given
    if isinstance(array, np.ma.MaskedArray):
        raise InputTypeError(f"{name} is a masked array: expected values everywhere; give filled()")
    if array.dtype.kind not in "buif":
        raise InputTypeError(f"{name} is an array of {array.dtype}: expected numbers of pixels")
    eight = np.ascontiguousarray(_eight_bits(array, name))
    return Image.fromarray(eight[..., 0] if eight.shape[2:] == (1,) else eight)


def _eight_bits(values: NDArray[Any], name: str) -> NDArray[np.uint8]:
    """Values as 0 to 255, by what is white in their type."""
    kind = values.dtype
    if kind == np.uint8:
        return values
    if kind.kind == "f" and not np.isfinite(values).all():
        bad = int((~np.isfinite(values)).sum())
        raise PictureError(f"{name} holds {bad} values that are NaN or infinite: replace them")
    fixed = {"b": (1,)}.get(kind.kind, (65535,) if kind.kind == "u" and kind.itemsize == 2 else ())
    possible = fixed or ((1, *WHITE) if kind.kind == "f" else WHITE)
    low, high = values.min(), values.max()
    white = next((top for top in possible if high <= top), None)
    if low < 0 or white is None:
        listed = " or ".join(f"0 to {top}" for top in possible)
        raise PictureError(
            f"{name} has values from {low} to {high}: expected {listed}; scale them first (pixels "
            "that a processor has normalised are no image any more: give the image itself)"
        )
    scaled: NDArray[np.uint8] = np.rint(values.astype(np.float64) * (255 / white)).astype(np.uint8)
    return scaled
