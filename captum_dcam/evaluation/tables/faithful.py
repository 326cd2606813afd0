r"""Is a map faithful to the model? Deletion and insertion, infidelity, sanity checks, placebo."""

from __future__ import annotations

from collections.abc import Iterator

from captum_dcam.evaluation.frame import Frame
from captum_dcam.evaluation.plan import FLOORS
from captum_dcam.evaluation.table import Cell, Column, Figure, Table
from captum_dcam.evaluation.tables.registry import Results, gain, register_table, settings_note
from captum_dcam.methods import METHODS
from captum_dcam.metrics import BootstrapInterval

DEFAULT = "diffusion_cam"
LONG = (
    "Methods of many passes (*) were measured on the first images only; their rows do not compare "
    "with the others' means, but their paired differences do."
)


def _parts(results: Results, name: str) -> list[Frame]:
    """The part of quick methods, and that of long ones where it was measured."""
    suite = "sanity" if name == "sanity" else "faithfulness"
    parts = [results.part(name, suite)]
    return [*parts, results.part(f"{name}-long")] if results.has(f"{name}-long") else parts


def _rows(results: Results, name: str) -> Iterator[tuple[str, Frame, str]]:
    """Label, part and variant of every row: each variant once, in the part of most images."""
    seen: set[str] = set()
    for number, frame in enumerate(_parts(results, name)):
        for variant in frame.variants:
            if variant not in seen:
                seen.add(variant)
                yield _label(variant) + ("*" if number else ""), frame, variant


def _label(variant: str) -> str:
    """A method's label in the table of methods."""
    return METHODS[variant].facts.label if variant in METHODS else variant.replace("_", " ")


def _failures(results: Results, name: str) -> list[str]:
    found = []
    for label, frame, variant in _rows(results, name):
        done, count, why = frame.status(variant)
        if done < count and why:
            found.append(f"{label}: {done} of {count} images ({why})")
    return found


def _mean(frame: Frame, variant: str, metric: str, factor: float = 1.0) -> Cell:
    return Figure.of(frame.values(variant, metric).mean(), factor)


def _over_random(frame: Frame, variant: str, metric: str, sign: int) -> Cell:
    """How much better than the random map's, paired."""
    own, other = frame.values(variant, metric), frame.values("random", metric)
    return Figure.of(own.minus(other).scaled(sign).mean())


@register_table("faithfulness")
def faithfulness(results: Results) -> Table:
    """Deletion and insertion of every method."""
    rows: list[tuple[str, tuple[Cell, ...]]] = []
    for label, frame, variant in _rows(results, "faithfulness"):
        rows.append(
            (
                label,
                (
                    len(frame.values(variant, "insertion")),
                    _mean(frame, variant, "deletion"),
                    _mean(frame, variant, "insertion"),
                    _over_random(frame, variant, "deletion", -1),
                    _over_random(frame, variant, "insertion", 1),
                    _mean(frame, variant, "f3", 100.0),
                ),
            )
        )
    columns = (
        Column("words"),
        Column("deletion", 3, "down"),
        Column("insertion", 3, "up"),
        Column("deletion better than random by", 3, "up"),
        Column("insertion better than random by", 3, "up"),
        Column("F3 %", better="up"),
    )
    frame = results.part("faithfulness")
    notes = (
        "Area under the word's probability as image patches go (deletion) or come (insertion), "
        "highest of the map first, the answer held fixed and the word masked; removed pixels take "
        "the picture's mean colour. Better than random by: paired with a random map on the same "
        "words.",
        LONG,
        *_failures(results, "faithfulness"),
        settings_note(frame),
    )
    return Table(
        "faithfulness", "Deletion and insertion, every method", columns, tuple(rows), notes, "map"
    )


@register_table("rivals")
def rivals(results: Results) -> Table:
    """The default preset against every rival, paired: positive says that the default is better."""
    rows: list[tuple[str, tuple[Cell, ...]]] = []
    for label, frame, variant in _rows(results, "faithfulness"):
        if variant == DEFAULT or variant not in METHODS:
            continue
        ahead = {
            metric: frame.values(DEFAULT, metric).minus(frame.values(variant, metric))
            for metric in ("deletion", "insertion", "pointing")
        }
        rows.append(
            (
                label,
                (
                    len(ahead["insertion"]),
                    gain(frame, DEFAULT, variant),
                    Figure.of(ahead["pointing"].scaled(100).mean()),
                    Figure.of(ahead["deletion"].scaled(-1).mean()),
                    Figure.of(ahead["insertion"].mean()),
                ),
            )
        )
    columns = (
        Column("words"),
        Column("F3, points"),
        Column("pointing, points"),
        Column("deletion", 3),
        Column("insertion", 3),
    )
    notes = (
        "Mean of default minus rival on the same words (deletion: rival minus default). An "
        "interval that holds 0 decides nothing.",
        LONG,
        settings_note(results.part("faithfulness")),
    )
    return Table(
        "rivals",
        "How far the default preset is ahead of every rival",
        columns,
        tuple(rows),
        notes,
        "rival",
    )


@register_table("baselines")
def baselines(results: Results) -> Table:
    """Deletion and insertion with other replacements of pixels."""
    frame = results.part("baselines", "faithfulness")
    kinds = ("blur", "inpaint")
    rows = tuple(
        (
            _label(variant),
            tuple(
                _mean(frame, variant, f"{kind}_{metric}")
                for kind in kinds
                for metric in ("deletion", "insertion")
            ),
        )
        for variant in frame.variants
    )
    columns = tuple(
        Column(f"{metric}, {kind}", 3, better)
        for kind in kinds
        for metric, better in (("deletion", "down"), ("insertion", "up"))
    )
    return Table(
        "baselines",
        "Deletion and insertion: blurred and inpainted pixels",
        columns,
        rows,
        (settings_note(frame),),
        "map",
    )


@register_table("infidelity")
def infidelity(results: Results) -> Table:
    """Captum's infidelity of some methods."""
    frame = results.part("infidelity", "faithfulness")
    random = frame.values("random", "infidelity")
    rows: list[tuple[str, tuple[Cell, ...]]] = []
    for variant in frame.variants:
        own = frame.values(variant, "infidelity")
        better = Figure.of(random.minus(own).mean())
        rows.append((_label(variant), (len(own), Figure.of(own.mean()), better)))
    columns = (
        Column("words"),
        Column("infidelity", 3, "down"),
        Column("better than random by", 3, "up"),
    )
    notes = (
        "Squared logits; the best scale of every map is used, so that scales do not matter.",
        settings_note(frame),
    )
    return Table("infidelity", "Infidelity", columns, tuple(rows), notes, "map")


@register_table("sanity")
def sanity(results: Results) -> Table:
    """Weights drawn anew, answers shuffled, small noise."""
    rows: list[tuple[str, tuple[Cell, ...]]] = []
    for label, frame, variant in _rows(results, "sanity"):
        stages = _stage_count(frame, variant)
        last = [
            Figure.of(frame.values(variant, "randomization_spearman", at=at).mean())
            if stages
            else None
            for at in (0, stages - 1)
        ]
        rows.append(
            (
                label,
                (
                    len(frame.values(variant, "answer_shuffle")),
                    last[0] if stages > 1 else None,
                    last[1],
                    _mean(frame, variant, "answer_shuffle"),
                    _mean(frame, variant, "sensitivity"),
                ),
            )
        )
    columns = (
        Column("words"),
        Column("last block drawn anew", 2, "down"),
        Column("all weights drawn anew", 2, "down"),
        Column("answer shuffled", 2),
        Column("sensitivity", 2, "down"),
    )
    notes = (
        "Rank correlation with the word's own map after the weights were drawn anew (Adebayo et "
        "al. 2018; near 0: the map depends on what was learned) and among shuffled other words; "
        "largest relative change of the map under noise of 2 % of the pixels' range.",
        LONG,
        *_failures(results, "sanity"),
        settings_note(results.part("sanity")),
    )
    return Table("sanity", "Sanity checks, every method", columns, tuple(rows), notes, "map")


def _stage_count(frame: Frame, variant: str) -> int:
    """Stages of the cascade that were measured."""
    found = frame.values(variant, "randomization_spearman").scores
    return found.shape[1] if found.ndim == 2 else 0


@register_table("placebo")
def placebo(results: Results) -> Table:
    """Another object's map in the place of the word's own."""
    rows: list[tuple[str, tuple[Cell, ...]]] = []
    seen: set[str] = set()
    frames = [results.part("plausibility")] if results.has("plausibility") else []
    if results.has("sanity") or not frames:
        frames += _parts(results, "sanity")
    for frame in frames:
        for variant in frame.variants:
            if variant in seen or variant in FLOORS:
                continue
            seen.add(variant)
            cells = _placebo_cells(frame, variant)
            if cells is not None:
                rows.append((_label(variant), cells))
    columns = (
        Column("words"),
        Column("Obj-IoU %, own", better="up"),
        Column("Obj-IoU %, placebo"),
        Column("own minus placebo", better="up"),
        Column("F3 %, own", better="up"),
        Column("F3 %, placebo"),
    )
    notes = (
        "Words of pictures with at least two named objects. Placebo: the map of another object's "
        "word on this word's mask. TAM reports Obj-IoU 27.4 % falling to 6.2 % (Qwen2-VL-2B, COCO "
        "Caption). Methods that are not in the plausibility part have fewer words.",
        settings_note(frames[0]),
    )
    return Table("placebo", "Placebo: another word's map", columns, tuple(rows), notes, "map")


def _placebo_cells(frame: Frame, variant: str) -> tuple[Cell, ...] | None:
    other = frame.values(variant, "placebo_obj_iou")
    if not len(other):
        return None
    own = frame.values(variant, "obj_iou")
    gained = own.minus(other)
    return (
        len(other),
        Figure.of(_on_words_of(frame, variant, "obj_iou", "placebo_obj_iou"), 100.0),
        Figure.of(other.mean(), 100.0),
        Figure.of(gained.mean(), 100.0),
        Figure.of(_on_words_of(frame, variant, "f3", "placebo_f3"), 100.0),
        _mean(frame, variant, "placebo_f3", 100.0),
    )


def _on_words_of(frame: Frame, variant: str, metric: str, other: str) -> BootstrapInterval | None:
    """Mean of a metric on the words where another is defined as well."""
    own = frame.values(variant, metric)
    zero = frame.values(variant, other).scaled(0)
    return own.minus(zero).mean()
