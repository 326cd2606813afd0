r"""Is a replayed step the generation's? Asked once per adapter, before its first map.

A map explains what a replay computes. So one step of the first generation is computed again, by the
adapter's own parts and without anything that was kept, and the probabilities of what it committed
are compared with those that the generation has recorded.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from captum_dcam.errors import ReplayError
from captum_dcam.model.adapter import Adapter, Request
from captum_dcam.model.guard import DRAWING
from captum_dcam.model.trajectory import Trajectory
from captum_dcam.model.versions import autocast_type

#: largest difference of logits computed in calls of other shapes, over the largest logit
NEAR = 1e-4
#: where calls are others altogether (token by token), rounding adds up
OWN_CALLS = 4
#: nearer to 0 or 1 than this, probabilities in float32 tell rounding from difference no more
SURE = 1e-4
#: error of such a probability
FLOAT32 = 4e-6


@dataclass(frozen=True)
class Difference:
    r"""The token of a step whose probability differs most.

    Args:
        example, position (int): where it stands.
        recorded, replayed (float): its probability in the generation, and in the replay.
        far (bool): further than rounding explains.
    """

    example: int
    position: int
    recorded: float
    replayed: float
    far: bool


def check_once(adapter: Adapter, request: Request, trajectory: Trajectory) -> None:
    """Check an adapter's first generation, unless its user does not want it; ReplayError as of
    :func:`check_replay`."""
    if adapter.unverified:
        adapter.unverified = not check_replay(adapter, request, trajectory)


def check_replay(adapter: Adapter, request: Request, trajectory: Trajectory) -> bool:
    r"""Check what :func:`replayed` finds.

    Returns:
        bool: whether there was anything to compare: an answer of stop tokens alone has nothing.

    Raises:
        ReplayError: the replay is not the generation.
    """
    found = replayed(adapter, request, trajectory)
    if found is not None and found.far:
        raise ReplayError(_message(adapter, trajectory, found))
    return found is not None


def replayed(adapter: Adapter, request: Request, trajectory: Trajectory) -> Difference | None:
    r"""Replay the step of a generation that committed the token with the most doubtful probability,
    which tells most. The random state is as before. None where there is nothing to compare."""
    committed = explainable(adapter, trajectory)
    if not bool(committed.any()):
        return None
    doubt = (trajectory.confidence.cpu() - 0.5).abs().where(committed, torch.inf)
    step = int(trajectory.commit_step.cpu().flatten()[doubt.argmin()])
    batch = torch.arange(request.batch)
    state = trajectory.state_at(batch, torch.full_like(batch, step))
    with torch.no_grad(), _undisturbed(adapter.device):
        memory = adapter.prefill(adapter.embed(request.pixels, *request.extras))
        logits = adapter.denoise(memory, *state)
    return difference(adapter, trajectory, step, logits)


def explainable(adapter: Adapter, trajectory: Trajectory) -> Tensor:
    """(B, T) bool: tokens that a step has committed and that may be explained."""
    tokens, sure = trajectory.tokens.cpu(), trajectory.confidence.cpu()
    return (sure > 0) & ~torch.isin(
        tokens, torch.tensor(sorted(adapter.stop_ids), dtype=tokens.dtype)
    )


def difference(
    adapter: Adapter, trajectory: Trajectory, step: int, logits: Tensor
) -> Difference | None:
    r"""How far the logits (B, T, V) of a step are from the probabilities that were recorded of the
    tokens that it committed; None where it committed none that may be explained.

    Log-odds are compared: logits that are off by at most e move them by at most 2 e, where e is
    what the types of logits and model leave of the largest logit.
    """
    committed = explainable(adapter, trajectory) & (trajectory.commit_step.cpu() == step)
    if not bool(committed.any()):
        return None
    batch = torch.arange(len(logits))
    state = trajectory.state_at(batch, torch.full_like(batch, step))
    tokens = trajectory.tokens.to(logits.device)
    now = adapter.confidence_of(logits.detach(), tokens, *state).double().cpu()
    was = trajectory.confidence.double().cpu()
    rounded = FLOAT32 / (1 - was).clamp_min(SURE)
    apart = ((_odds(now) - _odds(was)).abs() - rounded).nan_to_num(torch.inf)
    worst = int(apart.where(committed, -torch.inf).argmax())
    example, position = divmod(worst, apart.shape[1])
    row = logits[example, position].detach()
    largest = float(row[row.isfinite()].abs().amax()) if bool(row.isfinite().any()) else 0.0
    tolerance = _rounding(adapter, logits) * (OWN_CALLS if trajectory.own_calls else 1)
    return Difference(
        example,
        position,
        float(was[example, position]),
        float(now[example, position]),
        float(apart.flatten()[worst]) > 2 * tolerance * largest,
    )


def _odds(probability: Tensor) -> Tensor:
    """Log-odds of probabilities."""
    return torch.logit(probability.clamp(SURE, 1 - SURE))


def _rounding(adapter: Adapter, logits: Tensor) -> float:
    """Of the coarsest type in use, and at least what kernels of other shapes leave."""
    kinds = (logits.dtype, adapter.dtype, autocast_type(adapter.device.type))
    return max(NEAR, *(torch.finfo(k).eps for k in kinds if k and k.is_floating_point))


@contextmanager
def _undisturbed(device: torch.device) -> Iterator[None]:
    """torch's random states are as before, whatever hooks on the model draw."""
    with DRAWING, torch.random.fork_rng([device] if device.type == "cuda" else []):
        yield


def _message(adapter: Adapter, trajectory: Trajectory, found: Difference) -> str:
    token = int(trajectory.tokens[found.example, found.position])
    step = int(trajectory.commit_step[found.example, found.position])
    (text,) = adapter.token_texts([token])
    return (
        f"step {step} of the generation, computed again, is another: {text.strip()!r} at position "
        f"{found.position} had probability {found.recorded:.4g} and has {found.replayed:.4g}, the "
        f"largest difference at this step; expected the same, or maps explain another computation. "
        "Likely causes: a hook or a cache on the model that remembers earlier calls, compiled or "
        "quantised layers, autocast or another type inside generate alone, a version of the "
        "model's code that decodes otherwise. Take it off; or go on unchecked: verify=False in "
        "load or wrap (--load verify=false)"
    )
