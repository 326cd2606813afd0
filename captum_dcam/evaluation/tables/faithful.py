r"""Every method, each once: which rows, and what sanity checks and placebos compute."""

from __future__ import annotations

from collections.abc import Iterator

from captum_dcam.evaluation.floors import FLOORS
from captum_dcam.evaluation.frame import Frame
from captum_dcam.evaluation.table import Cell, Figure
from captum_dcam.evaluation.tables.engine import (
    TableRow,
    TableSpec,
    register_cells,
    register_rows,
)
from captum_dcam.methods import METHODS

DEFAULT = "diffusion_cam"


@register_rows("methods")
def methods(spec: TableSpec, frames: list[Frame]) -> Iterator[TableRow]:
    """Every variant in the first part that has it; those of later parts with a star."""
    seen: set[str] = set()
    for frame in frames:
        for variant in frame.variants:
            if variant not in seen:
                facts = METHODS[variant].facts if variant in METHODS else None
                label = facts.label if facts else variant.replace("_", " ")
                yield TableRow(label + ("*" if frame is not frames[0] else ""), frame, variant)
        seen.update(frame.variants)


@register_rows("rivals")
def rivals(spec: TableSpec, frames: list[Frame]) -> list[TableRow]:
    """Every registered method but the default preset."""
    return [r for r in methods(spec, frames) if r.variant in METHODS and r.variant != DEFAULT]


@register_rows("with_placebo")
def with_placebo(spec: TableSpec, frames: list[Frame]) -> Iterator[TableRow]:
    """Every variant that looks at the model and has a placebo."""
    for row in methods(spec, frames):
        if row.variant not in FLOORS and len(row.values("placebo_obj_iou")):
            yield row._replace(label=row.label.removesuffix("*"))


@register_cells("cascade")
def cascade(row: TableRow) -> list[Cell]:
    """Correlation after the first stage of several, and after the last."""
    found = row.values("randomization_spearman").scores
    stages = found.shape[1] if found.ndim == 2 else 0
    wanted = ((0, stages > 1), (stages - 1, stages > 0))
    return [
        Figure.of(row.values("randomization_spearman", at=at).mean()) if there else None
        for at, there in wanted
    ]


@register_cells("placebo")
def placebo(row: TableRow) -> list[Cell]:
    """The word's own map and the placebo, on the words that have one."""
    own, other = row.values("obj_iou"), row.values("placebo_obj_iou")
    f3, other_f3 = row.values("f3"), row.values("placebo_f3")
    compared = (
        own.minus(other.scaled(0)),  # on the words of the other
        other,
        own.minus(other),
        f3.minus(other_f3.scaled(0)),
        other_f3,
    )
    return [len(other), *(Figure.of(found.mean(), 100.0) for found in compared)]
