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
from captum_dcam.errors import InputError
from captum_dcam.model import gradients
from captum_dcam.model.forward import DenoisingForward
from captum_dcam.model.norms import BACKWARDS
from captum_dcam.model.tagging import DEFAULT_TAGGER, TAGGERS
from captum_dcam.model.trajectory import SCORES
from captum_dcam.model.words import Target, repeated_function_words, words_of
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
    if features.dtype.itemsize <= 4:
        features, gradients = features.float(), gradients.float()
    if center:
        features = features - features.mean((-2, -1), keepdim=True)
    return PRODUCTS[product](features, gradients)


@dataclass(frozen=True)
class Reading:
    r"""How a word's map is read: everything between a bound generation and the signed map.

    Args:
        score (str): state whose logits are read: ``commit``, ``final`` or ``teacher``.
        product (str): ``pooled``, ``positionwise`` or ``plus_plus``.
        center (bool): subtract each channel's spatial mean from the features first.
        step (int, optional): the call whose image states are explained. Default: the one that the
            score needs
        tagger (str): who says which repeated words are function words, and which words are nouns.
        backward (str): how gradients pass through norms: ``exact`` or ``constant_norms``, see
            :mod:`captum_dcam.model.norms`.

    Raises:
        ValueError, UnknownNameError: no such score; no such product or tagger, with near names.
    """

    score: str = "commit"
    product: str = "pooled"
    center: bool = False
    step: int | None = None
    tagger: str = DEFAULT_TAGGER
    backward: str = "exact"

    def __post_init__(self) -> None:
        checks.choice("score", self.score, SCORES)
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
) -> tuple[Tensor, ...]:
    r"""Signed maps of many targets in as few passes as their steps need.

    Returns:
        tuple of Tensor: one (N, h, w) per grid, in the order of ``targets``; tokens of one target
        that were read at different steps add up.
    """
    if not targets:
        return tuple(torch.zeros(0, *shape) for shape in forward.request.layout.shapes)
    found = gradients.target_gradients(
        forward,
        targets,
        list(examples),
        score=reading.score,
        call=reading.step,
        backward=reading.backward,
    )
    sums: dict[tuple[int, int], Tensor] = {}
    for row in found:
        for i, (f, g) in enumerate(zip(row.features, row.gradients, strict=True)):
            one = cam(f, g, reading.product, reading.center).detach()
            at = (i, row.target)
            sums[at] = sums[at] + one if at in sums else one
    grids, numbers = range(len(found[0].features)), range(len(targets))
    return tuple(torch.stack([sums[i, n] for n in numbers]) for i in grids)


# -- maps of repeated words, which SICD subtracts --------------------------------------------------


def repeated_words(
    forward: DenoisingForward, example: int = 0, tagger: str = DEFAULT_TAGGER
) -> tuple[Target, ...]:
    """Occurrences of function words that an example's answer holds more than once."""
    tokens = forward.trajectory.tokens[example].tolist()
    return repeated_function_words(words_of(forward.adapter, tokens), tagger)


def repeated_maps(
    forward: DenoisingForward, example: int, reading: Reading
) -> tuple[Tensor, ...] | None:
    r"""Mean map (h, w) of an example's repeated function words in 0..1, one per grid (SICD).

    Computed once per bound generation and reading, and remembered with it; not while the tap is
    edited. None where no word is repeated.
    """

    def compute() -> tuple[Tensor, ...] | None:
        words = repeated_words(forward, example, reading.tagger)
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
) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    r"""Maps of words of one example, signed and refined.

    The repeated words' maps are taken from the words' own where all of them are asked for, and
    from what the generation remembers otherwise.

    Returns:
        tuple: signed maps, and refined ones; each float32, one (N, h, w) per grid.
    """
    signed = word_maps(forward, targets, [example] * len(targets), reading)
    refine, own = as_compose(refinements), None
    if needs_repeated(refine):
        repeated = repeated_words(forward, example, reading.tagger)
        own = (
            mean_of(signed, targets, repeated)
            if set(repeated) <= set(targets)
            else repeated_maps(forward, example, reading)
        )
    signed = tuple(m.float() for m in signed)
    contexts = contexts_of(forward, own, refine, example=example, step=reading.step)
    return signed, refine_words(signed, refine, contexts)
