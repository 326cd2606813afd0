r"""Labelled spans of stored answers: what every signal says of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from captum_dcam.errors import StoreError
from captum_dcam.evaluation.frame import Frame
from captum_dcam.metrics import MAP_FEATURES
from captum_dcam.results.scores import score_features


class Signal(NamedTuple):
    r"""What may tell true words from invented ones.

    Args:
        label (str): how tables call it; a minus before what speaks against a word.
        metric (str): its column.
        sign (int): 1 where high is said to speak for the word, -1 where low is.
    """

    label: str
    metric: str
    sign: int = 1


#: from the steps, then published rivals, then the word's map
SIGNALS = (
    Signal("probability at the commit step", "probability"),
    Signal("margin over the runner-up", "margin"),
    Signal("− entropy at the commit step", "entropy", -1),
    Signal("− mean entropy up to the commit", "mean_entropy", -1),
    Signal("− flips up to the commit", "flips", -1),
    Signal("fall with a grey picture", "grey"),
    Signal("fall with a blurred picture", "blurred"),
    Signal("− place in the answer", "position", -1),
    Signal("− repetition", "repetition", -1),
    Signal("− mean entropy over all steps (published)", "all_entropy", -1),
    Signal("probability at the last step (published)", "final"),
    Signal("internal confidence (VL-interp)", "internal_confidence"),
    Signal("− prelim attention (PAS)", "prelim_attention", -1),
    Signal("map: fall when its top tenth is erased", "map_erased"),
    Signal("map: overlap inside the phrase", "map_overlap"),
    Signal("map: Moran's I", "map_autocorrelation"),
    *(Signal(f"map: {name}", f"map_{name}") for name in MAP_FEATURES[1:3]),
    Signal("− map: entropy", "map_entropy", -1),
    *(Signal(f"map: {name}", f"map_{name}") for name in MAP_FEATURES[4:]),
    Signal("map: peak before normalising", "map_peak_value"),
    Signal("map: mass before normalising", "map_mass"),
)


@dataclass(frozen=True, eq=False)
class Spans:
    r"""M labelled spans of answers.

    Args:
        true (Tensor): (M,) bool.
        images (Tensor): (M,) int64: spans of one image share a number, also where the image was
            damaged in different ways.
        parts (Tensor): (M,) int64: number of the part.
        place (Tensor): (M,) int64: from 0, the place among the spans of its answer.
        words (tuple of str): the last word of each, in lower case.
        tags (frozenset of str): of all their words.
        signals (dict): name of a metric → (M,) float64, of the word for which it is lowest after
            its sign: a span is as true as its worst word; NaN where it is not defined.
        features (Tensor): (M, F) of the word that was least probable, as
            :class:`captum_dcam.metrics.Calibrator` reads them.
    """

    true: Tensor
    images: Tensor
    parts: Tensor
    place: Tensor
    words: tuple[str, ...]
    tags: frozenset[str]
    signals: dict[str, Tensor]
    features: Tensor

    def __len__(self) -> int:
        return len(self.true)

    @property
    def fitting(self) -> Tensor:
        """(M,) bool: spans of half of the images, for fitting; the others are for trying. Pairs of
        images alternate: what a data set does to every second image is in both halves."""
        return self.images % 4 < 2


class _Read(NamedTuple):
    """One span of one answer."""

    true: bool
    image: str
    part: int
    place: int
    word: str
    values: Mapping[str, float]
    features: tuple[float, ...]


def read_spans(frames: Sequence[Frame]) -> Spans:
    r"""The labelled spans of parts of the suite ``inventions``.

    Raises:
        StoreError: there is none.
    """
    found: list[_Read] = []
    tags: set[str] = set()
    for part, frame in enumerate(frames):
        columns = _columns(frame)
        start = 0
        for record in frame.records:
            words = record["words"]
            rows = {n: columns.get(start + n, {}) for n in range(len(words))}
            start += len(words)
            spans: dict[int, list[int]] = {}
            for n, word in enumerate(words):
                if "probability" in rows[n]:
                    spans.setdefault(word["span"], []).append(n)
                    tags.add(word["tag"])
            for place, own in enumerate(sorted(spans.values(), key=lambda ns: ns[0])):
                least = min(own, key=lambda n: rows[n]["probability"])
                found.append(
                    _Read(
                        words[own[0]]["label"] == "true",
                        repr(record["id"]),
                        part,
                        place,
                        words[own[-1]]["text"].lower(),
                        {s.metric: _worst(s, [rows[n] for n in own]) for s in SIGNALS},
                        _features(rows[least]),
                    )
                )
    if not found:
        folders = ", ".join(str(f.folder) for f in frames)
        raise StoreError(
            f"{folders}: no answer has a labelled word; ask for a description (--prompt), or for "
            "more images"
        )
    known = {image: n for n, image in enumerate(sorted({one.image for one in found}, key=_natural))}
    whole = {name: [getattr(one, name) for one in found] for name in _Read._fields}
    return Spans(
        torch.tensor(whole["true"]),
        torch.tensor([known[image] for image in whole["image"]]),
        torch.tensor(whole["part"]),
        torch.tensor(whole["place"]),
        tuple(whole["word"]),
        frozenset(tags),
        {
            s.metric: torch.tensor([v[s.metric] for v in whole["values"]], dtype=torch.float64)
            for s in SIGNALS
        },
        torch.tensor(whole["features"], dtype=torch.float64),
    )


def _natural(image: str) -> tuple[int, str]:
    """Orders numbers by their size."""
    return len(image), image


def _columns(frame: Frame) -> dict[int, dict[str, float]]:
    """Number of a word in a frame → its values by metric, of the first variant that has them."""
    out: dict[int, dict[str, float]] = {}
    for variant in reversed(frame.variants):
        for metric in frame.metrics:
            found = frame.values(variant, metric)
            for row, value in zip(found.rows.tolist(), found.scores.tolist(), strict=True):
                out.setdefault(row, {})[metric] = value
    return out


def _worst(signal: Signal, rows: Sequence[Mapping[str, float]]) -> float:
    """The lowest of the words' values after its sign; NaN where a word has none."""
    values = [signal.sign * row[signal.metric] for row in rows if signal.metric in row]
    return min(values) if len(values) == len(rows) else float("nan")


def _features(row: Mapping[str, float]) -> tuple[float, ...]:
    columns = (row[name] for name in ("probability", "margin", "entropy", "mean_entropy", "flips"))
    one = (torch.tensor([value], dtype=torch.float64) for value in columns)
    return tuple(score_features(*one)[0].tolist())
