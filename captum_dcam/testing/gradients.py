"""Check 2: the gradient at the tapped image states, against finite differences. Check 3: which
calls hold the image span, and the table of them (the paper's Table 4)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import groupby

import torch
from torch import Tensor

from captum_dcam.errors import ConformanceError, InfeasibleStepError, LayerError
from captum_dcam.model.forward import DenoisingForward
from captum_dcam.model.gradients import TargetGradients, target_gradients
from captum_dcam.model.tap import recorded
from captum_dcam.model.words import Target
from captum_dcam.testing.case import AdapterCase, expect, explained, target_at

#: step of the difference, in the features' root mean square, and what may remain of the gradient
STEP, TOLERANCE = 1e-4, 1e-5


def check_gradient(case: AdapterCase) -> str:
    r"""At every usable block a token's logit has a gradient with respect to the image states that
    is not zero and equals central finite differences, through a cached prefix too; blocks behind
    the deepest one are refused, and have none.

    Raises:
        ConformanceError: block, token, and both values.
    """
    with case.float64():
        adapter = case.make(torch.float64 if case.no_float64 is None else torch.float32)
        first = case.bound(adapter, keep=False)
        with first.held():  # what was recorded is looked at once
            for block in range(adapter.deepest_block + 1):
                _check_block(case, first.again(block))
            for block in range(adapter.deepest_block + 1, len(adapter.blocks)):
                _check_refused(first, block)
    count = adapter.deepest_block + 1
    return f"{count} blocks" + (f"; not compared: {case.no_float64}" if case.no_float64 else "")


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
            _compare(forward, target, row)


def _compare(forward: DenoisingForward, target: Target, row: TargetGradients) -> None:
    """The gradient along a random direction, against central differences of the replay."""
    position = target.positions[0]
    generator = torch.Generator().manual_seed(forward.layer * 1000 + position)
    directions = [
        torch.randn(f.shape, generator=generator, dtype=f.dtype).to(f.device)
        * f.square().mean().sqrt()
        for f in row.features
    ]
    ends = [
        edited_logit(forward, target, lambda m, i, size=size: m + size * directions[i])
        for size in (STEP, -STEP)
    ]
    difference = (ends[0] - ends[1]) / (2 * STEP)
    products = [g * d for g, d in zip(row.gradients, directions, strict=True)]
    product = float(sum(p.sum() for p in products))
    typical = float(sum(p.square().sum() for p in products)) ** 0.5
    expect(
        abs(difference - product) <= TOLERANCE * max(typical, abs(product)),
        f"block {forward.layer}, {target.text}: the gradient along a random direction is "
        f"{product:.9g}, finite differences give {difference:.9g}: a path from the image "
        "states to the logits is missing or doubled (memory_tensors and replace_memory must "
        "carry all that steps see of the prefix, its last logits too), or the family computes "
        "in less than float64 (case.float64)",
    )


def edited_logit(forward: DenoisingForward, target: Target, edit: Callable[..., Tensor]) -> float:
    """The logit of a target's first token with edited image states."""
    position, token = target.positions[0], target.token_ids[0]
    step = torch.tensor([forward.trajectory.step_of(0, position, forward.score)])
    with torch.no_grad(), forward.edited(edit):  # the tower's work is not done again
        return float(forward.replay(torch.tensor([0]), step)[0, position, token])


def _check_refused(first: DenoisingForward, block: int) -> None:
    """A block behind the deepest usable one is an error, and its image states move nothing."""
    adapter = first.adapter
    try:
        adapter.check_layer(block)
    except LayerError:
        pass
    else:
        raise ConformanceError(f"block {block} is not refused: expected LayerError")
    forward = first.again(adapter.deepest_block)
    forward.layer = block  # past the refusal
    target = target_at(forward, explained(forward)[-1])
    ends = [edited_logit(forward, target, lambda m, _i, size=size: m * size) for size in (1.0, 3.0)]
    expect(
        ends[0] == ends[1],
        f"block {block} is refused, but its image states move the logits ({ends[0]:.6g} and "
        f"{ends[1]:.6g}): deepest_block is {adapter.deepest_block}, expected at least {block}",
    )


# -- feasible calls ------------------------------------------------------------------------------


@dataclass(frozen=True)
class Feasibility:
    r"""One row of the table.

    Args:
        name (str): family and mode.
        calls (tuple): (name, length at the tapped block, whether it is feasible) of every call.
        image_end (int): one past the last image position.
    """

    name: str
    calls: tuple[tuple[str, int, bool], ...]
    image_end: int

    @property
    def ratio(self) -> float:
        """Feasible calls over all."""
        return sum(valid for *_, valid in self.calls) / len(self.calls)

    def lines(self) -> list[str]:
        """One line of text per run of neighbouring calls of one length."""
        lines = []
        for (length, valid), group in groupby(self.calls, key=lambda call: call[1:]):
            names = [name for name, *_ in group]
            run = names[0] if len(names) == 1 else f"{names[0]} … {names[-1]}"
            sign = "≥" if length >= self.image_end else "<"
            state = "feasible" if valid else "infeasible"
            lines.append(f"{run}: length {length} {sign} {self.image_end}, {state}")
        return lines


def feasibility(case: AdapterCase) -> Feasibility:
    """The calls of the case's generation."""
    trajectory = case.bound(case.make(torch.float32), keep=False).trajectory
    calls = tuple((c.name, c.length, c.valid) for c in trajectory.calls)
    return Feasibility(case.name, calls, trajectory.image_end)


def check_feasible(case: AdapterCase) -> str:
    r"""Feasible are exactly the calls in which the family's own ``generate`` runs the block on the
    whole image span; each has a gradient, every other one is refused.

    Raises:
        ConformanceError: the calls and their lengths.
    """
    forward = case.bound(case.make(torch.float32))
    trajectory, end = forward.trajectory, forward.request.layout.image_end
    expect(
        trajectory.image_end == end,
        f"the trajectory's image span ends at {trajectory.image_end}, the layout's at {end}",
    )
    found = [trajectory.calls[i].length for i in trajectory.feasible]
    with recorded([forward.adapter.blocks[forward.layer]], keep=False) as (lengths, _):
        case.own(forward.adapter, forward.request)
    wanted = [n for n in lengths if n >= end]
    expect(
        sorted(found) == sorted(wanted),
        f"feasible calls have lengths {found}, but in the family's own generation the block sees "
        f"the image span (it ends at {end}) in calls of lengths {wanted}",
    )
    if case.feasible is not None:
        expect(
            trajectory.feasible == tuple(case.feasible),
            f"feasible calls are {trajectory.feasible}: the facts say {tuple(case.feasible)}",
        )
    expect(bool(found), "no call is feasible: nothing could be explained")
    with forward.held():
        for call in range(len(trajectory.calls)):
            _check_call(forward, call)
    return f"{len(found)} of {len(trajectory.calls)}"


def _check_call(forward: DenoisingForward, call: int) -> None:
    trajectory = forward.trajectory
    places = explained(forward)
    committed = [p for p in places if int(trajectory.commit_step[0, p]) == call]
    target = target_at(forward, committed[0] if committed else places[0])
    valid = call in trajectory.feasible
    try:
        target_gradients(forward, [target], call=call)
    except InfeasibleStepError as error:
        expect(not valid, f"call {call} is said to be feasible, but: {error}")
        return
    if not valid:
        raise ConformanceError(f"call {call} is infeasible, yet it is not refused")
