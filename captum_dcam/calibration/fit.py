r"""Fits a preset's thresholds to a model, from maps with masks."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from captum_dcam.calibration.maps import Chain, Collection
from captum_dcam.calibration.parameters import (
    PARAMETERS,
    SHARES,
    Stages,
    Values,
    values_of,
    with_values,
)
from captum_dcam.errors import CalibrationError
from captum_dcam.evaluation.measure import LOCALIZATION_SCORES
from captum_dcam.metrics import CONTRAST_CAP, cluster_bootstrap
from captum_dcam.refine import DACG, SICD

#: a split below this says nothing about thirty numbers
LEAST_IMAGES, LEAST_WORDS = 10, 20
FOLDS = 5
#: quantiles of map statistics that are written down
QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)
_F3 = LOCALIZATION_SCORES.index("f3")
#: a gain below a hundredth of a point of F3 is none
LEAST_GAIN = 1e-4
MOST_SWEEPS = 8
#: parameter name and the values at hand → what to try
Candidates = Callable[[str, Values], Iterable[float | None]]


@dataclass(frozen=True)
class Gain:
    r"""Two settings on the same words: means before and after, the paired difference of F3.

    Args:
        images, words (int): how many.
        before, after (dict): mean of every column of
            :data:`~captum_dcam.evaluation.measure.LOCALIZATION_SCORES`; ``contrast`` capped at 20,
            as in F3.
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
        start, fitted (tuple of Refinement): the stages before and after.
        before, after (dict): every parameter that the start has, by name.
        routing (tuple of dict): shares of DACG's branches before and after.
        gated (tuple): share of the maps that SICD touches, before and after.
        statistics (dict): quantiles :data:`QUANTILES` of mean, std and skewness: of base maps from
            0 to 1 (``base``), and as they come to ``dacg`` and ``sicd``, before the fit.
        images, words (int): how many were fitted on.
        own (Gain): on the words that were fitted on: flatters.
        held (Gain): cross-validated: every word by a search that did not see its image.
        steps (tuple of Step): changes of the search.
    """

    start: Stages
    fitted: Stages
    before: Values
    after: Values
    routing: tuple[dict[str, float], dict[str, float]]
    gated: tuple[float | None, float | None]
    statistics: dict[str, dict[str, list[float]]] = field(repr=False)
    images: int
    words: int
    own: Gain
    held: Gain
    steps: tuple[Step, ...]

    @property
    def changed(self) -> list[str]:
        """Names of the parameters that are not what they were."""
        return [name for name, value in self.before.items() if self.after[name] != value]


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
        collection (Collection): to fit on.
        stages (tuple of Refinement): where the search starts.
        seed (int, optional): which images make a part. Default: 0
        folds (int, optional): parts. Default: :data:`FOLDS`
        say (callable, optional): is told what is tried.

    Raises:
        CalibrationError: fewer than :data:`LEAST_IMAGES` images with a scored word or
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

    found = search(torch.ones(len(collection), dtype=torch.bool), "all images")
    first = chain.scores(stages)
    last = chain.scores(with_values(stages, found.values))
    held = first.clone()
    for number, away in enumerate(_parts(collection, seed, folds)):
        own = search(~away, f"part {number + 1} of {folds}")
        held[away] = chain.scores(with_values(stages, own.values))[away]
    fitted = with_values(stages, found.values)
    return Calibration(
        start=stages,
        fitted=fitted,
        before=before,
        after=found.values,
        routing=(chain.routing(stages), chain.routing(fitted)),
        gated=(chain.gated(stages), chain.gated(fitted)),
        statistics=_statistics(chain, stages),
        images=collection.used,
        words=len(collection),
        own=gain(first, last, collection.images, seed),
        held=gain(first, held, collection.images, seed),
        steps=found.steps,
    )


def tried(chain: Chain, stages: Stages, name: str) -> Sequence[float | None]:
    """What the search tries for a parameter, given the stages at hand."""
    parameter = PARAMETERS[name]
    if not parameter.statistic:
        return parameter.tried
    values = chain.statistics(stages, parameter.stage)[parameter.statistic]
    cuts = (cut(values, share * len(values), below=parameter.below) for share in SHARES)
    return tuple(dict.fromkeys(max(0.0, c) for c in cuts))


def gain(first: Tensor, second: Tensor, images: Tensor, seed: int) -> Gain:
    """Scores (N, 4) before and after on the same words of these images (N,)."""
    generator = torch.Generator().manual_seed(seed)
    found = cluster_bootstrap(second[:, _F3] - first[:, _F3], images, generator)
    means = []
    for scores in (first.clone(), second.clone()):
        scores[:, LOCALIZATION_SCORES.index("contrast")].clamp_(max=CONTRAST_CAP)
        means.append(dict(zip(LOCALIZATION_SCORES, scores.mean(0).tolist(), strict=True)))
    mean, low, high = (float(value) for value in found)
    return Gain(len(images.unique()), len(images), means[0], means[1], mean, low, high)


def _check_split(collection: Collection, folds: int) -> None:
    used, words = collection.used, len(collection)
    if used < LEAST_IMAGES or words < LEAST_WORDS:
        raise CalibrationError(
            f"{used} images with a scored word and {words} words: expected at least "
            f"{LEAST_IMAGES} and {LEAST_WORDS}, or a search fits noise: give more images (--limit)"
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


def _statistics(chain: Chain, stages: Stages) -> dict[str, dict[str, list[float]]]:
    """Quantiles of what thresholds are compared with."""
    known = {"base": chain.statistics(stages)}
    for stage in (DACG, SICD):
        if any(isinstance(s, stage) for s in stages):
            known[stage.name] = chain.statistics(stages, stage)
    places = torch.tensor(QUANTILES, dtype=torch.float64)
    return {
        name: {s: torch.quantile(values, places).tolist() for s, values in found.items()}
        for name, found in known.items()
    }


def compare(
    collection: Collection, first: Stages, second: Stages, seed: int = 0
) -> tuple[Gain, tuple[dict[str, float], dict[str, float]]]:
    """Two chains of stages on other images with masks: the gain, and DACG's routing of both."""
    chain = Chain(collection)
    before, after = chain.scores(first), chain.scores(second)
    routing = chain.routing(first), chain.routing(second)
    return gain(before, after, collection.images, seed), routing


# -- the search ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Step:
    """One change that gained: the parameter, what it was and became, the objective after it."""

    name: str
    before: float | None
    after: float | None
    objective: float


@dataclass(frozen=True)
class SearchResult:
    r"""What a search ended with.

    Args:
        values (dict): every parameter.
        start, objective (float): at the start and at the end.
        steps (tuple of Step): the changes in order.
        sweeps (int): how often all parameters were tried; the last sweep changed nothing, unless
            :data:`MOST_SWEEPS` were made.
    """

    values: Values
    start: float
    objective: float
    steps: tuple[Step, ...]
    sweeps: int


def coordinate_descent(
    start: Values,
    candidates: Candidates,
    objective: Callable[[Values], float],
    *,
    least_gain: float = LEAST_GAIN,
    most_sweeps: int = MOST_SWEEPS,
    say: Callable[[str], None] = lambda _: None,
) -> SearchResult:
    r"""Raise an objective by changing one parameter at a time. Draws nothing.

    The parameters are taken in the order of ``start``. Each is set to the candidate with the
    highest objective (the first of equal ones) if that gains at least ``least_gain`` over the
    value at hand, which stays otherwise. Sweeps go on until one changes nothing. The result is a
    local optimum: no single parameter can be bettered within its candidates.

    Args:
        start (dict): parameters by name.
        candidates (callable): what to try for a parameter, given the values at hand.
        objective (callable): of all values; higher is better.
        least_gain (float, optional): what counts as a gain. Default: :data:`LEAST_GAIN`
        most_sweeps (int, optional): Default: :data:`MOST_SWEEPS`
        say (callable, optional): is told the sweep, the parameter and the objective.
    """
    values, steps = dict(start), list[Step]()
    first = best = objective(values)
    sweep = 0
    for sweep in range(1, most_sweeps + 1):
        known = len(steps)
        for name in start:
            say(f"sweep {sweep}, {name}, {best:.4f}")
            tried = [
                (objective({**values, name: value}), value)
                for value in candidates(name, values)
                if value != values[name]
            ]
            top, value = max(tried, key=lambda pair: pair[0], default=(float("-inf"), None))
            if top >= best + least_gain:
                steps.append(Step(name, values[name], value, top))
                values[name], best = value, top
        if len(steps) == known:
            break
    return SearchResult(values, first, best, tuple(steps), sweep)


def cut(values: Tensor, count: float, *, below: bool = False) -> float:
    r"""A threshold with ``count`` of the values beyond it, or as near to it as ties allow.

    It is the number of fewest digits near the middle between the two values that it parts. No value
    beyond: the outermost value itself. All beyond: a number past the other end. Of two equally
    near counts the smaller wins.

    Args:
        values (Tensor): (N,) float64, N at least 1.
        count (float): how many should lie beyond, 0 to N.
        below (bool, optional): beyond means below, not above. Default: False
    """
    ordered = values.sort(descending=not below).values
    n = len(ordered)
    # a cut after the k-th value is one only where the next value is another
    allowed = torch.ones(n + 1, dtype=torch.bool)
    allowed[1:n] = ordered[:-1] != ordered[1:]
    sizes = torch.arange(n + 1, dtype=torch.float64)
    k = int((sizes - count).abs().masked_fill(~allowed, float("inf")).argmin())
    if k == 0:
        return float(ordered[0])
    last = float(ordered[-1])
    if k == n:
        return last + abs(last) / 2 + 0.01 if below else last - abs(last) / 2 - 0.01
    low, high = sorted(ordered[k - 1 : k + 1].tolist())
    middle: float = (low + high) / 2
    rounded = (float(f"{middle:.{digits}g}") for digits in range(2, 16))
    return next((value for value in rounded if low < value < high), middle)
