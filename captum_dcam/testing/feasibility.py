"""Check 3: which calls hold the image span, and the table of them (the paper's Table 4)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from captum_dcam.errors import ConformanceError, InfeasibleStepError
from captum_dcam.model.forward import DenoisingForward
from captum_dcam.model.gradients import target_gradients
from captum_dcam.model.tap import hidden_of
from captum_dcam.testing.case import AdapterCase, expect, explained
from captum_dcam.testing.gradients import target_at


@dataclass(frozen=True)
class Feasibility:
    r"""One row of the table.

    Args:
        name (str): family and mode.
        calls (tuple): (name, hooked length, whether it is feasible) of every call.
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
        """Neighbouring calls of one length in one line of text."""
        runs: list[list[Any]] = []
        for name, length, valid in self.calls:
            if runs and runs[-1][2:] == [length, valid]:
                runs[-1][1] = name
            else:
                runs.append([name, name, length, valid])
        return [
            f"{first if first == last else f'{first} … {last}'}: length {length} "
            f"{'≥' if length >= self.image_end else '<'} {self.image_end}, "
            f"{'feasible' if valid else 'infeasible'}"
            for first, last, length, valid in runs
        ]


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
    adapter = case.make(torch.float32)
    forward = case.bound(adapter)
    trajectory = forward.trajectory
    positions = torch.cat([g.positions.flatten() for g in forward.request.layout.grids])
    end = 1 + int(positions.max())
    expect(
        trajectory.image_end == end,
        f"the trajectory's image span ends at {trajectory.image_end}, the layout's at {end}",
    )
    found = [trajectory.calls[i].length for i in trajectory.feasible]
    wanted = [n for n in _own_lengths(case, forward) if n >= end]
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
    for call in range(len(trajectory.calls)):
        _check_call(forward, call)
    return f"{len(found)} of {len(trajectory.calls)}"


def _own_lengths(case: AdapterCase, forward: DenoisingForward) -> list[int]:
    """Lengths of the tapped block's sequences while the family itself generates."""
    lengths: list[int] = []

    def note(_module: nn.Module, _args: Any, output: Any) -> None:
        lengths.append(hidden_of(output).shape[1])

    handle = forward.adapter.blocks[forward.layer].register_forward_hook(note)
    try:
        case.own(forward.adapter, forward.request)
    finally:
        handle.remove()
    return lengths


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
