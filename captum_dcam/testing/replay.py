"""Check 1: recorded trajectory and replayed logits are the family's own generation."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from captum_dcam.errors import InputError
from captum_dcam.model.forward import DenoisingForward
from captum_dcam.model.trajectory import Trajectory
from captum_dcam.model.verification import difference
from captum_dcam.testing.case import AdapterCase, Reference, expect


def check_replay(case: AdapterCase) -> str:
    r"""Tokens, canvases, commit steps and the logits of every step, replayed with and without kept
    block outputs, are those of the family's own ``generate``.

    Returns:
        str: how near they are.

    Raises:
        ConformanceError: the first thing that differs.
    """
    adapter = case.make(torch.float32)
    kept = case.bound(adapter)
    own = case.own(adapter, kept.request)
    everywhere = range(len(own.logits))
    worst = agrees(case, kept, own, everywhere)
    # the forward reads nothing that was kept: it is the same for both
    bare = case.bound(adapter, keep=False)
    worst = max(worst, agrees(case, bare, own, everywhere, whole=False))
    return "bit-equal" if worst == 0 else f"within {worst:.0e}"


def agrees(
    case: AdapterCase,
    forward: DenoisingForward,
    own: Reference,
    steps: Iterable[int],
    *,
    whole: bool = True,
) -> float:
    """Compare a bound generation with the family's own, and the logits of some steps, replayed and
    (``whole``) by the forward; returns their largest difference, over the largest logit."""
    trajectory = forward.trajectory
    length = own.tokens.shape[1]
    expect(
        torch.equal(trajectory.tokens[:, :length].cpu(), own.tokens.cpu()),
        f"the recorded answer {trajectory.tokens[:, :length].tolist()} is not the family's own, "
        f"{own.tokens.tolist()}",
    )
    expect(
        trajectory.steps == len(own.logits),
        f"the trajectory has {trajectory.steps} steps, the family's own generation "
        f"{len(own.logits)}: record what the model was given before every step",
    )
    if own.canvases is not None:
        states = trajectory.states[0][..., :length].cpu()
        for step, (found, wanted) in enumerate(zip(states, own.canvases.cpu(), strict=True)):
            expect(
                torch.equal(found, wanted),
                f"the canvas before step {step} was recorded as {found.tolist()}, but the model "
                f"was given {wanted.tolist()}: clone it before the decoder changes it in place",
            )
    _check_commits(forward, own)
    with forward.held():  # what was recorded is looked at once
        return _check_logits(case, forward, own, steps, whole)


def _check_commits(forward: DenoisingForward, own: Reference) -> None:
    """A token's commit step is the last one before which it was masked, or the family's own."""
    adapter, trajectory = forward.adapter, forward.trajectory
    length = own.tokens.shape[1]
    if own.commit_step is not None:
        wanted = own.commit_step.cpu()
    elif own.canvases is not None and adapter.mask_id is not None:
        masked = own.canvases.cpu() == adapter.mask_id
        steps = torch.arange(len(masked))[:, None, None]
        wanted = torch.where(masked, steps, -1).amax(0)
    else:
        raise InputError(
            f"the reference of {adapter.family} tells neither commit steps nor canvases with a "
            "mask token: give Reference.commit_step"
        )
    found = trajectory.commit_step[:, :length].cpu()
    stop = torch.tensor(sorted(adapter.stop_ids))
    compared = ~torch.isin(own.tokens.cpu(), stop)
    expect(
        torch.equal(found[compared], wanted[compared]),
        f"commit steps are {found.tolist()}: expected {wanted.tolist()} at the tokens that are no "
        "stop tokens",
    )
    sure = trajectory.confidence[:, :length].cpu()[compared]
    expect(
        bool(((sure >= 0) & (sure <= 1)).all()),
        f"confidence is {sure.tolist()}: expected probabilities",
    )


def _check_logits(
    case: AdapterCase, forward: DenoisingForward, own: Reference, steps: Iterable[int], whole: bool
) -> float:
    worst = [0.0]
    request, trajectory = forward.request, forward.trajectory
    given = (request.pixels, *request.extras, *trajectory.states)
    before = [t.clone() for t in given]
    batch = torch.arange(request.batch)
    # one row at a time is another batch than the generation's
    near = case.tolerance if request.batch == 1 else max(case.tolerance, 1e-4)

    def unchanged() -> None:
        expect(
            all(map(torch.equal, given, before)),
            "a replay changed the request or the recorded states: work on copies",
        )

    for step in steps:
        wanted = own.logits[step].cpu()
        _check_read(trajectory, step, wanted)
        if whole:
            state = trajectory.state_at(batch, torch.full_like(batch, step))
            with torch.no_grad():
                found = forward(request.pixels, *request.extras, *state).cpu()
            unchanged()
            worst.append(_distance(f"forward at step {step}", found, wanted, case.tolerance))
            _check_confidence(forward, step, found)
        with torch.no_grad():
            rows = [forward.replay(b[None], torch.tensor([step])).cpu() for b in batch]
        unchanged()
        for b, row in enumerate(rows):
            place = f"replay of example {b} at step {step}"
            worst.append(_distance(place, row, wanted[b : b + 1], near))
    return max(worst)


def _check_read(trajectory: Trajectory, step: int, wanted: Tensor) -> None:
    """Where the family computes logits (B, T, V), the record says so."""
    if trajectory.read_at is None:
        return
    there = ~wanted.isnan().any(-1)
    read = trajectory.read_at[step, :, : there.shape[1]].cpu()
    expect(
        bool(read[there].all()),
        f"read_at says that step {step} computes tokens {read.tolist()}, the family computes "
        f"{there.tolist()}: record for every step the positions whose logits it has",
    )


def _check_confidence(forward: DenoisingForward, step: int, logits: Tensor) -> None:
    """What a step committed has the probability that was recorded, as the first explanation of an
    adapter asks too."""
    found = difference(forward.adapter, forward.trajectory, step, logits)
    expect(
        found is None or not found.far,
        f"confidence at step {step} was recorded as {found and found.recorded}, and the replayed "
        f"logits give {found and found.replayed} ({found}): record each token's probability by the "
        "model's own logits, or say in confidence_of how it is counted",
    )


def _distance(place: str, found: Tensor, wanted: Tensor, tolerance: float) -> float:
    """Largest difference over the largest logit, where the family has logits."""
    expect(
        found.shape[0] == wanted.shape[0] and found.shape[2] == wanted.shape[2],
        f"{place}: logits have shape {tuple(found.shape)}, the family's {tuple(wanted.shape)}",
    )
    found = found[:, : wanted.shape[1]]
    there = ~wanted.isnan()
    if not bool(there.any()):
        return 0.0
    gap, scale = (found - wanted)[there].abs().max(), wanted[there].abs().max()
    distance = float(gap / scale.clamp_min(1e-30)) if gap > 0 else float(gap)
    expect(
        distance <= tolerance,
        f"{place} differs from the family's own logits by {distance:.1e} of the largest: expected "
        f"{f'at most {tolerance:.0e}' if tolerance else 'the same bits'}; compare masks, positions "
        "and the shift of predictions",
    )
    return distance
