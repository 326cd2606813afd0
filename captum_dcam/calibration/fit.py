r"""Fits a preset's thresholds to a model, from maps alone or from maps with masks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from captum_dcam.calibration.chain import SCORES, STATISTICS, Chain
from captum_dcam.calibration.maps import Collection
from captum_dcam.calibration.parameters import (
    PARAMETERS,
    SHARES,
    Stages,
    Values,
    values_of,
    with_values,
)
from captum_dcam.calibration.routing import cut, fit_routing
from captum_dcam.calibration.search import SearchResult, Step, coordinate_descent
from captum_dcam.errors import CalibrationError
from captum_dcam.metrics import BootstrapInterval, cluster_bootstrap
from captum_dcam.refine import DACG, SICD

#: a labelled split below this says nothing about thirty numbers
LEAST_IMAGES, LEAST_WORDS = 10, 20
FOLDS = 5
#: quantiles of map statistics that are written down
QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)
_F3 = SCORES.index("f3")


@dataclass(frozen=True)
class Gain:
    r"""Two settings on the same words: means before and after, the paired difference of F3.

    Args:
        images, words (int): how many.
        before, after (dict): mean of every column of
            :data:`~captum_dcam.calibration.chain.SCORES`; ``contrast`` capped at 20 as in F3.
        gain (float): mean difference of F3, word by word.
        low, high (float): its 95 % interval, images resampled with all their words.
    """

    images: int
    words: int
    before: dict[str, float]
    after: dict[str, float]
    gain: float
    low: float
    high: float


@dataclass(frozen=True)
class Calibration:
    r"""What was fitted.

    Args:
        labelled (bool): from masks, or from maps alone.
        start, fitted (tuple of Refinement): the stages before and after.
        before, after (dict): every parameter that the start has, by name.
        routing (tuple of dict): shares of DACG's branches before and after.
        gated (tuple): share of the maps that SICD touches, before and after.
        statistics (dict): quantiles :data:`QUANTILES` of mean, std and skewness: of base maps from
            0 to 1 (``base``), and as they come to ``dacg`` and ``sicd``, before the fit.
        images, words (int): how many were fitted on.
        own (Gain or None): on the words that were fitted on: flatters. None without labels.
        held (Gain or None): cross-validated: every word by a search that did not see its image.
        steps (tuple of Step): changes of the search.
    """

    labelled: bool
    start: Stages
    fitted: Stages
    before: Values
    after: Values
    routing: tuple[dict[str, float], dict[str, float]]
    gated: tuple[float | None, float | None]
    statistics: dict[str, dict[str, list[float]]] = field(repr=False)
    images: int
    words: int
    own: Gain | None = None
    held: Gain | None = None
    steps: tuple[Step, ...] = ()

    @property
    def changed(self) -> list[str]:
        """Names of the parameters that are not what they were."""
        return [name for name, value in self.before.items() if self.after[name] != value]


def fit_unlabelled(collection: Collection, stages: Stages) -> Calibration:
    r"""Fit the bounds of DACG and of SICD's gate by :func:`~captum_dcam.calibration.fit_routing`.

    Looks at no mask. The same maps give the same numbers.

    Raises:
        CalibrationError: too few maps, or stages without such bounds.
    """
    chain, before = Chain(collection), values_of(stages)
    found = fit_routing(chain, stages)
    return _calibration(chain, stages, before, {**before, **found}, labelled=False)


def fit_labelled(
    collection: Collection,
    stages: Stages,
    *,
    seed: int = 0,
    folds: int = FOLDS,
    say: Callable[[str], None] = lambda _: None,
) -> Calibration:
    r"""Search for the parameters with the highest mean F3 over words.

    :func:`~captum_dcam.calibration.coordinate_descent` over what
    :data:`~captum_dcam.calibration.PARAMETERS` lists for each. Candidates of a threshold are those
    that :data:`~captum_dcam.calibration.SHARES` of the maps lie beyond.

    The mean F3 on the same words flatters, because the best of some hundred settings was taken. So
    the whole search is made again ``folds`` times, each without a part of the images, and scored
    on that part (``held``). Candidates come from all maps there too, but from no mask.

    Args:
        collection (Collection): with masks.
        stages (tuple of Refinement): where the search starts.
        seed (int, optional): which images make a part. Default: 0
        folds (int, optional): parts. Default: :data:`FOLDS`
        say (callable, optional): is told what is tried.

    Raises:
        CalibrationError: no masks, fewer than :data:`LEAST_IMAGES` images with a scored word or
            :data:`LEAST_WORDS` words; more parts than images.
    """
    _check_split(collection, folds)
    chain, before = Chain(collection), values_of(stages)

    def search(rows: Tensor, part: str) -> SearchResult:
        def objective(values: Values) -> float:
            return float(chain.scores(with_values(stages, values))[rows, _F3].mean())

        def candidates(name: str, values: Values) -> Sequence[float | None]:
            return tried(chain, with_values(stages, values), name)

        return coordinate_descent(
            before, candidates, objective, say=lambda text: say(f"{part}: {text}")
        )

    everything = torch.ones(len(collection), dtype=torch.bool)
    found = search(everything, "all images")
    held = chain.scores(stages).clone()
    for number, away in enumerate(_parts(collection, seed, folds)):
        own = search(~away, f"part {number + 1} of {folds}")
        held[away] = chain.scores(with_values(stages, own.values))[away]
    first = chain.scores(stages)
    last = chain.scores(with_values(stages, found.values))
    return _calibration(
        chain,
        stages,
        before,
        found.values,
        labelled=True,
        own=gain(first, last, collection.images, seed),
        held=gain(first, held, collection.images, seed),
        steps=found.steps,
    )


def tried(chain: Chain, stages: Stages, name: str) -> Sequence[float | None]:
    """What the labelled search tries for a parameter, given the stages at hand."""
    parameter = PARAMETERS[name]
    if not parameter.statistic:
        return parameter.tried
    values = chain.statistics(stages, parameter.stage)[parameter.statistic]
    cuts = (cut(values, share * len(values), below=parameter.below) for share in SHARES)
    return tuple(dict.fromkeys(max(0.0, c) for c in cuts))


def gain(first: Tensor, second: Tensor, images: Tensor, seed: int) -> Gain:
    r"""Scores (N, 4) before and after on the same words of these images (N,)."""
    generator = torch.Generator().manual_seed(seed)
    found: BootstrapInterval = cluster_bootstrap(second[:, _F3] - first[:, _F3], images, generator)
    return Gain(
        len(images.unique()),
        len(images),
        _means(first),
        _means(second),
        float(found.mean),
        float(found.low),
        float(found.high),
    )


def _means(scores: Tensor) -> dict[str, float]:
    capped = scores.clone()
    capped[:, SCORES.index("contrast")].clamp_(max=20)
    return dict(zip(SCORES, capped.mean(0).tolist(), strict=True))


def _check_split(collection: Collection, folds: int) -> None:
    used, words = collection.used, len(collection)
    if not collection.labelled:
        raise CalibrationError("the collection has no masks: collect(…, labelled=True)")
    if used < LEAST_IMAGES or words < LEAST_WORDS:
        raise CalibrationError(
            f"{used} images with a scored word and {words} words: expected at least "
            f"{LEAST_IMAGES} and {LEAST_WORDS}, or a search fits noise: give more images "
            "(--limit), or fit without labels"
        )
    if not 2 <= folds <= used:
        raise CalibrationError(
            f"folds is {folds}: expected 2 to {used}, the images with a scored word"
        )


def _parts(collection: Collection, seed: int, folds: int) -> list[Tensor]:
    """Masks (N,) of the words whose images make each part; parts differ by one image at most."""
    used, own = collection.images.unique(return_inverse=True)
    order = torch.randperm(len(used), generator=torch.Generator().manual_seed(seed))
    return [torch.isin(own, order[number::folds]) for number in range(folds)]


def _calibration(
    chain: Chain, stages: Stages, before: Values, after: Values, **others: Any
) -> Calibration:
    fitted = with_values(stages, after)
    known = {"base": chain.raw_statistics()}
    for name, stage in (("dacg", DACG), ("sicd", SICD)):
        if any(isinstance(s, stage) for s in stages):
            known[name] = chain.statistics(stages, stage)
    return Calibration(
        start=stages,
        fitted=fitted,
        before=before,
        after=after,
        routing=(chain.routing(stages), chain.routing(fitted)),
        gated=(chain.gated(stages), chain.gated(fitted)),
        statistics={
            name: {s: _quantiles(values[s]) for s in STATISTICS} for name, values in known.items()
        },
        images=chain.collection.used,
        words=len(chain.collection),
        **others,
    )


def _quantiles(values: Tensor) -> list[float]:
    found: list[float] = torch.quantile(
        values, torch.tensor(QUANTILES, dtype=values.dtype)
    ).tolist()
    return found


def compare(
    collection: Collection, first: Stages, second: Stages, seed: int = 0
) -> tuple[Gain, tuple[dict[str, float], dict[str, float]]]:
    """Two chains of stages on other images with masks: the gain, and DACG's routing of both."""
    chain = Chain(collection)
    before, after = chain.scores(first), chain.scores(second)
    routing = chain.routing(first), chain.routing(second)
    return gain(before, after, collection.images, seed), routing
