"""Check 2: the gradient at the tapped image states, against finite differences."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from captum_dcam.errors import ConformanceError, InfeasibleStepError, LayerError
from captum_dcam.model.forward import DenoisingForward
from captum_dcam.model.gradients import target_gradients
from captum_dcam.model.words import Target
from captum_dcam.testing.case import AdapterCase, expect, explained

#: step of the difference, in the features' root mean square, and what may remain of the gradient
STEP, TOLERANCE = 1e-4, 1e-5


def check_gradient(case: AdapterCase) -> str:
    r"""At every usable block a token's logit has a gradient with respect to the image states that
    is not zero and equals central finite differences, through a cached prefix too; blocks behind
    the deepest one are refused, and have none.

    Raises:
        ConformanceError: block, token, and both values.
    """
    dtype = torch.float64 if case.no_float64 is None else torch.float32
    with case.float64():
        adapter = case.make(dtype)
        first = case.bound(adapter, keep=False)
        for block in range(adapter.deepest_block + 1):
            _check_block(case, _at(first, block))
        for block in range(adapter.deepest_block + 1, len(adapter.blocks)):
            _check_refused(first, block)
    count = adapter.deepest_block + 1
    if case.no_float64 is not None:
        return f"{count} blocks; not compared: {case.no_float64}"
    return f"{count} blocks"


def _at(forward: DenoisingForward, block: int) -> DenoisingForward:
    """The same generation at another block."""
    other = DenoisingForward(forward.adapter, block)
    other.bind(forward.request, replace(forward.trajectory, kept={}))
    return other


def target_at(forward: DenoisingForward, position: int, example: int = 0) -> Target:
    """The token written at a response position, as a target."""
    token = int(forward.trajectory.tokens[example, position])
    return Target(f"token {token} at {position}", (position,), (token,))


def _check_block(case: AdapterCase, forward: DenoisingForward) -> None:
    places = explained(forward)
    for position in dict.fromkeys((places[0], places[-1])):  # the first may come from the prefill
        target = target_at(forward, position)
        try:
            (row,) = target_gradients(forward, [target])
        except (InfeasibleStepError, RuntimeError) as error:
            raise ConformanceError(
                f"block {forward.layer}: no gradient of {target.text} could be taken ({error}); "
                "look for detach(), no_grad() or a copied cache between the prefill and the step"
            ) from error
        if case.no_float64 is None:
            _compare(forward, target, row.features, row.gradients)


def _compare(
    forward: DenoisingForward,
    target: Target,
    features: tuple[Tensor, ...],
    gradients: tuple[Tensor, ...],
) -> None:
    """The gradient along random directions, against central differences of the forward."""
    generator = torch.Generator().manual_seed(forward.layer)
    pair = (target.positions[0], target.token_ids[0])
    for _ in range(2):
        directions = [
            torch.randn(f.shape, generator=generator, dtype=f.dtype).to(f.device)
            * f.square().mean().sqrt()
            for f in features
        ]
        ends = [_score(forward, pair, directions, sign * STEP) for sign in (1, -1)]
        difference = (ends[0] - ends[1]) / (2 * STEP)
        pairs = list(zip(gradients, directions, strict=True))
        product = float(sum((g * d).sum() for g, d in pairs))
        typical = float(sum((g * d).square().sum() for g, d in pairs)) ** 0.5
        expect(
            abs(difference - product) <= TOLERANCE * max(typical, abs(product)),
            f"block {forward.layer}, {target.text}: the gradient along a random direction is "
            f"{product:.9g}, finite differences give {difference:.9g}: a path from the image "
            "states to the logits is missing or doubled (memory_tensors and replace_memory must "
            "carry all that steps see of the prefix, its last logits too), or the family computes "
            "in less than float64 (case.float64)",
        )


def _score(
    forward: DenoisingForward, pair: tuple[int, int], directions: list[Tensor], size: float
) -> float:
    """A token's logit with the image states moved along ``directions``."""
    args = forward.arguments(pair)
    with torch.no_grad(), forward.edited(lambda m, i: m + size * directions[i]):
        return float(forward(forward.request.pixels, *args)[0, pair[0], pair[1]])


def _check_refused(first: DenoisingForward, block: int) -> None:
    """A block behind the deepest usable one is an error, and its image states move nothing."""
    adapter = first.adapter
    try:
        adapter.check_layer(block)
    except LayerError:
        pass
    else:
        raise ConformanceError(f"block {block} is not refused: expected LayerError")
    forward = _at(first, adapter.deepest_block)
    forward.layer = block  # past the refusal
    position = explained(forward)[-1]
    pair = (position, int(forward.trajectory.tokens[0, position]))
    ends = [_blown_up(forward, pair, size) for size in (1.0, 3.0)]
    expect(
        ends[0] == ends[1],
        f"block {block} is refused, but its image states move the logits ({ends[0]:.6g} and "
        f"{ends[1]:.6g}): deepest_block is {adapter.deepest_block}, expected at least {block}",
    )


def _blown_up(forward: DenoisingForward, pair: tuple[int, int], size: float) -> float:
    """A token's logit with the image states multiplied by ``size``."""
    args = forward.arguments(pair)
    with torch.no_grad(), forward.edited(lambda m, _i: m * size):
        return float(forward(forward.request.pixels, *args)[0, pair[0], pair[1]])
