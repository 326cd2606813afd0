r"""Is the word true? What a generation knows of its own words, and a verdict only where one was
fitted."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

from captum_dcam.files import without_nan

#: where nothing was fitted to the model
UNFITTED = (
    "no calibrator is fitted to this model: scores are no verdict; captum-dcam calibrate "
    "--inventions fits one"
)
#: fields that are texts, and those that are no column of numbers
TEXTS = ("words", "runner_up")
PLAIN = ("calibrator", "below")


@dataclass(frozen=True, eq=False)
class WordScores:
    r"""Scores of N words of one answer. High speaks for the word, but where it says otherwise.

    Of an answer that was given, "commit" is the state that hides one token and shows all others,
    and there is no other: the three entropies are the same, nothing flips, ``final`` is NaN.

    Args:
        words (tuple of str): their text.
        probability (Tensor): (N,) at the step that committed it, of its least sure token.
        margin (Tensor): (N,) by how much that token was more probable than the runner-up.
        runner_up (tuple of str): text of that runner-up.
        entropy (Tensor): (N,) in nats at the commit step, mean over its tokens; low speaks for it.
        mean_entropy (Tensor): (N,) mean over the steps up to the commit; low speaks for it.
        all_entropy (Tensor): (N,) mean over all steps: the published signal, for comparison.
        final (Tensor): (N,) probability at the last step, where it is visible: for comparison.
        commit_step (Tensor): (N,) int64, of its last token.
        flips (Tensor): (N,) int64, how often the likeliest token of its places changed up to the
            commit; few speak for it.
        grey, blurred (Tensor): (N,) fall of its log-probability with a picture of one colour, and
            with a blurred one: was the picture used? NaN in families whose pixels cannot be edited.
        erased (Tensor): (N,) fall of its log-probability where the tenth of the image tokens that
            its map highlights is removed; NaN without a map.
        overlap (Tensor): (N,) of its map with those of the other words of its phrase, the colour
            with its noun: the mean of sum of minima over sum of maxima, 0 to 1; NaN without a map,
            or alone.
        position (Tensor): (N,) int64, of its first token in the answer.
        repetition (Tensor): (N,) int64, how often the word stands in the answer before.
        grounded (Tensor): (N,) probability that it is so, by the calibrator; NaN where there is
            none, or for words of a kind that it was not fitted on.
        calibrator (str): what it was fitted on, or why there is none.
        below (float): words less probable than this are marked; 0 without a calibrator.
    """

    words: tuple[str, ...]
    probability: Tensor
    margin: Tensor
    runner_up: tuple[str, ...]
    entropy: Tensor
    mean_entropy: Tensor
    all_entropy: Tensor
    final: Tensor
    commit_step: Tensor
    flips: Tensor
    grey: Tensor
    blurred: Tensor
    erased: Tensor
    overlap: Tensor
    position: Tensor
    repetition: Tensor
    grounded: Tensor
    calibrator: str = UNFITTED
    below: float = 0.0

    @property
    def doubted(self) -> tuple[bool, ...]:
        """Whether each word is probably not grounded; never without a calibrator."""
        return tuple(p < self.below for p in self.grounded.tolist())  # NaN is not below

    @property
    def fitted(self) -> bool:
        """Whether a calibrator was fitted to the model."""
        return self.below > 0

    @property
    def features(self) -> Tensor:
        """(N, 5) float64, what :class:`captum_dcam.metrics.Calibrator` reads, in its order."""
        return score_features(
            self.probability, self.margin, self.entropy, self.mean_entropy, self.flips
        )

    def records(self) -> list[dict[str, Any]]:
        """One flat record per word, as JSON has it: None for what is not defined."""
        names = [f.name for f in fields(self) if f.name not in PLAIN]
        columns = {n: getattr(self, n) for n in names}
        rows = {n: v.tolist() if isinstance(v, Tensor) else list(v) for n, v in columns.items()}
        return [
            without_nan(dict(zip(rows, row, strict=True))) | {"doubted": doubted}
            for row, doubted in zip(zip(*rows.values(), strict=True), self.doubted, strict=True)
        ]

    # -- saving ---------------------------------------------------------------------------------

    def record(self) -> dict[str, Any]:
        """What a manifest says of them."""
        return {name: getattr(self, name) for name in (*TEXTS, *PLAIN)}

    def tensors(self) -> dict[str, Tensor]:
        """Their tensors by the names that files have for them."""
        return {f"trust.scores.{name}": getattr(self, name) for name in COLUMNS}

    def judged(self, grounded: Tensor, calibrator: str, below: float) -> WordScores:
        """With a calibrator's probabilities (N,)."""
        return replace(self, grounded=grounded, calibrator=calibrator, below=below)


def score_features(
    probability: Tensor, margin: Tensor, entropy: Tensor, mean_entropy: Tensor, flips: Tensor
) -> Tensor:
    """Columns (N,) as a calibrator reads them, (N, 5) float64: log odds, margin, both entropies,
    and log(1 + flips)."""
    odds = probability.double().clamp(1e-9, 1 - 1e-9).logit()
    rest = (margin, entropy, mean_entropy, flips.double().log1p())
    return torch.stack((odds, *(column.double() for column in rest)), dim=1)


#: names of the columns of numbers; of these, whole ones
COLUMNS = tuple(f.name for f in fields(WordScores) if f.name not in (*TEXTS, *PLAIN))
WHOLE = ("commit_step", "flips", "position", "repetition")


def read_scores(record: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> WordScores:
    """The scores of a saved explanation."""
    found: dict[str, Any] = {name: tuple(record[name]) for name in TEXTS}
    found |= {name: record[name] for name in PLAIN}
    found |= {name: tensors[f"trust.scores.{name}"] for name in COLUMNS}
    return WordScores(**found)
