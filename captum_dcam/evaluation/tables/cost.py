r"""What a map costs, from the seconds that were measured beside the results (Tables 10 and 11)."""

from __future__ import annotations

import statistics
from collections.abc import Iterator

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


def _stages(frame: Frame, variant: str, stage: str) -> list[float]:
    """Milliseconds of a stage, image after image."""
    return [
        1000 * sum(s for name, s in cost["variants"][variant]["stages"] if name == stage)
        for cost in frame.costs
        if variant in cost.get("variants", {})
    ]


def _attribution(frame: Frame, variant: str) -> Iterator[tuple[float, float, float | None]]:
    """Generation and the run that a variant shares (ms), and the run's peak memory, by image."""
    for cost in frame.costs:
        for run in cost.get("runs", ()):
            if variant in run["variants"]:
                yield 1000 * cost["generation"], 1000 * run["seconds"], run["peak_bytes"]


def _median(values: list[float]) -> Cell:
    return Figure(statistics.median(values)) if values else None


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
    base = list(_attribution(frame, "paper/base"))
    whole = statistics.median([a + b for a, b, _ in base])
    printed = ["Base attribution pass", "AKD", "DACG", "CBA", "SICD", "Total post-processing"]
    times = {stage: _stages(frame, "paper/full", stage) for stage in STAGES}
    total = [sum(parts) for parts in zip(*times.values(), strict=True)]
    found: list[tuple[str, list[float]]] = [
        ("generation and attribution", [a + b for a, b, _ in base]),
        *((stage.upper(), own) for stage, own in times.items()),
        ("four modules", total),
    ]
    rows: list[tuple[str, list[Cell]]] = [
        (label, [_median(own), Figure(100 * statistics.median(own) / whole)])
        for label, own in found
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
            passes = list(_attribution(frame, name))
            stages = [
                1000 * sum(s for _, s in c["variants"][name]["stages"])
                for c in frame.costs
                if name in c.get("variants", {})
            ]
            whole = [a + b + c for (a, b, _), c in zip(passes, stages, strict=True)]
            generation = statistics.median([a for a, _, _ in passes])
            peaks = [p / 1e6 for _, _, p in passes if p is not None]
            f3 = localization_cells(frame, name)[3]
            cells = [
                _median(whole),
                Figure(statistics.median(whole) / generation),
                _median(peaks),
                f3,
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
