r"""Maps of many words of a bound generation, and what refinements need to know of it."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from captum_dcam.errors import UnknownNameError, near
from captum_dcam.model import gradients as vjp
from captum_dcam.model.forward import DenoisingForward
from captum_dcam.model.words import Target, repeated_function_words, words_of
from captum_dcam.refine import SICD, Compose, RefineContext, Refinement, min_max


def pooled(features: Tensor, gradients: Tensor) -> Tensor:
    """Grad-CAM: spatially averaged gradients weigh the channels (Eq. 4)."""
    weights = gradients.mean((-2, -1), keepdim=True)
    return (weights * features).sum(-3)


def positionwise(features: Tensor, gradients: Tensor) -> Tensor:
    """Gradient × feature at every position, summed over channels (HiResCAM)."""
    return (gradients * features).sum(-3)


def plus_plus(features: Tensor, gradients: Tensor) -> Tensor:
    r"""Grad-CAM++: weights :math:`\sum_{ij} \alpha \, \mathrm{ReLU}(g)` with
    :math:`\alpha = g^2 / (2 g^2 + g^3 \sum_{ij} A)`, 0 where the gradient is 0."""
    square = gradients.square()
    below = 2 * square + gradients * square * features.sum((-2, -1), keepdim=True)
    alpha = (square / below.where(below != 0, below.new_ones(()))).where(below != 0, below * 0)
    weights = (alpha * gradients.relu()).sum((-2, -1), keepdim=True)
    return (weights * features).sum(-3)


def centered(features: Tensor) -> Tensor:
    """Features minus their mean over the positions of each channel."""
    return features - features.mean((-2, -1), keepdim=True)


PRODUCTS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "pooled": pooled,
    "positionwise": positionwise,
    "plus_plus": plus_plus,
}


def cam(features: Tensor, gradients: Tensor, product: str, center: bool) -> Tensor:
    """Signed map (…, H, W), computed in float32 or wider."""
    if product not in PRODUCTS:
        raise UnknownNameError(f"unknown product {product!r}{near(product, PRODUCTS)}")
    wide = features.dtype if features.dtype.itemsize > 4 else None
    a = features if wide else features.float()
    g = gradients if wide else gradients.float()
    return PRODUCTS[product](centered(a) if center else a, g)


def as_compose(refinements: Refinement | Sequence[Refinement]) -> Compose:
    """One refinement or several as a :class:`Compose`."""
    if isinstance(refinements, Compose):
        return refinements
    return Compose([refinements] if isinstance(refinements, Refinement) else list(refinements))


def word_maps(
    forward: DenoisingForward,
    targets: Sequence[Target],
    examples: Sequence[int],
    score: str,
    step: int | None,
    product: str,
    center: bool,
    *,
    unsqueeze: bool = False,
) -> tuple[Tensor, ...]:
    r"""Signed maps of many targets in as few passes as their steps need.

    Returns:
        tuple of Tensor: one (N, h, w) a grid ((N, 1, h, w) with ``unsqueeze``), in the order of
        ``targets``; tokens of one target that were read at different steps add up.
    """
    if not targets:
        return tuple(torch.zeros(0, *shape) for shape in forward.request.layout.shapes)
    found = vjp.rows(forward, targets, list(examples), score=score, call=step)
    sums: dict[tuple[int, int], Tensor] = {}
    for row in found:
        for i, (f, g) in enumerate(zip(row.features, row.gradients, strict=True)):
            one = cam(f, g, product, center).detach()
            at = (i, row.target)
            sums[at] = sums[at] + one if at in sums else one
    count = range(len(targets))
    maps = [torch.stack([sums[i, n] for n in count]) for i in range(len(found[0].features))]
    return tuple(m.unsqueeze(1) if unsqueeze else m for m in maps)


def needs_repeated(refine: Compose) -> bool:
    """Whether a stage wants the maps of repeated function words."""
    return any(isinstance(stage, SICD) for stage in refine)


def repeated_maps(
    forward: DenoisingForward,
    example: int,
    score: str,
    step: int | None,
    product: str,
    center: bool,
) -> tuple[Tensor, ...] | None:
    """Min-max normalised mean map (h, w) of the repeated function words, one a grid (SICD)."""
    tokens = forward.trajectory.tokens[example].tolist()
    words = repeated_function_words(words_of(forward.adapter, tokens))
    if not words:
        return None
    return mean_maps(
        word_maps(forward, words, [example] * len(words), score, step, product, center)
    )


def mean_maps(maps: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """Signed maps (N, h, w), one tensor a grid, to what SICD takes: their mean (h, w) in 0..1."""
    return tuple(min_max(m.relu().mean(0)) for m in maps)


def context_for(
    forward: DenoisingForward,
    image_size: tuple[int, int],
    repeated: tuple[Tensor, ...] | None,
    grid: int,
) -> RefineContext:
    """What refinements may need of the bound generation."""
    return RefineContext(
        steps=forward.trajectory.steps,
        image_size=image_size,
        repeated_maps=None if repeated is None else repeated[grid],
    )
