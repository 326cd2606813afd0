r"""What the tables show that is no mean, difference or count of a stored metric: their rows, cells
and notes, as functions that ``tables.toml`` names."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from statistics import median
from typing import NamedTuple

from captum_dcam.evaluation.floors import FLOORS
from captum_dcam.evaluation.frame import Frame
from captum_dcam.evaluation.published import figures
from captum_dcam.evaluation.suites import AFFINITY, SHARES
from captum_dcam.evaluation.table import Cell, Figure
from captum_dcam.evaluation.tables.engine import (
    TableRow,
    TableSpec,
    listed,
    register_cells,
    register_notes,
    register_rows,
    settings_note,
)
from captum_dcam.files import Record
from captum_dcam.methods import METHODS
from captum_dcam.metrics import f1_iou, f3_score
from captum_dcam.refine import DACG_BRANCHES

REFERENCE = "ours/affinity"
DEFAULT = "diffusion_cam"
STAGES = ("akd", "dacg", "cba", "sicd")


# -- words on their masks --------------------------------------------------------------------------


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


# -- every method, each once -----------------------------------------------------------------------


@register_rows("methods")
def methods(spec: TableSpec, frames: list[Frame]) -> Iterator[TableRow]:
    """Every variant in the first part that has it; those of later parts with a star."""
    seen: set[str] = set()
    for frame in frames:
        for variant in frame.variants:
            if variant not in seen:
                star = "*" if frame is not frames[0] else ""
                yield TableRow(_label(variant) + star, frame, variant)
        seen.update(frame.variants)


def _label(variant: str) -> str:
    """What a method's row is called, bare or with affinity. A variant may have a name that is an
    alias of another method, as the papers' ``grad_cam`` has."""
    own = variant.removesuffix(AFFINITY)
    known = own in METHODS.names()
    label = METHODS[own].facts.label if known else own.replace("_", " ")
    return label + variant.removeprefix(own)


@register_rows("rivals")
def rivals(spec: TableSpec, frames: list[Frame]) -> list[TableRow]:
    """Every registered method but the default preset, bare and with affinity."""
    return [
        r
        for r in methods(spec, frames)
        if r.variant.removesuffix(AFFINITY) in METHODS.names() and r.variant != DEFAULT
    ]


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


# -- steps, and wordings of the answer -------------------------------------------------------------


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


# -- seconds and bytes, measured beside the results ------------------------------------------------


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
