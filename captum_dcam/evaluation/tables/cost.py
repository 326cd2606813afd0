r"""What a map costs, from the seconds that were measured beside the results."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from statistics import median
from typing import NamedTuple

from captum_dcam.evaluation.frame import Frame
from captum_dcam.evaluation.table import Cell, Figure
from captum_dcam.evaluation.tables.engine import TableRow, register_cells

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
                stages: dict[str, float] = defaultdict(float)
                for name, seconds in own["stages"]:
                    stages[name] += 1000 * seconds
                yield Spent(
                    1000 * cost["generation"], 1000 * run["seconds"], stages, run["peak_bytes"]
                )


def _median(values: list[float]) -> Cell:
    return Figure(median(values)) if values else None


def _ratio(values: list[float], whole: list[float], factor: float = 1.0) -> Cell:
    """Of medians; nothing where there is nothing to divide."""
    return Figure(factor * median(values) / median(whole)) if values and whole else None


@register_cells("stage_time")
def stage_time(row: TableRow) -> list[Cell]:
    """Median of a module, of all, or of the pass before them; and its percentage of the latter."""
    base = own = [one.generation + one.run for one in spent(row.frame, "paper/base")]
    if row.variant == "paper/full":
        names = STAGES if row.label == "four modules" else (row.label.lower(),)
        own = [sum(one.stages[n] for n in names) for one in spent(row.frame, row.variant)]
    return [_median(own), _ratio(own, base, 100.0)]


@register_cells("image_cost")
def image_cost(row: TableRow) -> list[Cell]:
    """Median time from the question to the maps, its ratio to generation, and peak memory."""
    found = list(spent(row.frame, row.variant))
    whole = [one.generation + one.run + sum(one.stages.values()) for one in found]
    peaks = [one.peak_bytes / 1e6 for one in found if one.peak_bytes is not None]
    if row.frame.header["facts"]["device"] == "cpu":
        peaks = []  # the high-water mark of a process hides all images but its first
    return [_median(whole), _ratio(whole, [one.generation for one in found]), _median(peaks)]
