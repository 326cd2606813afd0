r"""Files of a data set: images, label images, JSON, id lists; errors that name the image."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray
from PIL import ExifTags, Image

from captum_dcam.errors import FileError, InputError, MissingFileError
from captum_dcam.files import Record, digest, reading
from captum_dcam.model.prompts import DAMAGED

T = TypeVar("T")
Report = Callable[[Any, str], None]

# -- images ----------------------------------------------------------------------------------------


def _decoded(path: Path, image_id: object, convert: Callable[[Image.Image], T]) -> T:
    where = f"image {image_id}: {path}"
    if not path.is_file():
        raise MissingFileError(f"{where} is missing: fetch it again")
    try:
        with Image.open(path) as stored:
            return convert(stored)
    except DAMAGED as error:
        raise FileError(f"{where} is damaged ({error}): fetch it again") from error


def read_image(path: Path, image_id: object, size: tuple[int, int] | None = None) -> Image.Image:
    r"""An image as RGB, as it is stored, decoded to its end.

    Raises:
        FileNotFoundError: no such file.
        OSError: a file that cannot be decoded to its end.
        ValueError: another size than ``size`` (H, W).
    """
    image = _decoded(path, image_id, lambda stored: stored.convert("RGB"))
    if size is not None and image.size != size[::-1]:
        raise InputError(
            f"image {image_id}: {path} is {image.size}, annotated as {size[::-1]} (W, H)"
        )
    return image


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
    colours = np.asarray(read_image(path, image_id), dtype=np.int64)
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
    if limit is not None and (isinstance(limit, bool) or not isinstance(limit, int) or limit < 1):
        raise InputError(f"limit is {limit!r}: expected a whole number of images, 1 or more")
    source = "ids"
    if isinstance(ids, (str, Path)):
        source, ids = f"id list {ids}", _listed(Path(ids))
    chosen: set[Any] = set(known) if ids is None else set()
    for one in () if ids is None else ids:
        found = next((form for form in _forms(one) if form in known), None)
        if found is not None:
            chosen.add(found)
        else:
            report(one, f"{source}: {one!r} is not among the {len(known)} annotated images")
    return sorted(chosen, key=lambda one: (isinstance(one, str), one))[:limit]


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


def _forms(one: object) -> list[Any]:
    r"""An id as it stands, as a number (``000042``), and as text."""
    text = str(one)
    return [one, int(text), text] if text.isdecimal() else [one, text]


def distinct(names: Iterable[str]) -> list[str]:
    r"""Ids from names: the second ``x`` is ``x#2``."""
    seen: Counter[str] = Counter()
    out = []
    for name in names:
        seen[name] += 1
        out.append(name if seen[name] == 1 else f"{name}#{seen[name]}")
    return out
