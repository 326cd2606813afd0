"""Check 5: batches, several pictures, videos, conversations, empty prompts, one token."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from captum_dcam.errors import ConformanceError
from captum_dcam.model.adapter import Adapter
from captum_dcam.model.forward import DenoisingForward
from captum_dcam.model.gradients import target_gradients
from captum_dcam.model.prompts import Video
from captum_dcam.testing.case import AdapterCase, expect, explained
from captum_dcam.testing.gradients import target_at
from captum_dcam.testing.replay import agrees

#: logits of an example alone and in a batch, which are computed in other shapes
ROUNDING = 1e-4


def check_inputs(case: AdapterCase) -> str:
    r"""What the family takes is generated as by its own code and has gradients; what it does not
    take is refused before any work.

    Raises:
        ConformanceError: the kind of input, and what went wrong.
    """
    adapter = case.make(torch.float32)
    one, two, three = (case.picture(seed) for seed in range(3))
    _try(case, adapter, "an empty prompt", [[one]], [""])
    _try(case, adapter, "a conversation", [[one]], [list(case.conversation)])
    _one_token(case, adapter)
    taken = ["empty prompt", "conversation", "one token"]
    pair, asked = [[one], [two]], [case.prompt, case.other_prompt]
    if adapter.batches:
        _check_batch(case, adapter, pair, asked)
        taken.append("batch")
    else:
        _refused(adapter, "a batch of two", pair, asked)
    if adapter.several_images:
        _try(case, adapter, "two pictures", [[one, two]], [case.prompt])
        taken.append("several pictures")
    else:
        _refused(adapter, "two pictures", [[one, two]], [case.prompt])
    video = Video([one, two, three, one])
    if adapter.takes_video:
        _try(case, adapter, "a video", [[video]], [case.prompt])
        taken.append("video")
    else:
        _refused(adapter, "a video", [[video]], [case.prompt])
    return ", ".join(taken)


def _try(
    case: AdapterCase,
    adapter: Adapter,
    what: str,
    images: Sequence[Sequence[Any]],
    prompts: Sequence[Any],
    **changes: Any,
) -> DenoisingForward:
    """Generate as the family's own code does, and take a gradient of every example."""
    forward = case.bound(adapter, images=images, prompts=prompts, **changes)
    request = forward.request
    positions = torch.cat([g.positions.flatten() for g in request.layout.grids])
    unique = len(positions.unique()) == len(positions)
    expect(unique, f"{what}: two image tokens are said to lie at one position")
    try:
        agrees(case, forward, **changes)
    except ConformanceError as error:
        raise ConformanceError(f"{what}: {error}") from error
    for example in range(request.batch):
        target = target_at(forward, explained(forward, example)[0], example)
        target_gradients(forward, [target], [example])
    return forward


def _one_token(case: AdapterCase, adapter: Adapter) -> None:
    forward = _try(
        case, adapter, "a one-token answer", [[case.picture()]], [case.prompt], **case.one_token
    )
    count = forward.trajectory.tokens.shape[1]
    expect(
        count == case.shortest,
        f"the answer with {dict(case.one_token)} has {count} positions: expected {case.shortest}",
    )


def _check_batch(
    case: AdapterCase,
    adapter: Adapter,
    images: Sequence[Sequence[Any]],
    prompts: Sequence[Any],
) -> None:
    """Every example of a batch has the logits and the gradient that it has alone."""
    forward = _try(case, adapter, "a batch of two", images, prompts)
    trajectory = forward.trajectory
    targets = [target_at(forward, explained(forward, b)[0], b) for b in range(2)]
    found = target_gradients(forward, targets, [0, 1])
    for b in range(2):
        alone = DenoisingForward(adapter, forward.layer)
        one = adapter.prepare([images[b]], [prompts[b]])
        alone.bind(one, trajectory.single(b))
        with torch.no_grad():
            wanted = alone.replay(torch.tensor([0]), torch.tensor([0]))[0]
            got = forward.replay(torch.tensor([b]), torch.tensor([0]))[0]
        pairs = [("logits", got, wanted)]
        (own,) = target_gradients(alone, [targets[b]])
        pairs += [
            ("gradient", g, w) for g, w in zip(found[b].gradients, own.gradients, strict=True)
        ]
        for what, g, w in pairs:
            gap = float((g - w).abs().max() / w.abs().max().clamp_min(1e-30))
            expect(
                gap <= ROUNDING,
                f"example {b} of a batch has other {what} than alone (by {gap:.1e} of the "
                "largest): compare padding, positions and masks",
            )


def _refused(
    adapter: Adapter, what: str, images: Sequence[Sequence[Any]], prompts: Sequence[Any]
) -> None:
    """``prepare`` raises ValueError or TypeError that names the family."""
    try:
        adapter.prepare(images, prompts)
    except (ValueError, TypeError) as error:
        expect(len(str(error)) > 20, f"{what} is refused without a reason: {error!r}")
        return
    raise ConformanceError(
        f"{what} is neither run nor refused: {type(adapter).__name__} declares "
        "that it takes none (batches, several_images, takes_video); raise InputError in prepare"
    )
