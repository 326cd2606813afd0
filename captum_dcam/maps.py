r"""From words to maps: how gradients become a map, and how maps are refined.

The one way: :func:`word_maps` reads the signed maps of words, :func:`contexts_of` says what
refinements may know of the generation, :func:`refine_words` applies them. :func:`explained` does
all three. All code that refines maps of words calls :func:`refine_words`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from captum_dcam import checks
from captum_dcam.errors import InfeasibleStepError, InputError
from captum_dcam.model import gradients
from captum_dcam.model.forward import DenoisingForward
from captum_dcam.model.norms import BACKWARDS
from captum_dcam.model.tagging import DEFAULT_TAGGER, TAGGERS
from captum_dcam.model.tap import wide
from captum_dcam.model.trajectory import Score, check_score
from captum_dcam.model.words import Target, least_sure, repeated_function_words, words_of
from captum_dcam.refine import Compose, RefineContext, Refinement, min_max, needs_of
from captum_dcam.registry import Registry

# -- how a feature map and its gradient become one map ---------------------------------------------
#
# All take features and gradients (…, D, H, W) and return the signed map (…, H, W).

PRODUCTS: Registry[Callable[[Tensor, Tensor], Tensor]] = Registry("product", given=2)


@PRODUCTS.register("pooled")
def pooled(features: Tensor, gradients: Tensor) -> Tensor:
    """Grad-CAM: spatially averaged gradients weigh the channels (Eq. 4)."""
    weights = gradients.mean((-2, -1), keepdim=True)
    return (weights * features).sum(-3)


@PRODUCTS.register("positionwise")
def positionwise(features: Tensor, gradients: Tensor) -> Tensor:
    """Gradient × feature at every position, summed over channels (HiResCAM)."""
    return (gradients * features).sum(-3)


@PRODUCTS.register("plus_plus")
def plus_plus(features: Tensor, gradients: Tensor) -> Tensor:
    r"""Grad-CAM++: weights :math:`\sum_{ij} \alpha \, \mathrm{ReLU}(g)` with
    :math:`\alpha = g^2 / (2 g^2 + g^3 \sum_{ij} A)`, 0 where the gradient is 0."""
    square = gradients.square()
    below = 2 * square + gradients * square * features.sum((-2, -1), keepdim=True)
    alpha = (square / below.where(below != 0, below.new_ones(()))).where(below != 0, below * 0)
    weights = (alpha * gradients.relu()).sum((-2, -1), keepdim=True)
    return (weights * features).sum(-3)


def cam(features: Tensor, gradients: Tensor, product: str, center: bool) -> Tensor:
    r"""Signed map (…, H, W), computed in float32 or wider.

    ``center`` subtracts the mean over the positions of each channel from the features first.
    """
    features, gradients = wide(features), wide(gradients)
    if center:
        features = features - features.mean((-2, -1), keepdim=True)
    return PRODUCTS[product](features, gradients)


@dataclass(frozen=True)
class Reading:
    r"""How a word's map is read: everything between a bound generation and the signed map.

    Args:
        score (str or int): state whose logits are read: ``commit``, ``final``, ``teacher``, or the
            number of a denoising step.
        product (str): ``pooled``, ``positionwise`` or ``plus_plus``.
        center (bool): subtract each channel's spatial mean from the features first.
        step (int, optional): the call whose image states are explained; without a cache its logits
            are read as well, whatever the score says. Default: the call that the score needs
        tagger (str): who says which repeated words are function words, and which words are nouns.
        backward (str): how gradients pass through norms: ``exact`` or ``constant_norms``, see
            :mod:`captum_dcam.model.norms`.

    Raises:
        ValueError, UnknownNameError: no such score; no such product or tagger, with near names.
    """

    score: Score = "commit"
    product: str = "pooled"
    center: bool = False
    step: int | None = None
    tagger: str = DEFAULT_TAGGER
    backward: str = "exact"

    def __post_init__(self) -> None:
        object.__setattr__(self, "score", check_score(self.score))
        checks.choice("backward", self.backward, BACKWARDS)
        PRODUCTS.check(self.product, {})
        object.__setattr__(self, "center", checks.flag("center", self.center))
        if self.step is not None:
            object.__setattr__(self, "step", checks.whole("step", self.step, least=None))
        TAGGERS.check(self.tagger, {})


# -- maps of words ---------------------------------------------------------------------------------


def word_maps(
    forward: DenoisingForward,
    targets: Sequence[Target],
    examples: Sequence[int],
    reading: Reading,
    *,
    scores: Sequence[Score] | None = None,
    seen: gradients.Seen | None = None,
    rows: Callable[[gradients.TargetGradients], None] | None = None,
) -> tuple[Tensor, ...]:
    r"""Signed maps of many targets in as few passes as their steps need.

    Args:
        forward (DenoisingForward): with a bound generation.
        targets (sequence of Target): N words.
        examples (sequence of int): of every word.
        reading (Reading): how maps are read.
        scores (sequence, optional): of every word. Default: the reading's
        seen (callable, optional): told of every read of logits, see
            :func:`captum_dcam.model.gradients.mapped_gradients`. Default: nothing
        rows (callable, optional): told of every row of gradients, with those of the tokens.
            Default: nothing

    Returns:
        tuple of Tensor: one (N, h, w) per grid, in the order of ``targets``; tokens of one target
        that were read at different steps add up.
    """
    if not targets:
        return tuple(torch.zeros(0, *shape) for shape in forward.request.layout.shapes)
    sums: dict[tuple[int, int], Tensor] = {}

    def add(row: gradients.TargetGradients) -> None:
        for i, (f, g) in enumerate(zip(row.features, row.gradients, strict=True)):
            one = cam(f, g, reading.product, reading.center).detach()
            at = (i, row.target)
            sums[at] = sums[at] + one if at in sums else one
        if rows is not None:
            rows(row)

    gradients.mapped_gradients(
        forward,
        targets,
        examples,
        [forward.trajectory.check_score(reading.score)] * len(targets)
        if scores is None
        else scores,
        add,
        call=reading.step,
        backward=reading.backward,
        seen=seen,
        tokens=rows is not None,
    )
    grids, numbers = range(len(forward.request.layout.shapes)), range(len(targets))
    return tuple(torch.stack([sums[i, n] for n in numbers]) for i in grids)


# -- maps of repeated words, which SICD subtracts --------------------------------------------------


def repeated_words(
    forward: DenoisingForward,
    example: int = 0,
    tagger: str = DEFAULT_TAGGER,
    score: Score = "commit",
) -> tuple[Target, ...]:
    """Occurrences of function words that an example's answer holds more than once, as far as the
    score reads them."""
    trajectory = forward.trajectory
    words = words_of(forward.adapter, trajectory.tokens[example].tolist())
    found = repeated_function_words(words, tagger)
    return tuple(w for w in found if trajectory.reads(example, w.positions, score))


def repeated_maps(
    forward: DenoisingForward, example: int, reading: Reading
) -> tuple[Tensor, ...] | None:
    r"""Mean map (h, w) of an example's repeated function words in 0..1, one per grid (SICD).

    Computed once per bound generation and reading, and remembered with it; not while the tap is
    edited. None where no word is repeated.
    """

    def compute() -> tuple[Tensor, ...] | None:
        words = repeated_words(forward, example, reading.tagger, reading.score)
        maps = word_maps(forward, words, [example] * len(words), reading)
        return mean_of(maps, words, words)

    return forward.remembered(("repeated maps", example, reading), compute)


def mean_of(
    maps: Sequence[Tensor],
    targets: Sequence[Target],
    repeated: Sequence[Target],
    complete: Sequence[bool] | None = None,
) -> tuple[Tensor, ...] | None:
    r"""What SICD takes of the maps of some words: the repeated ones' mean (h, w) in 0..1.

    Args:
        maps (sequence of Tensor): signed, one (N, h, w) per grid.
        targets (sequence of Target): N words.
        repeated (sequence of Target): those that count.
        complete (sequence of bool, optional): whether a word's map is whole: one that a budget
            has cut short does not count. Default: all are

    Returns:
        tuple of Tensor: or None where no whole map of a repeated word is there.
    """
    known = {target: n for n, target in reversed(list(enumerate(targets)))}
    at = [known[t] for t in repeated if t in known and (complete is None or complete[known[t]])]
    return tuple(min_max(m[at].relu().mean(0)) for m in maps) if at else None


def with_repeated(targets: Sequence[Target], repeated: Sequence[Target]) -> tuple[Target, ...]:
    """The words, then the repeated ones that are not among them, so that each is explained once."""
    return (*targets, *(t for t in repeated if t not in targets))


# -- refinements -----------------------------------------------------------------------------------


def as_compose(refinements: Refinement | Sequence[Refinement]) -> Compose:
    """One refinement or several as a :class:`Compose`."""
    if isinstance(refinements, Compose):
        return refinements
    return Compose([refinements] if isinstance(refinements, Refinement) else list(refinements))


def needs_repeated(refinements: Refinement | Sequence[Refinement]) -> bool:
    """Whether a stage, at any depth, reads the maps of repeated words."""
    return "repeated_maps" in needs_of(as_compose(refinements))


def needs_features(refinements: Refinement | Sequence[Refinement]) -> bool:
    """Whether a stage, at any depth, reads the states of the image tokens."""
    return "features" in needs_of(as_compose(refinements))


def contexts_of(
    forward: DenoisingForward,
    repeated: Sequence[Tensor] | None = None,
    refinements: Refinement | Sequence[Refinement] | None = None,
    *,
    example: int = 0,
    step: int | None = None,
    features: Sequence[Tensor] | None = None,
) -> tuple[RefineContext, ...]:
    r"""What refinements may know of the bound generation, one context per grid.

    Args:
        forward (DenoisingForward): with a bound generation.
        repeated (sequence of Tensor, optional): maps of repeated words, see :func:`repeated_maps`.
            Default: none
        refinements (Refinement or sequence, optional): whom the contexts are for; features that
            none of them reads are left out. Default: features are given
        example (int, optional): whose features. Default: 0
        step (int, optional): index of the call whose features are given. Default: the first that
            holds the image
        features (sequence of Tensor, optional): other ones, such as of changed pixels, (D, h, w) or
            (R, D, h, w), one per grid. Default: those of the bound generation's tapped block, from
            what it kept or by one pass without gradients, and remembered with it
    """
    layout, trajectory = forward.request.layout, forward.trajectory
    if features is None and (refinements is None or needs_features(refinements)):
        batch = range(forward.request.batch)
        known = forward.remembered(
            ("features", step), lambda: gradients.image_features(forward, batch, step)
        )
        features = [f[example] for f in known]
    return tuple(
        RefineContext(
            steps=trajectory.steps,
            image_size=grid.image_size,
            repeated_maps=None if repeated is None else repeated[i],
            features=None if features is None else features[i],
            shares=layout.shares[i],
            picture=grid.image,
        )
        for i, grid in enumerate(layout.grids)
    )


def refine_words(
    maps: Sequence[Tensor],
    refinements: Refinement | Sequence[Refinement],
    contexts: Sequence[RefineContext],
) -> tuple[Tensor, ...]:
    r"""The positive part of words' maps after refinements: what is shown and measured.

    All grids of a request are refined together, see :func:`captum_dcam.refine.over_grids`.

    Args:
        maps (sequence of Tensor): signed or positive, (…, h, w), one per grid.
        refinements (Refinement or sequence): in order; none leaves the positive part.
        contexts (sequence of RefineContext): one per grid, see :func:`contexts_of`.

    Returns:
        tuple of Tensor: like ``maps``.
    """
    if len(maps) != len(contexts):
        raise InputError(f"{len(maps)} grids of maps and {len(contexts)} contexts: give one each")
    return as_compose(refinements).over([m.relu() for m in maps], contexts)


def explained(
    forward: DenoisingForward,
    targets: Sequence[Target],
    reading: Reading,
    refinements: Refinement | Sequence[Refinement],
    example: int = 0,
    *,
    seen: gradients.Seen | None = None,
    rows: Callable[[gradients.TargetGradients], None] | None = None,
) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    r"""Maps of words of one example, signed and refined; ``seen``, ``rows``: see
    :func:`word_maps`.

    The repeated words' maps are taken from the words' own where all of them are asked for, and
    from what the generation remembers otherwise.

    Returns:
        tuple: signed maps, and refined ones; each float32, one (N, h, w) per grid.
    """
    examples = [example] * len(targets)
    signed = word_maps(forward, targets, examples, reading, seen=seen, rows=rows)
    refine, own = as_compose(refinements), None
    if needs_repeated(refine):
        repeated = repeated_words(forward, example, reading.tagger, reading.score)
        own = (
            mean_of(signed, targets, repeated)
            if set(repeated) <= set(targets)
            else repeated_maps(forward, example, reading)
        )
    signed = tuple(m.float() for m in signed)
    contexts = contexts_of(forward, own, refine, example=example, step=reading.step)
    return signed, refine_words(signed, refine, contexts)


# -- every step ------------------------------------------------------------------------------------


def words_read(
    forward: DenoisingForward, targets: Sequence[Target], example: int = 0
) -> list[list[int]]:
    """For each of the S steps, the numbers of the words all of whose tokens it computes."""
    trajectory = forward.trajectory
    return [
        [n for n, t in enumerate(targets) if trajectory.reads(example, t.positions, s)]
        for s in range(trajectory.steps)
    ]


def odds_of(
    forward: DenoisingForward, target: Target, example: int, step: int, logits: Tensor
) -> float:
    """Probability of a word's least sure token in a step's logits (T, V), as the family's decoder
    reckons it."""
    ids = forward.trajectory.tokens[example].clone()
    ids[list(target.positions)] = torch.tensor(target.token_ids, device=ids.device)
    return least_sure(token_odds(forward, example, step, logits, ids), target)


def token_odds(
    forward: DenoisingForward,
    example: int,
    step: int,
    logits: Tensor,
    ids: Tensor | None = None,
) -> list[float]:
    """Probability of each of T tokens, by default the answer's, in a step's logits (T, V), as the
    family's decoder reckons it."""
    trajectory = forward.trajectory
    ids = trajectory.tokens[example] if ids is None else ids
    state = trajectory.state_at(torch.tensor([example]), torch.tensor([step]))
    odds = forward.adapter.confidence_of(logits[None], ids[None].to(logits.device), *state)[0]
    found: list[float] = odds.tolist()
    return found


def step_words(
    forward: DenoisingForward, targets: Sequence[Target], reading: Reading, example: int = 0
) -> tuple[tuple[Tensor, ...], Tensor]:
    r"""Signed maps and probabilities of N words of one example at each of the S steps.

    The words' steps share one prefill where the prefix is cached; every step has image states of
    its own otherwise. Probabilities come from the same passes.

    Returns:
        tuple: one (S, N, h, w) per grid; and (S, N) float32, of the least sure token. Where a step
        does not compute all tokens of a word, the map is 0 and the probability NaN.

    Raises:
        InfeasibleStepError: no step computes all tokens of a word.
    """
    steps, count = forward.trajectory.steps, len(targets)
    read = words_read(forward, targets, example)
    if missing := sorted(set(range(count)).difference(*read)):
        word = targets[missing[0]].text
        raise InfeasibleStepError(
            f"no step of {forward.adapter.family} computes all tokens of {word!r}: "
            "they belong to canvases or blocks that are denoised one after the other; explain its "
            "tokens one by one, by their positions"
        )
    wanted = [(s, n) for s in range(steps) for n in read[s]]
    probabilities = torch.full((steps, count), torch.nan)

    def seen(number: int, step: int, logits: Tensor) -> None:
        column = wanted[number][1]
        probabilities[step, column] = odds_of(forward, targets[column], example, step, logits)

    found = word_maps(
        forward,
        [targets[n] for _, n in wanted],
        [example] * len(wanted),
        reading,
        scores=[s for s, _ in wanted],
        seen=seen,
    )
    maps = tuple(m.new_zeros(steps, count, *m.shape[1:], dtype=torch.float32) for m in found)
    for whole, own in zip(maps, found, strict=True):
        for (step, number), one in zip(wanted, own, strict=True):
            whole[step, number] = one
    return maps, probabilities


def explained_steps(
    forward: DenoisingForward,
    targets: Sequence[Target],
    reading: Reading,
    refinements: Refinement | Sequence[Refinement],
    example: int = 0,
) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...], Tensor]:
    r"""Maps of words of one example at every step, refined as :func:`explained` refines them, and
    scaled over a word's steps together: see :class:`captum_dcam.results.steps.StepMaps`.

    Returns:
        tuple: maps, one (S, N, h, w) per grid; peaks of the signed maps, one (S, N) per grid;
        probabilities (S, N). All float32.
    """
    refine, count, steps = as_compose(refinements), len(targets), forward.trajectory.steps
    at: list[tuple[Target, ...]] = [()] * steps
    if needs_repeated(refine):
        at = [repeated_words(forward, example, reading.tagger, s) for s in range(steps)]
    asked = with_repeated(targets, tuple(dict.fromkeys(t for words in at for t in words)))
    signed, probabilities = step_words(forward, asked, reading, example)
    refined = []
    for step, there in enumerate(at):
        here = [m[step] for m in signed]
        own = mean_of(here, asked, there)
        contexts = contexts_of(forward, own, refine, example=example, step=reading.step)
        refined.append(refine_words([m[:count] for m in here], refine, contexts))
    peaks = tuple(m[:, :count].relu().amax((-2, -1)) for m in signed)
    maps = _to_peaks([torch.stack(grid) for grid in zip(*refined, strict=True)], peaks)
    return maps, peaks, probabilities[:, :count]


def _to_peaks(maps: Sequence[Tensor], peaks: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """Maps (S, N, h, w), one per grid, whose maximum over all grids is that of the peaks (S, N)
    over the highest of the word's."""
    least = torch.finfo(torch.float32).tiny
    peak = torch.stack(list(peaks)).amax(0)
    shares = peak / peak.amax(0, keepdim=True).clamp_min(least)
    highest = torch.stack([m.amax((-2, -1)) for m in maps]).amax(0).clamp_min(least)
    return tuple(m / highest[..., None, None] * shares[..., None, None] for m in maps)
