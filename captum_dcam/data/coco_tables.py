"""The tables of COCO's annotation files: reading, indexing, checking, decoding of masks."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from captum_dcam.data.common import Mask
from captum_dcam.data.files import Report, inside, read_json
from captum_dcam.errors import InputError, MissingPackageError
from captum_dcam.files import Record


def numbered(rows: list[Record]) -> list[Record]:
    return [{"id": number, **row} for number, row in enumerate(rows, 1)]


def need(good: bool, message: str) -> None:
    if not good:
        raise InputError(message)


def mask_engine() -> ModuleType:
    try:
        return import_module("pycocotools.mask")
    except ImportError as error:
        raise MissingPackageError(
            "COCO's masks need pycocotools: pip install pycocotools"
        ) from error


def annotation_files(root: Path, split: str) -> tuple[Path, Path]:
    folder = root / "annotations"
    return folder / f"instances_{split}.json", folder / f"captions_{split}.json"


def read_table(source: Path, *lists: str) -> tuple[Record, str]:
    r"""An annotation file that holds the lists named, and a short hash of it."""
    table, digest = read_json(source, "COCO annotations")
    found = table if isinstance(table, dict) else {}
    lacking = [name for name in lists if not isinstance(found.get(name), list)]
    need(not lacking, f"{source} lacks the lists {lacking}: is it a COCO instances/captions file?")
    return found, digest


def refuse(image_id: object, reason: str) -> None:
    r"""Reports a problem by raising it."""
    raise InputError(reason)


def by_id(
    table: Record, kind: str, fields: Sequence[str], source: Path, report: Report = refuse
) -> dict[Any, Record]:
    r"""One list of the table by id, complete and without duplicates; the others are reported."""
    rows: dict[Any, Record] = {}
    image = "id" if kind == "images" else "image_id"
    for row in table[kind]:
        whole = row if isinstance(row, dict) else {}
        lacking = [name for name in ("id", *fields) if not _given(whole, name)]
        owner = whole[image] if _given(whole, image) else None
        if lacking:
            report(owner, f"{source}: an entry of {kind!r} lacks {lacking}: {str(row)[:200]}")
        elif row["id"] in rows:
            report(owner, f"{source}: id {row['id']} occurs twice in {kind!r}")
        else:
            rows[row["id"]] = row
    return rows


def _given(row: Record, name: str) -> bool:
    r"""Whether a field is there, ids as numbers or strings and names as strings."""
    if name == "name":
        return isinstance(row.get(name), str)
    if name in ("id", "image_id", "category_id"):
        return isinstance(row.get(name), (int, str))
    return name in row


def listed_rows(table: Record, kind: str) -> list[Record]:
    r"""The entries with an id of a list that need not be there, or be whole."""
    rows = table.get(kind)
    return [
        row
        for row in (rows if isinstance(rows, list) else [])
        if isinstance(row, dict) and _given(row, "id")
    ]


def by_image(
    table: Record, fields: Sequence[str], known: set[Any], source: Path, report: Report = refuse
) -> dict[Any, list[Record]]:
    r"""The annotations of every image."""
    rows: dict[Any, list[Record]] = {}
    for row in by_id(table, "annotations", fields, source, report).values():
        image = row["image_id"]
        if image in known:
            rows.setdefault(image, []).append(row)
        else:
            report(image, f"{source}: annotation {row['id']} names image {image}, not listed")
    return rows


def read_captions(
    source: Path, known: set[Any], report: Report
) -> tuple[dict[Any, list[Record]], str]:
    r"""The captions of every image; there may be more images than the instances file lists."""
    table, digest = read_table(source, "annotations")
    known = known | {row["id"] for row in listed_rows(table, "images")}
    rows = by_image(table, ("image_id", "caption"), known, source, report)
    for row in (row for some in rows.values() for row in some):
        if not isinstance(row["caption"], str):
            what = f"caption {row['id']} is {row['caption']!r}: expected text"
            report(row["image_id"], f"{source}: {what}")
    return rows, digest


def check_images(images: Iterable[Record], source: Path, report: Report) -> None:
    for row in images:
        where = f"{source}: image {row['id']}"
        if not inside(row["file_name"]):
            report(row["id"], f"{where}: {row['file_name']} leads out of the images' folder")
        size = (row["height"], row["width"])
        if not all(isinstance(side, int) and side > 0 for side in size):
            report(row["id"], f"{where} is {size} (H, W): expected whole numbers of pixels")


def check_categories(
    categories: dict[Any, Record],
    annotations: dict[Any, list[Record]],
    source: Path,
    report: Report,
) -> None:
    names = sorted(row["name"] for row in categories.values())
    need(len(names) == len(set(names)), f"{source}: two categories share a name: {names}")
    for row in (row for rows in annotations.values() for row in rows):
        if row["category_id"] not in categories:
            what = f"names category {row['category_id']}, not listed"
            report(row["image_id"], f"{source}: annotation {row['id']} {what}")


def decode(row: Record, size: tuple[int, int]) -> Mask:
    r"""The mask of one annotation, checked: pycocotools leaves memory unset after short runs."""
    shape, where = row.get("segmentation"), f"annotation {row['id']} of image {row['image_id']}"
    if isinstance(shape, list) and shape and all(is_polygon(part) for part in shape):
        engine = mask_engine()
        polygons: Mask = engine.decode(engine.merge(engine.frPyObjects(shape, *size))).astype(bool)
        return polygons
    coded = shape if isinstance(shape, dict) else {}
    counts = coded.get("counts")
    if not isinstance(counts, (list, str)) or "size" not in coded:
        raise InputError(
            f"{where}: segmentation is {str(shape)[:80]}: expected polygons of at least three "
            f"points, or run lengths with size and counts; leave such annotations out of the file"
        )
    need(coded["size"] == list(size), f"{where}: mask {coded['size']}, image {size} (H, W)")
    runs, pixels = run_lengths(counts), size[0] * size[1]
    if any(type(run) is not int or run < 0 for run in runs) or sum(runs) != pixels:
        raise InputError(
            f"{where} is damaged: its runs {str(runs)[:80]} do not fill {pixels} pixels"
        )
    filled = np.repeat(np.arange(len(runs)) % 2 == 1, runs)
    return filled.reshape(size, order="F")


def is_polygon(part: object) -> bool:
    r"""A flat list x, y, x, y, … of three points at least (pycocotools takes two for a box)."""
    if not isinstance(part, list) or len(part) < 6 or len(part) % 2:
        return False
    return all(isinstance(x, (int, float)) and math.isfinite(x) for x in part)


def run_lengths(counts: list[int] | str) -> list[int]:
    r"""Run lengths, the first one outside. As a string they are signed base-32 numbers, low digits
    first, bit 5 saying that more follow; from the fourth on they add to the one two before."""
    if not isinstance(counts, str):
        return list(counts)
    runs: list[int] = []
    value = shift = 0
    for code in counts.encode():
        value |= ((code - 48) & 31) << shift
        shift += 5
        if not (code - 48) & 32:
            value -= ((code - 48) & 16) << (shift - 4)
            runs.append(value + (runs[-2] if len(runs) > 2 else 0))
            value = shift = 0
    return runs
