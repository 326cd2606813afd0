r"""Words on their masks: what the tables of objects and of plausibility compute."""

from __future__ import annotations

from collections.abc import Iterator

from captum_dcam.evaluation.frame import Frame
from captum_dcam.evaluation.published import figures
from captum_dcam.evaluation.table import Cell, Figure
from captum_dcam.evaluation.tables.engine import (
    TableRow,
    TableSpec,
    listed,
    register_cells,
    register_notes,
    register_rows,
)
from captum_dcam.metrics import f1_iou, f3_score
from captum_dcam.refine import DACG_BRANCHES

REFERENCE = "ours/full"


@register_cells("f3_of_means")
def f3_of_means(row: TableRow) -> list[Cell]:
    """F3 of the three means, which is how the papers' tables are made."""
    parts = [row.values(m).mean() for m in ("obj_iou", "contrast", "concentration")]
    means = [float(part.mean) for part in parts if part is not None]
    return [Figure(100 * float(f3_score(*means))) if len(means) == 3 else None]


@register_cells("default_ahead")
def default_ahead(row: TableRow) -> list[Cell]:
    """Points of F3 that the default preset has more; nothing beside itself."""
    ahead = row.difference("f3", of=REFERENCE).mean()
    return [None if row.variant == REFERENCE else Figure.of(ahead, 100.0)]


@register_cells("f3_gained")
def f3_gained(row: TableRow) -> list[Cell]:
    """Points of F3 that the variant has more than its base map; nothing beside this one."""
    base = f"{row.variant.split('/')[0]}/base"
    more = row.difference("f3", minus=base).mean()
    return [None if row.variant == base else Figure.of(more, 100.0)]


@register_cells("branches")
def branches(row: TableRow) -> list[Cell]:
    """Percentage of maps that took each branch of DACG."""
    routes = row.frame.texts(row.variant, "dacg_route")
    whole = len(routes) or 1
    return [Figure(100 * routes.count(b) / whole) if routes else None for b in DACG_BRANCHES]


@register_cells("plausibility")
def plausibility(row: TableRow) -> list[Cell]:
    """Obj-IoU, Func-IoU, F1-IoU of their means, and Func-IoU with every map brought to 0 … 1."""
    objects = row.values("phrase_iou", kinds=("object",)).mean()
    functions = row.values("func_iou_image", kinds=("function",)).mean()
    by_map = row.values("func_iou_map", kinds=("function",)).mean()
    f1 = None
    if objects is not None and functions is not None:
        f1 = Figure(100 * float(f1_iou(float(objects.mean), float(functions.mean))))
    first, second, last = (Figure.of(found, 100.0) for found in (objects, functions, by_map))
    return [first, second, f1, last]


@register_notes("missing_objects")
def missing_objects(spec: TableSpec, frames: list[Frame], rows: list[TableRow]) -> Iterator[str]:
    """Why localisation may not be there."""
    if "object" in frames[0].header["plan"]["words"] and not frames[0].count("object"):
        yield (
            "No word of any answer names an object with a mask: localisation is not defined; "
            "ask for a description (--prompt), or force the data's captions (--answer 0)."
        )


# -- blocks ----------------------------------------------------------------------------------------


def _recommended(frame: Frame) -> int:
    layer: int = frame.header["facts"]["layers"][REFERENCE]
    return layer


def _at(frame: Frame, variant: str, layer: int) -> str:
    """The variant's name at a block; at the recommended one most have no number."""
    numbered = f"{variant}@{layer}"
    return numbered if numbered in frame.variants else variant


@register_rows("recommended_block")
def recommended_block(spec: TableSpec, frames: list[Frame]) -> Iterator[TableRow]:
    """Every listed variant, at this block."""
    for row in listed(spec, frames):
        yield row._replace(variant=_at(row.frame, row.variant, _recommended(row.frame)))


@register_rows("blocks")
def blocks(spec: TableSpec, frames: list[Frame]) -> Iterator[TableRow]:
    """Every listed variant at every block where it was measured, then the published rows."""
    (frame,) = frames
    own = _recommended(frame)
    layers = sorted({int(v.split("@")[1]) for v in frame.variants if "@" in v} | {own})
    for row in listed(spec, frames):
        for layer in layers:
            name = _at(frame, row.variant, layer)
            if name in frame.variants and (name != row.variant or layer == own):
                yield TableRow(f"{row.label}: block {layer}", frame, name)
    for name in figures(spec.published):
        yield TableRow(f"{name} of 32", frame, printed=name)
