r"""Which signal tells true words from invented ones: every signal, every damage."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from captum_dcam.errors import StoreError
from captum_dcam.evaluation.frame import RESAMPLES, SEED, Frame
from captum_dcam.evaluation.spans import SIGNALS, Spans, read_spans
from captum_dcam.evaluation.store import Store
from captum_dcam.evaluation.table import Cell, Column, Figure, Table
from captum_dcam.evaluation.tables.engine import Results, register_table
from captum_dcam.metrics import Calibrator, Ranking, expected_calibration_error, ranking

PART = "inventions"
#: fewer spans of a kind than these give no figure
LEAST = 5
CHANCE = (
    "AUROC: the probability that a true phrase scores above an invented one; 0.50 is chance, below "
    "it a signal points the wrong way. A phrase scores as its worst word. Brackets: 95 % "
    "intervals, images resampled with all their phrases."
)


def parts_of(results: Results) -> list[Frame]:
    r"""The parts of the suite that were measured.

    Raises:
        StoreError: none; says how to measure them.
    """
    there = sorted(results.folder.glob(f"{PART}*")) if results.folder.is_dir() else []
    names = [f.name for f in there if Store.exists(f) and results.has(f.name)]
    if not names:
        results.part(PART)
    order = {name: n for n, name in enumerate(_order())}
    names.sort(key=lambda name: (order.get(name.removeprefix(f"{PART}-"), len(order)), name))
    return [results.part(name) for name in names]


def _order() -> Iterator[str]:
    """Names of damages as the suite has them."""
    from captum_dcam.evaluation.suites import DATA

    for damage, strengths in DATA["inventions"]["damages"].items():
        for strength in strengths:
            yield f"{damage}-{strength:g}" if strength else damage


def _label(frame: Frame) -> str:
    """What a part is called: its damage, or its data set."""
    name = frame.folder.name.removeprefix(PART).removeprefix("-")
    return name.replace("-", " ") or str(frame.header["plan"]["dataset"]["name"])


def measured(
    spans: Spans, values: Tensor, keep: Tensor, strata: Tensor | None = None
) -> Ranking | None:
    """How a signal orders the spans that are kept; None where fewer than :data:`LEAST` of a kind
    have it."""
    keep = keep & ~values.isnan()
    true = spans.true[keep]
    if min(int(true.sum()), int((~true).sum())) < LEAST:
        return None
    drawn = torch.Generator().manual_seed(SEED)
    own = None if strata is None else strata[keep]
    return ranking(values[keep], true, spans.images[keep], drawn, strata=own, n=RESAMPLES)


def fitted(spans: Spans) -> Calibrator | None:
    """A calibrator of the spans for fitting; None where these are of one kind."""
    fit = spans.fitting
    if min(int(spans.true[fit].sum()), int((~spans.true[fit]).sum())) < LEAST:
        return None
    return Calibrator.fit(spans.features[fit], spans.true[fit])


def _signals(spans: Spans) -> Iterator[tuple[str, Tensor]]:
    """Every signal that some span has, then the calibrator's probability on its held-out images."""
    for signal in SIGNALS:
        if not bool(spans.signals[signal.metric].isnan().all()):
            yield signal.label, spans.signals[signal.metric]
    if (fit := fitted(spans)) is not None:
        found = fit.probability(spans.features).masked_fill(spans.fitting, torch.nan)
        yield "calibrator, images that it was not fitted on", found


def _counts(spans: Spans, keeps: Sequence[Tensor]) -> list[tuple[str, tuple[Cell, ...]]]:
    """Rows of how many phrases there are, and how many of these are invented."""
    return [
        ("phrases", tuple(int(k.sum()) for k in keeps)),
        ("invented", tuple(int((~spans.true & k).sum()) for k in keeps)),
    ]


def _settings(frames: Sequence[Frame], spans: Spans) -> str:
    """Model, data and versions."""
    plan, facts = frames[0].header["plan"], frames[0].header["facts"]
    kinds = ", ".join(sorted({str(f.header["plan"]["dataset"]["name"]) for f in frames}))
    images = sum(frame.images for frame in frames)
    return (
        f"{plan['model']} ({facts['regime']}, {facts['dtype']}, {facts['device']}, weights "
        f"{facts['weights']}); data {kinds}, {images} answers about "
        f"{len(spans.images.unique())} images, from image {frames[0].header['images']['start']}; "
        f"seed {plan['seed']}; torch {facts['versions']['torch']}."
    )


@register_table("inventions")
def inventions(results: Results) -> Table:
    """AUROC of every signal, true against invented words, under every damage."""
    frames = parts_of(results)
    spans = read_spans(frames)
    keeps = [spans.parts == n for n in range(len(frames))]
    labels = [_label(frame) for frame in frames]
    if len(frames) > 1:
        keeps.append(torch.ones_like(spans.true))
        labels.append("all")
    # where nothing is invented there is nothing to tell apart
    there = [n for n, k in enumerate(keeps) if _both(spans, k)]
    if not there:
        raise StoreError(
            f"{results.folder}: fewer than {LEAST} true or {LEAST} invented phrases; measure more "
            "images, or stronger damages"
        )
    kept = [keeps[n] for n in there]
    rows = _counts(spans, kept)
    rows += [
        (label, tuple(_figure(measured(spans, values, keep), "auroc") for keep in kept))
        for label, values in _signals(spans)
    ]
    left = [labels[n] for n in range(len(keeps)) if n not in there]
    notes = [CHANCE, _settings(frames, spans)]
    if left:
        notes.append(f"Left out, with fewer than {LEAST} of a kind: {', '.join(left)}.")
    columns = tuple(Column(labels[n], 2) for n in there)
    return Table(
        "inventions", "Is the word true? AUROC", columns, tuple(rows), tuple(notes), "signal"
    )


def _both(spans: Spans, keep: Tensor) -> bool:
    return min(int(spans.true[keep].sum()), int((~spans.true[keep]).sum())) >= LEAST


def _figure(found: Ranking | None, name: str) -> Figure | None:
    interval = None if found is None else getattr(found, name)
    return None if interval is None or bool(interval.mean.isnan()) else Figure.of(interval)


@register_table("inventions-more")
def more(results: Results) -> Table:
    """The same signals with average precision, risk and coverage, within place and within word."""
    frames = parts_of(results)
    spans = read_spans(frames)
    texts = {word: n for n, word in enumerate(sorted(set(spans.words)))}
    within = {
        "AUROC within part": spans.parts,
        "within place": spans.place,
        "within word": torch.tensor([texts[word] for word in spans.words]),
    }
    heads = ["AUROC", "average precision", "risk", *within]
    every = torch.ones_like(spans.true)
    rows = []
    for label, values in _signals(spans):
        found = measured(spans, values, every)
        cells: list[Cell] = [_figure(found, n) for n in Ranking._fields]
        inside = (measured(spans, values, every, strata) for strata in within.values())
        cells += [_figure(one, "auroc") for one in inside]
        rows.append((label, tuple(cells)))
    share = float((~spans.true).double().mean())
    notes = (
        CHANCE,
        f"Of all parts together, {len(spans)} phrases, {share:.0%} of them invented, which is the "
        "average precision and the risk of chance. Average precision: of finding invented phrases. "
        "Risk: area under the risk-coverage curve. Within: pairs of one part, of one place in "
        "their answers, of one last word alone.",
        _settings(frames, spans),
    )
    better = {"risk": "down"}
    columns = tuple(Column(head, 2, better.get(head, "up")) for head in heads)
    return Table(
        "inventions-more",
        "Is the word true? All damages together",
        columns,
        tuple(rows),
        notes,
        "signal",
    )


@register_table("inventions-calibrated")
def calibrated(results: Results) -> Table:
    """A calibrator fitted on half of the images and tried on the others: what it marks."""
    frames = parts_of(results)
    spans = read_spans(frames)
    fit = fitted(spans)
    if fit is None:
        raise StoreError(
            f"{results.folder}: fewer than {LEAST} true or {LEAST} invented phrases to fit on; "
            "measure more images"
        )
    probability, held = fit.probability(spans.features), ~spans.fitting
    keeps = [(_label(frame), held & (spans.parts == n)) for n, frame in enumerate(frames)]
    keeps += [("all", held)] if len(frames) > 1 else []
    rows = []
    for label, keep in keeps:
        true, found = spans.true[keep], probability[keep]
        marked = (found < fit.below).double()
        cells: list[Cell] = [int(true.sum()), int((~true).sum())]
        cells.append(_figure(measured(spans, probability, keep), "auroc"))
        cells.append(Figure(expected_calibration_error(found, true)) if len(true) else None)
        for own in (true, ~true):
            cells.append(Figure(100 * float(marked[own].mean())) if bool(own.any()) else None)
        rows.append((label, tuple(cells)))
    columns = (
        Column("true"),
        Column("invented"),
        Column("AUROC", 2, "up"),
        Column("calibration error", 3, "down"),
        Column("true marked %", 1, "down"),
        Column("invented marked %", 1, "up"),
    )
    notes = (
        f"Fitted on {int(spans.fitting.sum())} phrases of half of the images, tried on those of "
        f"the others. Marked: probability of being grounded below {fit.below:g}.",
        _settings(frames, spans),
    )
    return Table(
        "inventions-calibrated", "What a calibrator marks", columns, tuple(rows), notes, "part"
    )
