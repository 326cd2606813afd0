r"""At which steps an image can be explained (Diffusion-CAM, Tables 4 and 5), and in which words."""

from __future__ import annotations

from collections import Counter

from captum_dcam.evaluation.frame import Frame
from captum_dcam.evaluation.suites import SHARES, WORDINGS
from captum_dcam.evaluation.table import Cell, Column, Table
from captum_dcam.evaluation.tables.registry import (
    Printed,
    Results,
    beside,
    localization_cells,
    localization_columns,
    register_table,
    settings_note,
    source_note,
)
from captum_dcam.files import Record
from captum_dcam.model.trajectory import STORED_CACHES


def _parts(results: Results) -> list[tuple[str, Frame]]:
    """The caches that were measured; the error of the first names how to."""
    stored = list(STORED_CACHES.values())
    there = [r for r in stored if results.has(f"feasibility-{r}")]
    return [(r, results.part(f"feasibility-{r}", "feasibility")) for r in there or stored[:1]]


def _lengths(record: Record) -> list[int]:
    """Length of the hooked sequence at every call."""
    return [length for length, times in record["lengths"] for _ in range(times)]


def _valid(record: Record, call: int, regime: str) -> bool:
    """The paper's criterion; behind a cached prefix only the prefill holds the image."""
    if regime == "prefix" and call:
        return False
    return _lengths(record)[call] >= record["image_end"]


def _call_at(record: Record, share: float, regime: str) -> int:
    """Index of the call at a share of the steps; 0 is the prefill behind a cached prefix."""
    step = round(share * (record["steps"] - 1))
    return step + 1 if regime == "prefix" and share else step


@register_table("feasibility")
def feasibility(results: Results) -> Table:
    """Table 4: which calls hold the whole image span."""
    rows: list[tuple[str, tuple[Cell, ...]]] = []
    notes = []
    for regime, frame in _parts(results):
        for share in SHARES:
            at = [(r, _call_at(r, share, regime)) for r in frame.records]
            valid = sum(_valid(r, call, regime) for r, call in at)
            rows.append(
                (
                    f"{regime}: {_step_name(share, regime)}",
                    (
                        _common([_lengths(r)[call] for r, call in at]),
                        _common([r["image_end"] for r, _ in at]),
                        f"{valid}/{len(at)}",
                        "PASS" if valid == len(at) else "FAIL" if not valid else "some",
                    ),
                )
            )
        calls = sum(r["calls"] for r in frame.records)
        good = sum(_valid(r, c, regime) for r in frame.records for c in range(r["calls"]))
        rows.append(
            (f"{regime}: all calls", (None, None, f"{good}/{calls}", _percent(good, calls)))
        )
        notes.append(f"{regime}: {settings_note(frame)}")
    columns = (
        Column("hooked length"),
        Column("image span ends"),
        Column("valid"),
        Column("verdict"),
    )
    notes.append(
        "The paper's Table 4 (LaViDa, prefix cache, 32 steps): 579/551 PASS at the prefill, 64/551 "
        "FAIL at every step, 200/6600 calls valid (3.0 %)."
    )
    return Table(
        "feasibility", "Which calls can be explained (Table 4)", columns, tuple(rows), tuple(notes),
        "call",
    )  # fmt: skip


def _step_name(share: float, regime: str) -> str:
    if not share:
        return "prefill" if regime == "prefix" else "t = 0"
    return f"t = {share:g} S"


def _common(values: list[int]) -> str:
    """The value that all have, or the range."""
    low, high = min(values), max(values)
    return str(low) if low == high else f"{low} to {high}"


def _percent(part: int, whole: int) -> str:
    return f"{100 * part / whole:.1f} %"


@register_table("steps")
def steps(results: Results) -> Table:
    """Table 5: how good the paper's maps are at the calls that are valid."""
    rows: list[tuple[str, list[Cell]]] = []
    notes = []
    for regime, frame in _parts(results):
        for share in SHARES:
            name = f"at {share:g}"
            done, count, _ = frame.status(name)
            cells = localization_cells(frame, name)
            rows.append((f"{regime}: {_step_name(share, regime)}", [f"{done}/{count}", *cells]))
        reasons = Counter(frame.status(f"at {s:g}")[2] for s in SHARES)
        notes += [f"{regime}, why not: {reason}" for reason in reasons if reason]
        notes.append(f"{regime}: {settings_note(frame)}")
    labels = ["t = 0" if label == "prefix: prefill" else None for label, _ in rows]
    columns, merged = beside(
        [Column("valid"), *localization_columns()],
        rows,
        Printed("Diffusion-CAM 5", labels, ("Obj-IoU", "Contrast", "Concentration", "F3")),
    )
    return Table(
        "steps",
        "The paper preset at the valid calls (Table 5)",
        columns,
        merged,
        (*notes, source_note("Diffusion-CAM 5")),
        "image states of",
    )


@register_table("economy")
def economy(results: Results) -> Table:
    """Table 12: the same content in four wordings, teacher-forced."""
    frames = {w: results.part(f"economy-{w}", "economy") for w in WORDINGS}
    rows: list[tuple[str, list[Cell]]] = []
    labels: list[str | None] = []
    variants = frames["original"].variants
    for variant in variants:
        for wording, frame in frames.items():
            rows.append((f"{variant}: {wording}", localization_cells(frame, variant)))
            labels.append(wording if variant == "paper/full" else None)
    columns, merged = beside(
        localization_columns(),
        rows,
        Printed("Diffusion-CAM 12", labels, ("Obj-IoU", "Contrast", "Concentration", "F3")),
    )
    notes = [
        "Pooled Grad-CAM read with the whole answer visible, as in the paper's controlled "
        "comparison, unrefined and with all four modules. The scenes' captions name the same "
        "objects in every wording.",
        settings_note(frames["original"]),
        source_note("Diffusion-CAM 12"),
    ]
    return Table(
        "economy",
        "Wordings of the same content (Table 12, linguistic economy)",
        columns,
        merged,
        tuple(notes),
        "map: wording",
    )
