r"""Words with a mask, on their masks: Diffusion-CAM's Tables 1 to 3 and 6 to 9."""

from __future__ import annotations

from captum_dcam.evaluation.frame import Frame
from captum_dcam.evaluation.published import figures
from captum_dcam.evaluation.suites import BASES, MODULES, PERCENTILES, SWEEPS
from captum_dcam.evaluation.table import Cell, Column, Figure, Table
from captum_dcam.evaluation.tables.registry import (
    Printed,
    Results,
    beside,
    gain,
    localization_cells,
    localization_columns,
    register_table,
    settings_note,
    source_note,
)
from captum_dcam.refine import DACG_BRANCHES

PRINTED = ("Obj-IoU", "Contrast", "Concentration", "F3")
#: rows of Table 1: label, variant, the published row
COMPARED = (
    ("oracle: the mask on the token grid", "oracle", None),
    ("Diffusion-CAM, default preset", "ours/full", None),
    ("Diffusion-CAM, paper preset", "paper/full", "Diffusion-CAM"),
    ("Grad-CAM, last step", "paper/base", "Grad-CAM"),
    ("Grad-CAM, commit step", "grad_cam:commit", None),
    ("LLaVA-CAM", "llava_cam", "LLaVA-CAM"),
    ("TAM", "tam", "TAM"),
    ("centre blob", "center_blob", None),
    ("random", "random", None),
)
REFERENCE = "ours/full"


def _frame(results: Results) -> Frame:
    return results.part("objects")


def _recommended(frame: Frame) -> int:
    layer: int = frame.header["facts"]["layers"][REFERENCE]
    return layer


def at_layer(frame: Frame, variant: str, layer: int) -> str:
    """The variant's name at a block; at the recommended one most have no number."""
    numbered = f"{variant}@{layer}"
    return numbered if numbered in frame.variants else variant


@register_table("comparison")
def comparison(results: Results) -> Table:
    """Table 1, between ceiling and floors, with paired differences to the default preset."""
    frame = _frame(results)
    layer = _recommended(frame)
    rows: list[tuple[str, list[Cell]]] = []
    for label, variant, _ in COMPARED:
        name = at_layer(frame, variant, layer)
        behind = None if name == REFERENCE else gain(frame, REFERENCE, name)
        pointing = Figure.of(frame.values(name, "pointing").mean(), 100.0)
        rows.append((label, [*localization_cells(frame, name), pointing, behind]))
    own = [*localization_columns(), Column("pointing %", better="up"), Column("default ahead by")]
    columns, merged = beside(
        own, rows, Printed("Diffusion-CAM 1 COCO", [row for _, _, row in COMPARED], PRINTED)
    )
    notes = (
        f"Block {layer}. Default ahead by: points of F3, paired on the same words. Contrast is "
        "capped at 20, as in F3.",
        settings_note(frame),
        source_note("Diffusion-CAM 1 COCO"),
    )
    return Table("comparison", "Comparison of methods (Table 1)", columns, merged, notes, "method")


@register_table("ablation")
def ablation(results: Results) -> Table:
    """Table 2: every module alone, and all, on the paper's base map and on ours."""
    frame = _frame(results)
    printed = ("Baseline", "+ Denoising", "+ Gating", "+ Attenuation", "+ Debiasing", "Full")
    rows: list[tuple[str, list[Cell]]] = []
    labels: list[str | None] = []
    for base in BASES:
        for module, row in zip(MODULES, printed, strict=True):
            name = f"{base}/{module}"
            more = None if module == "base" else gain(frame, name, f"{base}/base")
            rows.append((f"{base}: {module}", [*localization_cells(frame, name), more]))
            labels.append(row if base == "paper" else None)
    columns, merged = beside(
        [*localization_columns(), Column("F3 gained", 2)],
        rows,
        Printed("Diffusion-CAM 2", labels, PRINTED),
    )
    notes = (
        "paper: pooled Grad-CAM at the last step (Eq. 2 and 4). ours: gradient × centred "
        "activation at the commit step. Modules are applied to the map brought to 0 … 1. "
        "F3 gained: points over the base map, paired on the same words.",
        settings_note(frame),
        source_note("Diffusion-CAM 2"),
    )
    return Table("ablation", "Each module alone (Table 2)", columns, merged, notes, "map")


@register_table("layers")
def layers(results: Results) -> Table:
    """Table 3: blocks."""
    frame = _frame(results)
    found = sorted(
        {int(v.split("@")[1]) for v in frame.variants if "@" in v} | {_recommended(frame)}
    )
    methods = {
        "Diffusion-CAM, paper": "paper/full",
        "Grad-CAM, last step": "paper/base",
        "Diffusion-CAM, default": "ours/full",
        "default, unrefined": "ours/base",
        "LLaVA-CAM": "llava_cam",
    }
    own = localization_columns()
    rows: list[tuple[str, list[Cell]]] = []
    for label, variant in methods.items():
        for layer in found:
            name = at_layer(frame, variant, layer)
            if name in frame.variants and (name != variant or layer == _recommended(frame)):
                rows.append((f"{label}: block {layer}", localization_cells(frame, name)))
    printed: list[str | None] = [*[None] * len(rows), *figures("Diffusion-CAM 3")]
    rows += [(f"{row} of 32", [None] * len(own)) for row in figures("Diffusion-CAM 3")]
    columns, merged = beside(own, rows, Printed("Diffusion-CAM 3", printed, PRINTED))
    notes = (
        f"{frame.header['facts']['blocks']} blocks, counted from 0; the last has no path from the "
        "image to the answer. In a model of 6 the paper's layers 10, 20, 25 and 29 of 32 lie at "
        "about blocks 2, 4, 5 and 5.",
        settings_note(frame),
        source_note("Diffusion-CAM 3"),
    )
    return Table("layers", "Blocks (Table 3)", columns, merged, notes, "map")


def _routed(frame: Frame, name: str) -> list[Cell]:
    """Share of maps that took each branch."""
    routes = frame.texts(name, "dacg_route")
    return [
        Figure(100 * routes.count(branch) / len(routes)) if routes else None
        for branch in DACG_BRANCHES
    ]


def _gating(name: str, title: str, found: dict[str, tuple[str, str]], results: Results) -> Table:
    """DACG alone under changed settings: label → (variant, published row)."""
    frame = _frame(results)
    rows: list[tuple[str, list[Cell]]] = []
    for label, (variant, _) in found.items():
        more = gain(frame, variant, "paper/+dacg")
        rows.append((label, [*localization_cells(frame, variant), more, *_routed(frame, variant)]))
    branches = [Column(f"{branch} %") for branch in DACG_BRANCHES]
    own = [*localization_columns(), Column("F3 gained", 2), *branches]
    printed = Printed(
        name_of_printed(name),
        [row for _, row in found.values()],
        (*PRINTED, *DACG_BRANCHES),
    )
    columns, merged = beside(own, rows, printed)
    notes = (
        "DACG alone on the paper's base map. F3 gained: points over the default setting, paired on "
        "the same words. The branches' shares are of maps.",
        settings_note(frame),
        source_note(name_of_printed(name)),
    )
    return Table(name, title, columns, merged, notes, "setting")


def name_of_printed(name: str) -> str:
    """The published table of each sweep."""
    numbers = {"high_std": 6, "high_mean": 7, "low_mean": 8, "percentiles": 9}
    return f"Diffusion-CAM {numbers[name.removeprefix('gating-')]}"


def _bound(bound: str) -> dict[str, tuple[str, str]]:
    values = SWEEPS[bound]
    return {
        f"{bound} = {v:g}": (
            "paper/+dacg" if v == values[2] else f"paper/dacg:{bound}={v:g}",
            f"{v:.2f}",
        )
        for v in values
    }


@register_table("gating-high_std")
def gating_high_std(results: Results) -> Table:
    """Table 6."""
    return _gating("gating-high_std", "DACG's δσ (Table 6)", _bound("high_std"), results)


@register_table("gating-high_mean")
def gating_high_mean(results: Results) -> Table:
    """Table 7."""
    return _gating("gating-high_mean", "DACG's δμ (Table 7)", _bound("high_mean"), results)


@register_table("gating-low_mean")
def gating_low_mean(results: Results) -> Table:
    """Table 8."""
    return _gating("gating-low_mean", "DACG's δ′μ (Table 8)", _bound("low_mean"), results)


@register_table("gating-percentiles")
def gating_percentiles(results: Results) -> Table:
    """Table 9."""
    rows = ("Dynamic", "All α − 5", "All α + 5", "Fixed α = 85")
    found = {
        label: ("paper/+dacg" if label == "dynamic" else f"paper/dacg:percentiles={label}", row)
        for label, row in zip(PERCENTILES, rows, strict=True)
    }
    return _gating("gating-percentiles", "DACG's percentiles (Table 9)", found, results)
