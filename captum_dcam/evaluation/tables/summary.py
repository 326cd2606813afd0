r"""Every metric of a single plan, variant by variant."""

from __future__ import annotations

from captum_dcam.evaluation.table import Cell, Column, Figure, Table
from captum_dcam.evaluation.tables.registry import (
    Results,
    register_table,
    scored,
    settings_note,
)


@register_table("summary")
def summary(results: Results) -> Table:
    """Means of all metrics of an evaluation that is no suite."""
    frame = results.part(".")
    names = frame.metrics
    rows: list[tuple[str, tuple[Cell, ...]]] = []
    failures = []
    for variant in frame.variants:
        done, count, why = frame.status(variant)
        if why and done < count:
            failures.append(f"{variant}: {done} of {count} images ({why})")
        means = (Figure.of(scored(frame, variant, name).mean()) for name in names)
        rows.append((variant, tuple(means)))
    if "object" in frame.header["plan"]["words"] and not frame.count("object"):
        failures.append(
            "No word of any answer names an object with a mask: localisation is not defined; "
            "ask for a description (--prompt), or force the data's captions (--answer 0)."
        )
    columns = tuple(Column(name, 3) for name in names)
    notes = (*failures, settings_note(frame))
    return Table("summary", "Means over words", columns, tuple(rows), notes, "variant")
