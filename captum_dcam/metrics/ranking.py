r"""Does a score tell true words from invented ones? Ranking, coverage and calibration.

All count a high score for the word, and the invented words are what is to be found. Words of one
image are not independent: intervals resample images.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from captum_dcam.errors import InputError
from captum_dcam.metrics.bootstrap import BootstrapInterval, resampled_weights
from captum_dcam.metrics.logistic import both_kinds, numbers_of
from captum_dcam.packages import needed


class Ranking(NamedTuple):
    r"""How a score orders words, each with a percentile interval over images.

    ``auroc``: the probability that a true word scores above an invented one; ties count half.
    ``average_precision``: of finding the invented words by low scores, without interpolation.
    ``risk``: the area under the risk-coverage curve: the mean share of invented words among the
    words that are kept, over all thresholds; 0 is perfect, the share of invented words is chance.
    """

    auroc: BootstrapInterval
    average_precision: BootstrapInterval
    risk: BootstrapInterval


def ranking(
    scores: Tensor,
    labels: Tensor,
    images: Tensor,
    generator: torch.Generator,
    *,
    strata: Tensor | None = None,
    n: int = 1000,
    level: float = 0.95,
) -> Ranking:
    r"""Measure how a score orders true and invented words.

    Args:
        scores (Tensor): (M,), finite; high speaks for the word.
        labels (Tensor): (M,) bool: True where the word is true; of both kinds.
        images (Tensor): (M,) int64, the image of every word; whole images are resampled.
        generator (torch.Generator): the only source of randomness.
        strata (Tensor, optional): (M,) int64: AUROC compares words of one stratum alone (the same
            place in the answer, the same text); NaN where no stratum has both kinds. Default: all
            are compared
        n (int, optional), level (float, optional): as in :func:`bootstrap_ci`. Resamples without
            both kinds are left out. Default: 1000, 0.95

    Returns:
        Ranking: float64.

    Raises:
        ValueError: other shapes, labels of one kind only, scores that are not finite.

    Source:
        Hanley & McNeil, 1982 (AUROC); Geifman & El-Yaniv, Selective classification for deep neural
        networks, 2017 (risk and coverage).
    """
    row, truth = numbers_of(scores), both_kinds(labels, len(scores))
    if strata is not None and strata.shape != labels.shape:
        raise InputError(
            f"strata have shape {tuple(strata.shape)}: expected one number for each of the "
            f"{len(row)} words"
        )
    drawn = resampled_weights(images, len(row), generator, n, level)
    weights = torch.cat((torch.ones(1, len(row), dtype=torch.float64), drawn))
    values, true = torch.from_numpy(row), torch.from_numpy(truth)
    found = (_auroc(values, true, weights, strata), *_thresholds(values, true, weights))
    tail = torch.tensor([(1 - level) / 2, (1 + level) / 2], dtype=torch.float64)
    return Ranking(
        *(BootstrapInterval(x[0], *torch.nanquantile(x[1:], tail).unbind()) for x in found)
    )


def _auroc(values: Tensor, true: Tensor, weights: Tensor, strata: Tensor | None) -> Tensor:
    """(R,) weighted share of ordered pairs, for weights (R, M)."""
    above, below = values[true], values[~true]
    pairs = (above[:, None] > below).double() + (above[:, None] == below).double() / 2
    there = torch.ones_like(pairs)
    if strata is not None:
        there = (strata[true][:, None] == strata[~true]).double()
    own, other = weights[:, true], weights[:, ~true]
    ordered = ((own @ (pairs * there)) * other).sum(1)
    return ordered / ((own @ there) * other).sum(1)


def _thresholds(values: Tensor, true: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """(R,) average precision of the invented words, and area under the risk-coverage curve."""
    levels, place = values.unique(return_inverse=True)
    empty = weights.new_zeros(len(weights), len(levels))
    every = empty.index_add(1, place, weights)
    wrong = empty.index_add(1, place, weights * ~true)
    # from the lowest score up: what is called invented; from the highest down: what is kept
    precision = wrong.cumsum(1) / every.cumsum(1).clamp_min(1)
    average = (wrong * precision).sum(1) / wrong.sum(1)
    kept, failed = every.flip(1).cumsum(1), wrong.flip(1).cumsum(1)
    risk = (every.flip(1) * failed / kept.clamp_min(1)).sum(1) / every.sum(1)
    return average, risk


def auroc(scores: Tensor, labels: Tensor) -> float:
    r"""Probability that a random True scores above a random False; ties count half.

    Args:
        scores (Tensor): (M,), finite.
        labels (Tensor): (M,) bool, of both kinds.
    """
    sklearn = needed("sklearn.metrics", "auroc")
    return float(sklearn.roc_auc_score(both_kinds(labels, len(scores)), numbers_of(scores)))


def expected_calibration_error(probabilities: Tensor, labels: Tensor, bins: int = 10) -> float:
    r"""Mean distance of predicted probability and observed share, over equally wide bins.

    Args:
        probabilities (Tensor): (M,), in [0, 1]; M at least 1.
        labels (Tensor): (M,) bool.
        bins (int, optional): at least 1; empty ones count nothing. Default: 10

    Source:
        Naeini et al., 2015; Guo et al., 2017, Eq. 3.
    """
    predicted, truth = numbers_of(probabilities), labels.detach().cpu().numpy()
    if len(predicted) == 0 or truth.shape != predicted.shape or truth.dtype != bool or bins < 1:
        raise InputError(
            f"{len(predicted)} probabilities, labels {tuple(labels.shape)} {labels.dtype} and "
            f"{bins} bins: expected as many labels of torch.bool, at least one of each"
        )
    if predicted.min() < 0 or predicted.max() > 1:
        raise InputError(
            f"probabilities reach from {predicted.min()} to {predicted.max()}: expected 0 to 1"
        )
    index = np.minimum((predicted * bins).astype(int), bins - 1)
    gap = np.bincount(index, predicted - truth, minlength=bins)
    return float(np.abs(gap).sum() / len(predicted))
