r"""What a map costs, from the seconds that were measured beside the results (Tables 10 and 11)."""

from __future__ import annotations

import statistics
from collections.abc import Iterator
from typing import NamedTuple

from captum_dcam.evaluation.frame import Frame
from captum_dcam.evaluation.suites import BASES, MODULES
from captum_dcam.evaluation.table import Cell, Column, Figure, Table
from captum_dcam.evaluation.tables.registry import (
    Printed,
    Results,
    beside,
    localization_cells,
    register_table,
    source_note,
)

STAGES = ("akd", "dacg", "cba", "sicd")


class Spent(NamedTuple):
    """Of a variant on one image: milliseconds, and the run's peak memory (None: not known)."""

    generation: float
    run: float
    stages: dict[str, float]
    peak_bytes: float | None


def spent(frame: Frame, variant: str) -> Iterator[Spent]:
    """Image after image, where the variant gave maps."""
    for cost in frame.costs:
        own = cost.get("variants", {}).get(variant)
        for run in cost.get("runs", ()) if own is not None else ():
            if variant in run["variants"]:
                stages: dict[str, float] = {}
                for name, seconds in own["stages"]:
                    stages[name] = stages.get(name, 0.0) + 1000 * seconds
                yield Spent(
                    1000 * cost["generation"], 1000 * run["seconds"], stages, run["peak_bytes"]
                )


def _median(values: list[float]) -> Cell:
    return Figure(statistics.median(values)) if values else None


def _ratio(values: list[float], whole: list[float], factor: float = 1.0) -> Cell:
    """Of medians; nothing where there is nothing to divide."""
    if not values or not whole:
        return None
    return Figure(factor * statistics.median(values) / statistics.median(whole))


def _note(frame: Frame) -> str:
    facts = frame.header["facts"]
    return (
        f"Medians over {frame.images} images, all their object words together; {facts['device']}, "
        f"{frame.header['plan']['threads']} thread(s) a process; machine classes and what else ran "
        "are in docs/RESULTS.md. Ratios within a column compare; seconds are the machine's."
    )


@register_table("cost-stages")
def cost_stages(results: Results) -> Table:
    """Table 10: the attribution pass and each module."""
    frame = results.part("objects")
    base = [one.generation + one.run for one in spent(frame, "paper/base")]
    full = list(spent(frame, "paper/full"))
    printed = ["Base attribution pass", "AKD", "DACG", "CBA", "SICD", "Total post-processing"]
    found: list[tuple[str, list[float]]] = [
        ("generation and attribution", base),
        *((stage.upper(), [one.stages[stage] for one in full]) for stage in STAGES),
        ("four modules", [sum(one.stages[stage] for stage in STAGES) for one in full]),
    ]
    rows: list[tuple[str, list[Cell]]] = [
        (label, [_median(own), _ratio(own, base, 100.0)]) for label, own in found
    ]
    columns, merged = beside(
        [Column("ms", 2), Column("% of the first row", 2)],
        rows,
        Printed("Diffusion-CAM 10", printed, ("Time (ms)",)),
    )
    notes = (_note(frame), source_note("Diffusion-CAM 10"))
    return Table("cost-stages", "Time of each stage (Table 10)", columns, merged, notes, "stage")


@register_table("cost")
def cost(results: Results) -> Table:
    """Table 11: an image from question to maps, with each module."""
    frame = results.part("objects")
    printed = {
        "base": "Diffusion-CAM (base)",
        "+akd": "Base + AKD",
        "+dacg": "Base + DACG",
        "+cba": "Base + CBA",
        "+sicd": "Base + SICD",
        "full": "Diffusion-CAM (full)",
    }
    rows: list[tuple[str, list[Cell]]] = []
    labels: list[str | None] = []
    for base in BASES:
        for module in MODULES:
            name = f"{base}/{module}"
            found = list(spent(frame, name))
            whole = [one.generation + one.run + sum(one.stages.values()) for one in found]
            peaks = [one.peak_bytes / 1e6 for one in found if one.peak_bytes is not None]
            if frame.header["facts"]["device"] == "cpu":
                peaks = []  # the high-water mark of a process hides all images but its first
            cells = [
                _median(whole),
                _ratio(whole, [one.generation for one in found]),
                _median(peaks),
                localization_cells(frame, name)[3],
            ]
            rows.append((f"{base}: {module}", cells))
            labels.append(printed[module] if base == "paper" else None)
    own = [
        Column("ms an image", 0),
        Column("× generation alone", 2),
        Column("peak MB over the model", 0),
        Column("F3 %", better="up"),
    ]
    columns, merged = beside(
        own, rows, Printed("Diffusion-CAM 11", labels, ("Time (ms)", "Peak Mem (GB)", "F3"))
    )
    notes = (_note(frame), source_note("Diffusion-CAM 11"))
    return Table("cost", "Time and memory end to end (Table 11)", columns, merged, notes, "map")
