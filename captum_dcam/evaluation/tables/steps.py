r"""At which steps an image can be explained, and in which words."""

from __future__ import annotations

from collections.abc import Iterator

from captum_dcam.evaluation.frame import Frame
from captum_dcam.evaluation.suites import SHARES
from captum_dcam.evaluation.table import Cell
from captum_dcam.evaluation.tables.engine import (
    TableRow,
    TableSpec,
    register_cells,
    register_notes,
    register_rows,
    settings_note,
)
from captum_dcam.files import Record


def _kind(frame: Frame) -> str:
    """What a part's name says after the suite's: its cache, its wording."""
    return frame.folder.name.partition("-")[2]


@register_rows("shares")
def shares(spec: TableSpec, frames: list[Frame]) -> Iterator[TableRow]:
    """Every share of the steps, cache after cache."""
    for frame in frames:
        cache = _kind(frame)
        for share in SHARES:
            name = f"t = {share:g} S" if share else "prefill" if cache == "prefix" else "t = 0"
            printed = "t = 0" if name == "prefill" else ""
            yield TableRow(f"{cache}: {name}", frame, f"at {share:g}", printed)


@register_rows("shares_and_all")
def shares_and_all(spec: TableSpec, frames: list[Frame]) -> Iterator[TableRow]:
    """Every share of the steps, then all calls, cache after cache."""
    for frame in frames:
        yield from shares(spec, [frame])
        yield TableRow(f"{_kind(frame)}: all calls", frame)


@register_rows("wordings")
def wordings(spec: TableSpec, frames: list[Frame]) -> Iterator[TableRow]:
    """Every variant in every wording."""
    for variant in frames[1].variants:
        for frame in frames:
            printed = _kind(frame) if variant == "paper/full" else ""
            yield TableRow(f"{variant}: {_kind(frame)}", frame, variant, printed)


@register_cells("images_with_map")
def images_with_map(row: TableRow) -> list[Cell]:
    """On how many images of all the maps could be made."""
    done, images, _ = row.frame.status(row.variant)
    return [f"{done}/{images}"]


def _lengths(record: Record) -> list[int]:
    """Length of the hooked sequence at every call."""
    return [length for length, times in record["lengths"] for _ in range(times)]


def _valid(record: Record, call: int, cache: str) -> bool:
    """The paper's criterion; behind a cached prefix only the prefill holds the image."""
    return not (cache == "prefix" and call) and _lengths(record)[call] >= record["image_end"]


def _common(values: list[int]) -> str:
    """The value that all have, or the range."""
    low, high = min(values), max(values)
    return str(low) if low == high else f"{low} to {high}"


@register_cells("valid_calls")
def valid_calls(row: TableRow) -> list[Cell]:
    """Lengths, and how many calls hold the whole image span: at one share, or of all calls."""
    records, cache = row.frame.records, _kind(row.frame)
    if not row.variant:
        calls = sum(r["calls"] for r in records)
        valid = sum(_valid(r, call, cache) for r in records for call in range(r["calls"]))
        return [None, None, f"{valid}/{calls}", f"{100 * valid / calls:.1f} %"]
    share = float(row.variant.removeprefix("at "))
    # behind a cached prefix call 0 is the prefill, and the steps come after it
    first = 1 if cache == "prefix" and share else 0
    at = [(r, first + round(share * (r["steps"] - 1))) for r in records]
    valid = sum(_valid(r, call, cache) for r, call in at)
    return [
        _common([_lengths(r)[call] for r, call in at]),
        _common([r["image_end"] for r in records]),
        f"{valid}/{len(at)}",
        "PASS" if valid == len(at) else "FAIL" if not valid else "some",
    ]


@register_notes("part_settings")
def part_settings(spec: TableSpec, frames: list[Frame], rows: list[TableRow]) -> list[str]:
    """Cache after cache."""
    return [f"{_kind(frame)}: {settings_note(frame)}" for frame in frames]


@register_notes("reasons")
def reasons(spec: TableSpec, frames: list[Frame], rows: list[TableRow]) -> Iterator[str]:
    """Why maps could not be made at some calls, too."""
    for frame in frames:
        found = dict.fromkeys(frame.status(row.variant)[2] for row in rows if row.frame is frame)
        yield from (f"{_kind(frame)}, why not: {why}" for why in found if why)
        yield f"{_kind(frame)}: {settings_note(frame)}"


@register_notes("original_settings")
def original_settings(spec: TableSpec, frames: list[Frame], rows: list[TableRow]) -> list[str]:
    """The other wordings have the same."""
    return [settings_note(frames[1])]
