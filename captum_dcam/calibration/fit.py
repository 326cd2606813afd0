r"""Fits a preset's refinements and its block to a model.

The search knows what raises and lowers a word's score from its :class:`Collection` alone: F3 where
the words have masks, the area under their insertion curve where they have none.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from captum_dcam.calibration.maps import Batch, Chain, Collection
from captum_dcam.calibration.parameters import (
    PARAMETERS,
    SHARES,
    Stages,
    Values,
    values_of,
    with_values,
)
from captum_dcam.errors import CalibrationError
from captum_dcam.metrics import CONTRAST_CAP, cluster_bootstrap
from captum_dcam.refine import DACG, SICD

#: parts of a cross-validation, or as many as there are images
FOLDS = 5
#: quantiles of map statistics that are written down
QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)
#: a gain below a hundredth of a point of F3, or of a probability, is none
LEAST_GAIN = 1e-4
MOST_SWEEPS = 8
#: parameter name and the values at hand → what to try
Candidates = Callable[[str, Values], Iterable[float | None]]


@dataclass(frozen=True)
class Gain:
    r"""Two settings on the same words: means before and after, the paired difference of what is
    fitted, F3 or insertion.

    Args:
        images, words (int): how many.
        before, after (dict): mean of every column of :attr:`Batch.columns`; ``contrast`` capped at
            20, as in F3.
        gain (float): mean difference, word by word.
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
        kind (type of Batch): how words were scored.
        start, fitted (tuple of Refinement): the stages before and after.
        before, after (dict): every parameter that the search took, by name.
        layer (int): the block that won.
        blocks (dict): mean objective of each block's own best settings; the first is where the
            search started.
        routing (tuple of dict): shares of DACG's branches before and after.
        gated (tuple): share of the maps that SICD touches, before and after.
        statistics (dict): quantiles :data:`QUANTILES` of mean, std and skewness: of base maps from
            0 to 1 (``base``), and as they come to ``dacg`` and ``sicd``, before the fit.
        images, words (int): how many were fitted on.
        own (Gain): on the words that were fitted on: flatters.
        held (Gain): cross-validated: every word by a search that did not see its image.
        steps (tuple of Step): changes of the search on that block.
        evaluations, passes (int): settings that were scored, on all blocks, and the forward passes
            that this took.
    """

    kind: type[Batch]
    start: Stages
    fitted: Stages
    before: Values
    after: Values
    layer: int
    blocks: dict[int, float]
    routing: tuple[dict[str, float], dict[str, float]]
    gated: tuple[float | None, float | None]
    statistics: dict[str, dict[str, list[float]]] = field(repr=False)
    images: int
    words: int
    own: Gain
    held: Gain
    steps: tuple[Step, ...]
    evaluations: int
    passes: int

    @property
    def changed(self) -> list[str]:
        """Names of the parameters that are not what they were."""
        return [name for name, value in self.before.items() if self.after[name] != value]


def fit_stages(
    collection: Collection,
    stages: Stages,
    *,
    seed: int = 0,
    folds: int | None = None,
    say: Callable[[str], None] = lambda _: None,
) -> Calibration:
    """:func:`fit_blocks` of one block."""
    return fit_blocks([collection], stages, seed=seed, folds=folds, say=say)


def fit_blocks(
    blocks: Iterable[Collection],
    stages: Stages,
    *,
    seed: int = 0,
    folds: int | None = None,
    say: Callable[[str], None] = lambda _: None,
) -> Calibration:
    r"""Search for the block and the parameters with the highest mean objective over words.

    On each block :func:`~captum_dcam.calibration.coordinate_descent` over what
    :data:`~captum_dcam.calibration.PARAMETERS` lists for each parameter. Candidates of a threshold
    are those that :data:`~captum_dcam.calibration.SHARES` of the maps lie beyond. Then the block
    whose own best is highest; the first stays where no other gains.

    The mean on the same words flatters, because the best of some hundred settings was taken. So
    the whole search, blocks included, is made again ``folds`` times, each without a part of the
    images, and scored on that part (``held``). Candidates come from all maps there too, but from no
    mask.

    Args:
        blocks (iterable of Collection): of the same words at each block; taken one after another,
            so that a generator keeps one in memory.
        stages (tuple of Refinement): where the search starts on every block.
        seed (int, optional): which images make a part. Default: 0
        folds (int, optional): parts. Default: :data:`FOLDS`, or the number of images if that is
            smaller
        say (callable, optional): is told what is tried.

    Raises:
        CalibrationError: fewer images with a scored word, or words, than :attr:`Batch.least`; more
            parts than images; blocks of other words.
    """
    searched: list[_Searched] = []
    for collection in blocks:
        if not searched:
            count = _check_split(collection, folds)
        elif not torch.equal(collection.images, searched[0].images):
            raise CalibrationError(
                f"block {collection.layer} has {len(collection)} words of other images than block "
                f"{searched[0].layer}: the model does not write the same answers again; fit one "
                "block at a time (--layer)"
            )
        parts = _parts(collection, seed, count)
        searched.append(_search_block(collection, stages, parts, say))
    if not searched:
        raise CalibrationError("no block is given: expected at least one, with its collection")
    first, best = searched[0], _best(searched, 0)
    held = first.first.clone()
    for number, away in enumerate(parts, 1):
        held[away] = _best(searched, number).scored[number][away]
    values = best.found[0].values
    return Calibration(
        kind=collection.kind,
        start=stages,
        fitted=with_values(stages, values),
        before=first.before,
        after=values,
        layer=best.layer,
        blocks={one.layer: one.found[0].objective for one in searched},
        routing=(first.routing[0], best.routing[1]),
        gated=(first.gated[0], best.gated[1]),
        statistics=first.statistics,
        images=collection.used,
        words=len(collection),
        own=gain(collection, first.first, best.scored[0], seed),
        held=gain(collection, first.first, held, seed),
        steps=best.found[0].steps,
        evaluations=sum(one.evaluations for one in searched),
        passes=sum(one.passes for one in searched),
    )


def tried(chain: Chain, stages: Stages, name: str) -> Sequence[float | None]:
    """What the search tries for a parameter, given the stages at hand."""
    parameter = PARAMETERS[name]
    if not chain.collection.kind.labelled:
        return parameter.few
    if not parameter.statistic:
        return parameter.tried
    values = chain.statistics(stages, parameter.stage)[parameter.statistic]
    cuts = (cut(values, share * len(values), below=parameter.below) for share in SHARES)
    return tuple(dict.fromkeys(max(0.0, c) for c in cuts))


def gain(collection: Collection, first: Tensor, second: Tensor, seed: int) -> Gain:
    """Scores (N, columns) before and after on the same words."""
    kind, images = collection.kind, collection.images
    at, generator = kind.columns.index(kind.objective), torch.Generator().manual_seed(seed)
    found = cluster_bootstrap(second[:, at] - first[:, at], images, generator)
    means = []
    for scores in (first.clone(), second.clone()):
        if "contrast" in kind.columns:
            scores[:, kind.columns.index("contrast")].clamp_(max=CONTRAST_CAP)
        means.append(dict(zip(kind.columns, scores.mean(0).tolist(), strict=True)))
    mean, low, high = (float(value) for value in found)
    return Gain(len(images.unique()), len(images), means[0], means[1], mean, low, high)


def _check_split(collection: Collection, folds: int | None) -> int:
    """The number of parts."""
    used, words = collection.used, len(collection)
    images, most = collection.kind.least
    if used < images or words < most:
        raise CalibrationError(
            f"{used} images with a scored word and {words} words: expected at least "
            f"{images} and {most}, or a search fits noise: give more images (--limit)"
        )
    folds = min(FOLDS, used) if folds is None else folds
    if not 2 <= folds <= used:
        raise CalibrationError(
            f"folds is {folds}: expected 2 to {used}, the images with a scored word"
        )
    return folds


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


@dataclass(frozen=True)
class _Searched:
    r"""One block: what its search found on all words, then without each part.

    ``scored`` are the scores (N, columns) of all words by each of these; ``first`` by the start.
    """

    layer: int
    images: Tensor
    before: Values
    found: tuple[SearchResult, ...]
    first: Tensor
    scored: tuple[Tensor, ...]
    routing: tuple[dict[str, float], dict[str, float]]
    gated: tuple[float | None, float | None]
    statistics: dict[str, dict[str, list[float]]]
    evaluations: int
    passes: int


def _search_block(
    collection: Collection,
    stages: Stages,
    parts: Sequence[Tensor],
    say: Callable[[str], None],
) -> _Searched:
    chain = Chain(collection)
    before = values_of(stages, labels=collection.kind.labelled)

    def search(rows: Tensor, part: str) -> SearchResult:
        def objective(values: Values) -> float:
            return float(chain.objective(with_values(stages, values))[rows].mean())

        def candidates(name: str, values: Values) -> Sequence[float | None]:
            return tried(chain, with_values(stages, values), name)

        return coordinate_descent(
            before,
            candidates,
            objective,
            say=lambda text: say(f"block {collection.layer}, {part}: {text}"),
        )

    found = [search(torch.ones(len(collection), dtype=torch.bool), "all images")]
    for number, away in enumerate(parts, 1):
        found.append(search(~away, f"part {number} of {len(parts)}"))
    fitted = with_values(stages, found[0].values)
    return _Searched(
        collection.layer,
        collection.images,
        before,
        tuple(found),
        chain.scores(stages),
        tuple(chain.scores(with_values(stages, one.values)) for one in found),
        (chain.routing(stages), chain.routing(fitted)),
        (chain.gated(stages), chain.gated(fitted)),
        _statistics(chain, stages),
        chain.evaluations,
        chain.passes,
    )


def _best(searched: Sequence[_Searched], number: int) -> _Searched:
    """The block with the highest objective of a search; the first where no other gains."""
    best = searched[0]
    for one in searched[1:]:
        if one.found[number].objective >= best.found[number].objective + LEAST_GAIN:
            best = one
    return best


def compare(
    first: tuple[Collection, Stages], second: tuple[Collection, Stages], seed: int = 0
) -> tuple[Gain, tuple[dict[str, float], dict[str, float]]]:
    """Two chains of stages on other images, each on its block's collection of the same words: the
    gain, and DACG's routing of both."""
    chains = [(Chain(collection), stages) for collection, stages in (first, second)]
    before, after = (chain.scores(stages) for chain, stages in chains)
    one, two = (chain.routing(stages) for chain, stages in chains)
    return gain(first[0], before, after, seed), (one, two)


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
