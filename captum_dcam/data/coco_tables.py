"""The tables of COCO's annotation files: reading, indexing, checking, decoding of masks."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
from numpy.typing import NDArray

Mask = NDArray[np.bool_]
Row = dict[str, Any]


def numbered(rows: list[Row]) -> list[Row]:
    return [{"id": number, **row} for number, row in enumerate(rows, 1)]


def write_json(value: object) -> str:
    return json.dumps(value, sort_keys=True, allow_nan=False, separators=(",", ":"))


def need(good: bool, message: str) -> None:
    if not good:
        raise ValueError(message)


def mask_engine() -> ModuleType:
    try:
        return import_module("pycocotools.mask")
    except ImportError as error:
        raise ImportError("COCO's masks need pycocotools: pip install pycocotools") from error


def annotation_files(root: Path, split: str) -> tuple[Path, Path]:
    folder = root / "annotations"
    return folder / f"instances_{split}.json", folder / f"captions_{split}.json"


def read_table(source: Path, *lists: str) -> Row:
    r"""An annotation file that holds the lists named."""
    if not source.is_file():
        raise FileNotFoundError(f"{source} is no file: expected COCO annotations there")
    try:
        table = json.loads(source.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{source} is damaged or no JSON ({error}): fetch it again") from error
    found = table if isinstance(table, dict) else {}
    lacking = [name for name in lists if not isinstance(found.get(name), list)]
    need(not lacking, f"{source} lacks the lists {lacking}: is it a COCO instances/captions file?")
    return found


def by_id(table: Row, kind: str, fields: Sequence[str], source: Path) -> dict[Any, Row]:
    r"""One list of the table by id, complete and without duplicates."""
    rows: dict[Any, Row] = {}
    for row in table[kind]:
        whole = row if isinstance(row, dict) else {}
        lacking = [name for name in ("id", *fields) if name not in whole]
        need(not lacking, f"{source}: an entry of {kind!r} lacks {lacking}: {str(row)[:200]}")
        need(row["id"] not in rows, f"{source}: id {row['id']} occurs twice in {kind!r}")
        rows[row["id"]] = row
    return rows


def by_image(
    table: Row, fields: Sequence[str], known: set[Any], source: Path
) -> dict[Any, list[Row]]:
    r"""The annotations of every image."""
    rows: dict[Any, list[Row]] = {}
    for row in by_id(table, "annotations", fields, source).values():
        image = row["image_id"]
        need(image in known, f"{source}: annotation {row['id']} names image {image}, not listed")
        rows.setdefault(image, []).append(row)
    return rows


def read_captions(source: Path, known: set[Any]) -> dict[Any, list[Row]]:
    r"""The captions of every image; there may be more images than the instances file lists."""
    table = read_table(source, "annotations")
    known = known | {row.get("id") for row in table.get("images") or []}
    return by_image(table, ("image_id", "caption"), known, source)


def check_paths(images: list[Row], source: Path) -> None:
    for row in images:
        path = Path(row["file_name"])
        inside = not path.is_absolute() and ".." not in path.parts
        need(inside, f"{source}: image {row['id']}: {path} leads out of the images' folder")


def check_categories(
    categories: dict[Any, Row], annotations: dict[Any, list[Row]], source: Path
) -> None:
    names = sorted(str(row["name"]) for row in categories.values())
    need(len(names) == len(set(names)), f"{source}: two categories share a name: {names}")
    for row in (row for rows in annotations.values() for row in rows):
        known = row["category_id"] in categories
        need(
            known,
            f"{source}: annotation {row['id']} names category {row['category_id']}, not listed",
        )


def decode(row: Row, size: tuple[int, int]) -> Mask:
    r"""The mask of one annotation, checked: pycocotools leaves memory unset after short runs."""
    shape, where = row.get("segmentation"), f"annotation {row['id']} of image {row['image_id']}"
    if isinstance(shape, list) and shape and all(is_polygon(part) for part in shape):
        engine = mask_engine()
        polygons: Mask = engine.decode(engine.merge(engine.frPyObjects(shape, *size))).astype(bool)
        return polygons
    if not isinstance(shape, dict) or not {"size", "counts"} <= shape.keys():
        raise ValueError(
            f"{where}: segmentation is {str(shape)[:80]}: expected polygons of at least three "
            f"points, or run lengths with size and counts; leave such annotations out of the file"
        )
    need(list(shape["size"]) == list(size), f"{where}: mask {shape['size']}, image {size} (H, W)")
    runs, pixels = run_lengths(shape["counts"]), size[0] * size[1]
    if any(not isinstance(run, int) or run < 0 for run in runs) or sum(runs) != pixels:
        raise ValueError(
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
