r"""Files of a data set: images, label images, JSON, id lists; errors that name the image."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Sequence
from pathlib import Path
from typing import Any, TypeVar, cast

import numpy as np
from numpy.typing import NDArray
from PIL import ExifTags, Image

from captum_dcam import checks
from captum_dcam.errors import FileError, InputError, MissingFileError, PictureError
from captum_dcam.files import Record, digest, reading
from captum_dcam.model.images import DAMAGED, as_image, opened

T = TypeVar("T")
Report = Callable[[Any, str], None]

# -- images ----------------------------------------------------------------------------------------


def _decoded(path: Path, image_id: object, convert: Callable[[Image.Image], T]) -> T:
    where = f"image {image_id}: {path}"
    if not path.is_file():
        raise MissingFileError(f"{where} is missing: fetch it again")
    try:
        with opened(path, where) as stored:
            return convert(stored)
    except PictureError as error:
        raise FileError(f"{error}; fetch it again") from error
    except DAMAGED as error:
        raise FileError(f"{where} is damaged ({error}): fetch it again") from error


def read_image(
    path: Path,
    image_id: object,
    size: tuple[int, int] | None = None,
    *,
    upright: bool = False,
    otherwise: str = "store the image as it was annotated, without EXIF data",
) -> Image.Image:
    r"""An image in RGB, decoded to its end, as :func:`~captum_dcam.model.images.as_image` has it.

    Args:
        path (Path), image_id: of the image.
        size (tuple): (H, W) that it must have. Default: any
        upright (bool): turn it as its EXIF data say. Default: False, masks fit the pixels as they
            are stored
        otherwise (str): what to do when the annotation fits the image turned the other way.

    Raises:
        FileNotFoundError: no such file.
        OSError: a file that is no image, or cannot be decoded to its end.
        ValueError: another size than ``size``.
    """
    try:
        image = as_image(path, upright=upright)
    except MissingFileError as error:
        raise MissingFileError(f"image {image_id}: {path} is missing: fetch it again") from error
    except PictureError as error:
        raise FileError(f"image {image_id}: {error}; fetch it again") from error
    if size is None or image.size == size[::-1]:
        return image
    where = f"image {image_id}: {path} is {image.size}, annotated as {size[::-1]} (W, H)"
    if stored_size(path, image_id, not upright) == size:
        here, there = ("upright", "stored") if upright else ("stored", "upright")
        where += (
            f": its EXIF data say that it is turned, this is its size {here}, the annotation is of "
            f"the image {there}; {otherwise}"
        )
    raise InputError(where)


def size_fault(size: Sequence[object]) -> str | None:
    r"""What is wrong with the (H, W) of an annotation; None: nothing."""
    if not all(type(side) is int and side > 0 for side in size):
        return f"its size is {tuple(size)} (H, W): expected whole numbers of pixels"
    limit = Image.MAX_IMAGE_PIXELS
    if limit is not None and math.prod(cast(Sequence[int], size)) > 2 * limit:
        return f"its size is {tuple(size)} (H, W): expected at most {2 * limit} pixels, as Pillow"
    return None


def stored_size(path: Path, image_id: object, upright: bool = False) -> tuple[int, int]:
    r"""(H, W) by the file's header alone; with ``upright`` of the image turned as EXIF says."""

    def size(stored: Image.Image) -> tuple[int, int]:
        # orientations 5 to 8 swap height and width
        turned = upright and stored.getexif().get(ExifTags.Base.Orientation) in (5, 6, 7, 8)
        return stored.size if turned else stored.size[::-1]

    return _decoded(path, image_id, size)


def grey_labels(path: Path, image_id: object) -> NDArray[np.int64]:
    r"""Label numbers (H, W) of a greyscale, palette or 16-bit image.

    Raises:
        FileNotFoundError, OSError: as :func:`read_image`.
        ValueError: an image in colour.
    """
    mode, labels = _decoded(path, image_id, lambda stored: (stored.mode, np.asarray(stored)))
    if labels.ndim != 2:
        raise InputError(
            f"image {image_id}: {path} is {mode}: expected one number per pixel (L, P)"
        )
    return labels.astype(np.int64)


def panoptic_labels(path: Path, image_id: object) -> NDArray[np.int64]:
    r"""Segment ids (H, W) of a panoptic image: R + 256 G + 65536 B, as COCO stores them.

    Raises:
        FileNotFoundError, OSError: as :func:`read_image`.
    """
    found = _decoded(path, image_id, lambda stored: np.asarray(stored.convert("RGB")))
    colours = found.astype(np.int64)
    ids: NDArray[np.int64] = colours @ np.array([1, 256, 65536])
    return ids


# -- JSON ------------------------------------------------------------------------------------------


def read_json(source: Path, what: str) -> tuple[Any, str]:
    r"""The content of a JSON file, and a short hash of its bytes."""
    if not source.is_file():
        raise MissingFileError(f"{source} is no file: expected {what} there")
    with reading(source):
        raw = source.read_bytes()
    try:
        return json.loads(raw), digest(raw)[:16]
    except ValueError as error:  # a UnicodeDecodeError is one as well
        raise InputError(f"{source} is damaged or no JSON ({error}): fetch it again") from error


def read_lines(source: Path) -> list[tuple[str, Any]]:
    r"""A file with JSON on every line: ("line 3", what it holds), without the empty lines."""
    try:
        with reading(source):
            text = source.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(f"{source} is damaged or no text in UTF-8 ({error})") from error
    found = []
    for number, line in enumerate(text.split("\n"), 1):  # splitlines cuts inside of texts
        try:
            if line.strip():
                found.append((f"line {number}", json.loads(line)))
        except ValueError as error:
            raise InputError(
                f"{source}, line {number} is damaged or no JSON ({error}): expected one object per "
                f"line"
            ) from error
    return found


def read_table(
    source: Path,
    *lists: str,
    what: str = "COCO annotations",
    kind: str = "a COCO instances/captions file",
) -> tuple[Record, str]:
    r"""A JSON object that holds the lists named, and a short hash of its file."""
    table, short = read_json(source, what)
    found = table if isinstance(table, dict) else {}
    lacking = [name for name in lists if not isinstance(found.get(name), list)]
    if lacking:
        raise InputError(f"{source} lacks the lists {lacking}: is it {kind}?")
    return found, short


def read_entries(
    source: Path,
    what: str,
    report: Report,
    *,
    name: Callable[[Any], str | None],
    fault: Callable[[Any], str | None],
    row: Callable[[str, Any], Record],
) -> tuple[dict[Any, Record], str]:
    r"""A JSON list with one entry per image, as rows by id, and a short hash of its file.

    Args:
        source (Path), what (str): as :func:`read_json`.
        report (callable): told of entries with a fault, whose rows are empty.
        name (callable): the id of an entry; None: its number becomes the id. The second ``x`` is
            ``x#2``.
        fault (callable): what is wrong with an entry; None: nothing.
        row (callable): the row of an id and its entry.
    """
    table, short = read_json(source, what)
    if not isinstance(table, list):
        raise InputError(f"{source} is a {type(table).__name__}: expected a list of images")
    asked = (name(entry) for entry in table)
    names = [f"entry {i}" if one is None else one for i, one in enumerate(asked)]
    rows: dict[Any, Record] = {}
    for image_id, entry in zip(distinct(names), table, strict=True):
        wrong = fault(entry)
        rows[image_id] = {} if wrong else row(image_id, entry)
        if wrong:
            report(image_id, f"{source}: image {image_id}: {wrong}")
    return rows, short


# -- where files are -------------------------------------------------------------------------------


def expect(
    what: str, root: Path, parts: Sequence[tuple[str, Sequence[Path]]], also: str = ""
) -> list[Path]:
    r"""The first path that is there, for every part.

    Args:
        what (str): names the data set in the error.
        root (Path): where the user said it lies.
        parts (sequence): of each, what it is and the paths it may have.
        also (str): ends the error.

    Raises:
        FileNotFoundError: a part is missing; lists what was expected where, and what was found.
    """
    found = [next((path for path in paths if path.exists()), None) for _, paths in parts]
    if all(found):
        return [path for path in found if path]
    listed = "; ".join(
        f"{label} in {' or '.join(map(str, paths))} ({'found' if path else 'missing'})"
        for (label, paths), path in zip(parts, found, strict=True)
    )
    raise MissingFileError(f"no {what} under {root}: expected {listed}{also}")


def inside(name: object) -> bool:
    r"""Whether a file name of an annotation stays in the folder it counts from."""
    if not isinstance(name, str) or not name:
        return False
    path = Path(name)
    return not path.is_absolute() and ".." not in path.parts


# -- ids -------------------------------------------------------------------------------------------


def select(
    known: Collection[Any],
    ids: str | Path | Iterable[Any] | None,
    limit: int | None,
    report: Report,
) -> list[Any]:
    r"""The ids to use, sorted: numbers before strings.

    Args:
        known (collection): all there are.
        ids (path or iterable): those wanted, or a file of them: a JSON list, or one per line.
            Default: all
        limit (int): how many of them, from the first. Default: no limit
        report (callable): told of an id that is not known.
    """
    most = None if limit is None else checks.whole("limit", limit)
    source = "ids"
    if isinstance(ids, (str, Path)):
        source, ids = f"id list {ids}", _listed(Path(ids))
    chosen: set[Any] = set(known) if ids is None else set()
    for one in () if ids is None else ids:
        found = known_as(one, known)
        if found is not None:
            chosen.add(found)
        else:
            report(one, f"{source}: {one!r} is not among the {len(known)} annotated images")
    return sorted(chosen, key=lambda one: (isinstance(one, str), one))[:most]


def _listed(source: Path) -> list[Any]:
    if not source.is_file():
        raise MissingFileError(f"{source} is no file: expected image ids there, one per line")
    try:
        with reading(source):
            text = source.read_text(encoding="utf-8").strip()
        listed = json.loads(text) if text.startswith("[") else text.split()
    except ValueError as error:
        raise InputError(f"{source} is damaged or no id list ({error})") from error
    if not listed:
        raise InputError(f"{source} lists no ids")
    return list(listed)


def known_as(one: object, known: Collection[Any]) -> Any:
    r"""Which of the known ids is meant: as it stands, as a number (``000042``, ``"1"``, ``1.0``),
    or as text; None: none of them."""
    if isinstance(one, np.integer) or (isinstance(one, float) and one.is_integer()):
        one = int(one)
    if isinstance(one, bool) or not isinstance(one, int | str):
        return None
    text = str(one)
    number = [int(text)] if text.isdecimal() and len(text) < 20 else []
    return next((form for form in (one, *number, text) if form in known), None)


def distinct(names: Iterable[str]) -> list[str]:
    r"""Ids from names: the second ``x`` is ``x#2``."""
    seen: Counter[str] = Counter()
    out = []
    for name in names:
        seen[name] += 1
        out.append(name if seen[name] == 1 else f"{name}#{seen[name]}")
    return out
