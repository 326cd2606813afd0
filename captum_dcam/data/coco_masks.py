r"""Masks as COCO stores them, polygons and run lengths: checked, then drawn by pycocotools."""

from __future__ import annotations

from types import ModuleType

import numpy as np

from captum_dcam.data.common import Mask
from captum_dcam.errors import InputError
from captum_dcam.files import Record
from captum_dcam.packages import needed

#: pixels of the longest outline that is drawn: some 200 MB in pycocotools
OUTLINE = 2_000_000


def need(good: bool, message: str) -> None:
    """InputError with a message where something is not as it should be."""
    if not good:
        raise InputError(message)


def mask_engine() -> ModuleType:
    """What draws polygons and reads run lengths; MissingPackageError without it."""
    return needed("pycocotools.mask", "a data set with COCO's masks")


def union(rows: list[Record], size: tuple[int, int]) -> Mask:
    r"""All pixels (H, W) of some annotations; InputError where they have none."""
    whole = np.zeros(size, dtype=bool)
    for row in rows:
        whole |= decode(row, size)
    if not whole.any():
        listed = ", ".join(str(row["id"]) for row in rows)
        raise InputError(
            f"annotation {listed} of image {rows[0]['image_id']}: its mask has no pixel; leave "
            "such annotations out of the file"
        )
    return whole


def decode(row: Record, size: tuple[int, int]) -> Mask:
    r"""The mask of one annotation, checked: pycocotools leaves memory unset after short runs."""
    shape, where = row.get("segmentation"), f"annotation {row['id']} of image {row['image_id']}"
    if isinstance(shape, list) and shape and all(map(is_outline, shape)):
        # one or two points enclose nothing (and pycocotools takes two for a box)
        parts = [part for part in shape if len(part) >= 6]
        if parts:
            check_outlines(parts, size, where)
            engine = mask_engine()
            rle = engine.merge(engine.frPyObjects(parts, *size))
            polygons: Mask = engine.decode(rle).astype(bool)
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
    whole = all(type(run) is int and run >= 0 for run in runs) and sum(runs) == pixels
    need(whole, f"{where} is damaged: its runs {str(runs)[:80]} do not fill {pixels} pixels")
    return np.repeat(np.arange(len(runs)) % 2 == 1, runs).reshape(size, order="F")


def is_outline(part: object) -> bool:
    r"""A flat list x, y, x, y, … of numbers."""
    if not isinstance(part, list) or len(part) % 2:
        return False
    return all(type(x) in (int, float) for x in part)


def check_outlines(parts: list[list[float]], size: tuple[int, int], where: str) -> None:
    r"""InputError for polygons that pycocotools cannot draw: it writes beyond its memory at large
    numbers, and keeps every fifth of a pixel of an outline."""
    length, most = 0.0, OUTLINE
    for part in parts:
        for axis, side in ((0, size[1]), (1, size[0])):
            bad = next((x for x in part[axis::2] if not -side <= x <= 2 * side), None)
            if bad is not None:
                raise InputError(
                    f"{where}: a polygon goes to {'xy'[axis]} = {str(bad)[:40]}, far outside of "
                    f"the image of {size[1]}×{size[0]} px: is the annotation of another size?"
                )
        steps = np.abs(np.diff(np.array(part + part[:2], dtype=float).reshape(-1, 2), axis=0))
        length += float(steps.max(1).sum())
    need(length <= most, f"{where}: its polygons are {length:.0f} px long: expected {most} at most")


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
        if shift > 60:
            return [-1]  # no image has as many pixels: damaged
        if not (code - 48) & 32:
            value -= ((code - 48) & 16) << (shift - 4)
            runs.append(value + (runs[-2] if len(runs) > 2 else 0))
            value = shift = 0
    return runs
