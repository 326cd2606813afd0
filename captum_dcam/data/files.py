r"""Files of a data set: pictures, label pictures, JSON, id lists; errors that name the image."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable, Collection, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from captum_dcam.errors import FileError, InputError, MissingFileError
from captum_dcam.files import digest, reading

Report = Callable[[Any, str], None]
_ORIENTATION = 0x0112  # EXIF's tag; 5 to 8 swap height and width
#: which of these Pillow raises at a damaged file depends on its format
DAMAGED = (
    OSError,
    SyntaxError,
    ValueError,
    EOFError,
    struct.error,
    Image.DecompressionBombError,
)


def _decoded(path: Path, image_id: object, convert: Callable[[Image.Image], Any]) -> Any:
    where = f"image {image_id}: {path}"
    if not path.is_file():
        raise MissingFileError(f"{where} is missing: fetch it again")
    try:
        with Image.open(path) as stored:
            return convert(stored)
    except DAMAGED as error:
        raise FileError(f"{where} is damaged ({error}): fetch it again") from error


def read_picture(path: Path, image_id: object, size: tuple[int, int] | None = None) -> Image.Image:
    r"""A picture as RGB, as it is stored, decoded to its end.

    Raises:
        FileNotFoundError: no such file.
        OSError: a file that cannot be decoded to its end.
        ValueError: another size than ``size`` (H, W).
    """
    picture: Image.Image = _decoded(path, image_id, lambda stored: stored.convert("RGB"))
    if size is not None and picture.size != size[::-1]:
        raise InputError(
            f"image {image_id}: {path} is {picture.size}, annotated as {size[::-1]} (W, H)"
        )
    return picture


def stored_size(path: Path, image_id: object) -> tuple[int, int]:
    r"""(H, W) by the file's header alone."""
    width, height = _decoded(path, image_id, lambda stored: stored.size)
    return height, width


def oriented_size(path: Path, image_id: object) -> tuple[int, int]:
    r"""(H, W) of the picture turned upright, by the file's header alone."""

    def size(stored: Image.Image) -> tuple[int, int]:
        turned = stored.getexif().get(_ORIENTATION) in (5, 6, 7, 8)
        return stored.size if turned else stored.size[::-1]

    found: tuple[int, int] = _decoded(path, image_id, size)
    return found


def grey_labels(path: Path, image_id: object) -> NDArray[np.int64]:
    r"""Label numbers (H, W) of a greyscale, palette or 16-bit picture.

    Raises:
        FileNotFoundError, OSError: as :func:`read_picture`.
        ValueError: a picture in colour.
    """

    def numbers(stored: Image.Image) -> tuple[str, Any]:
        return stored.mode, np.asarray(stored)

    mode, labels = _decoded(path, image_id, numbers)
    if labels.ndim != 2:
        raise InputError(f"image {image_id}: {path} is {mode}: expected one number a pixel (L, P)")
    return np.asarray(labels, dtype=np.int64)


def panoptic_labels(path: Path, image_id: object) -> NDArray[np.int64]:
    r"""Segment ids (H, W) of a panoptic picture: R + 256 G + 65536 B, as COCO stores them.

    Raises:
        FileNotFoundError, OSError: as :func:`read_picture`.
    """
    colours = np.asarray(read_picture(path, image_id), dtype=np.int64)
    ids: NDArray[np.int64] = colours @ np.array([1, 256, 65536])
    return ids


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


def sort_key(image_id: object) -> tuple[bool, Any]:
    r"""Numbers before strings; either in its own order."""
    return isinstance(image_id, str), image_id


def select(
    known: Collection[Any],
    ids: str | Path | Iterable[Any] | None,
    limit: int | None,
    report: Report,
) -> list[Any]:
    r"""The ids to use, sorted.

    Args:
        known (collection): all there are.
        ids (path or iterable): those wanted, or a file of them: a JSON list, or one a line.
            Default: all
        limit (int): the first so many of them. Default: no limit
        report (callable): told of an id that is not known.
    """
    if limit is not None and (isinstance(limit, bool) or not isinstance(limit, int) or limit < 1):
        raise InputError(f"limit is {limit!r}: expected a whole number of images, 1 or more")
    chosen: set[Any] = set(known)
    if ids is not None:
        source = f"id list {ids}" if isinstance(ids, (str, Path)) else "ids"
        wanted = _listed(Path(ids)) if isinstance(ids, (str, Path)) else list(ids)
        chosen = set()
        for one in wanted:
            found = next((form for form in _forms(one) if form in known), None)
            if found is None:
                report(one, f"{source}: {one!r} is not among the {len(known)} annotated images")
            else:
                chosen.add(found)
    return sorted(chosen, key=sort_key)[:limit]


def _listed(source: Path) -> list[Any]:
    if not source.is_file():
        raise MissingFileError(f"{source} is no file: expected image ids there, one a line")
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
    seen: dict[str, int] = {}
    out = []
    for name in names:
        seen[name] = seen.get(name, 0) + 1
        out.append(name if seen[name] == 1 else f"{name}#{seen[name]}")
    return out
