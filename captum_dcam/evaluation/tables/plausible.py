r"""Object words on their masks, function words on nothing: TAM's tables, and ARC's ablation."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from captum_dcam.evaluation.frame import Frame
from captum_dcam.evaluation.table import Cell, Column, Figure, Table
from captum_dcam.evaluation.tables.registry import (
    Printed,
    Results,
    beside,
    register_table,
    settings_note,
    source_note,
)
from captum_dcam.metrics import f1_iou

PRINTED = ("Obj-IoU", "Func-IoU", "F1-IoU")
OWN = (
    Column("Obj-IoU %", better="up"),
    Column("Func-IoU %", better="up"),
    Column("F1-IoU %", better="up"),
    Column("Func-IoU %, map by map"),
)
NOTE = (
    "Obj-IoU: Eq. 8, the best word of a name. Func-IoU: Eq. 9, the share of a function word's map "
    "below the mean Otsu threshold of the image's nouns, on the method's own scale; map by map: "
    "with every map brought to 0 … 1 first, which takes away what a method says by its scale. "
    "F1-IoU: of the two means."
)


class Line(NamedTuple):
    """A row: its label, the variant, and the published row."""

    label: str
    variant: str
    printed: str | None = None


def cells(frame: Frame, variant: str) -> list[Cell]:
    """The four columns of a variant."""
    objects = frame.values(variant, "phrase_iou", ("object",)).mean()
    functions = frame.values(variant, "func_iou_image", ("function",)).mean()
    by_map = frame.values(variant, "func_iou_map", ("function",)).mean()
    both = None
    if objects is not None and functions is not None:
        both = Figure(100 * float(f1_iou(float(objects.mean), float(functions.mean))))
    return [
        Figure.of(objects, 100.0),
        Figure.of(functions, 100.0),
        both,
        Figure.of(by_map, 100.0),
    ]


def _made(
    name: str, title: str, lines: Sequence[Line], printed: str, results: Results, *notes: str
) -> Table:
    frame = results.part("plausibility")
    rows: list[tuple[str, list[Cell]]] = []
    missing = []
    for line in lines:
        done, count, why = frame.status(line.variant)
        if why and done < count:
            missing.append(f"{line.label}: {done} of {count} images ({why})")
        rows.append((line.label, cells(frame, line.variant)))
    columns, merged = beside(OWN, rows, Printed(printed, [r.printed for r in lines], PRINTED))
    said = (NOTE, *notes, *missing, settings_note(frame), source_note(printed))
    return Table(name, title, columns, merged, said, "method")


@register_table("tam-ablation")
def tam_ablation(results: Results) -> Table:
    """TAM's Table 1."""
    lines = [
        Line("neither (logit lens)", "logit_lens", "neither"),
        Line("ECI", "tam:eci", "ECI"),
        Line("rank Gaussian filter", "tam:rgf", "RGF"),
        Line("both: TAM", "tam", "ECI + RGF"),
    ]
    return _made("tam-ablation", "TAM's modules (its Table 1)", lines, "TAM 1", results)


@register_table("tam-effectiveness")
def tam_effectiveness(results: Results) -> Table:
    """TAM's Table 2."""
    lines = [
        Line("baseline (logit lens)", "logit_lens", "Baseline"),
        Line("filter: adaptive median", "tam:adaptive_median", "Adaptive Median"),
        Line("filter: median", "tam:median", "Median Filter"),
        Line("filter: Gaussian", "tam:gaussian", "Gaussian Filter"),
        Line("instead of ECI: feature surgery", "tam:feature_surgery", "Feature surgery"),
        Line("ECI: mean", "tam:mean", "ECI-mean"),
        Line("ECI: attention weights", "tam:attention", "ECI-attnWeights"),
        Line("TAM", "tam", "Ours"),
    ]
    return _made("tam-effectiveness", "TAM's parts replaced (its Table 2)", lines, "TAM 2", results)


@register_table("tam-comparison")
def tam_comparison(results: Results) -> Table:
    """TAM's Table 3, with Diffusion-CAM beside it, between ceiling and floors."""
    lines = [
        Line("oracle: the mask on the token grid", "oracle"),
        Line("Grad-CAM", "grad_cam", "Grad-CAM"),
        Line("Grad-CAM++", "grad_cam++", "Grad-CAM++"),
        Line("Grad-rollout", "grad_rollout", "Grad-Rollout"),
        Line("LayerCAM", "layer_cam", "Layer-CAM"),
        Line("Attention", "attention", "Attention"),
        Line("Attention rollout", "attention_rollout", "Attention-Rollout"),
        Line("CP-LRP", "cp_lrp", "CP-LRP"),
        Line("AttnLRP", "attn_lrp", "Attn-LRP"),
        Line("CAM (logit lens)", "logit_lens", "CAM"),
        Line("Architecture surgery", "architecture_surgery", "ArchiSurgery"),
        Line("TAM", "tam", "TAM"),
        Line("Architecture surgery + TAM", "architecture_surgery+tam", "ArchiSurgery + Ours"),
        Line("Grad-CAM++ + TAM", "grad_cam+++tam", "Grad-CAM++ + Ours"),
        Line("LayerCAM + TAM", "layer_cam+tam", "Layer-CAM + Ours"),
        Line("Diffusion-CAM, default preset", "diffusion_cam"),
        Line("Diffusion-CAM, paper preset", "diffusion_cam_paper"),
        Line("centre blob", "center_blob"),
        Line("random", "random"),
    ]
    note = (
        "Grad-CAM, Grad-CAM++ and LayerCAM are read at the last step, all others at the step that "
        "committed the word. The oracle has maps of object words alone."
    )
    title = "Comparison in TAM's protocol (its Table 3)"
    return _made("tam-comparison", title, lines, "TAM 3 COCO", results, note)


@register_table("arc-ablation")
def arc_ablation(results: Results) -> Table:
    """Table 3 of MSEA and ARC."""
    lines = [
        Line("neither (rank Gaussian filter alone)", "tam:rgf", "neither"),
        Line("ECI-mean", "tam:mean", "Mean mitigation"),
        Line("TAM", "tam", "TAM"),
        Line("ARC", "arc", "ARC"),
        Line("MSEA, max", "msea:max", "Max"),
        Line("MSEA, mean", "msea:mean", "Mean"),
        Line("MSEA, max + ARC", "msea_arc:max", "Max + ARC"),
        Line("MSEA, mean + ARC", "msea_arc:mean", "Mean + ARC"),
    ]
    title = "MSEA and ARC (their Table 3, Qwen2-VL-2B)"
    return _made("arc-ablation", title, lines, "MSEA+ARC 3 Qwen2-VL-2B", results)
