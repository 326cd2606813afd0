"""Check 5: batches, several images, videos, conversations, empty prompts, one token; and which of a
prompt's tokens are its dialogue."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from captum_dcam.errors import ConformanceError
from captum_dcam.model.adapter import Adapter
from captum_dcam.model.forward import DenoisingForward
from captum_dcam.model.gradients import TargetGradients, target_gradients
from captum_dcam.model.prompts import Video, messages_of
from captum_dcam.model.words import Target
from captum_dcam.testing.case import AdapterCase, expect, explained, target_at, token_positions
from captum_dcam.testing.replay import agrees

#: what may differ between an example alone and in a batch, which is computed in other shapes
ROUNDING = 1e-4


def check_inputs(case: AdapterCase) -> str:
    r"""Inputs that the family takes give the answer of its own code, have gradients, and tell what
    the prompt says from what the template adds; others are refused before any work.

    Raises:
        ConformanceError: the kind of input, and what went wrong.
    """
    adapter = case.make(torch.float32)
    one, two, three = (case.picture(seed) for seed in range(3))
    for what, prompt in (("an empty prompt", ""), ("a conversation", list(case.conversation))):
        forward, _ = _try(case, adapter, what, [[one]], [prompt])
        _check_dialogue(forward, [prompt], what)
    short, _ = _try(case, adapter, "a one-token answer", [[one]], [case.prompt], **case.one_token)
    count = short.trajectory.tokens.shape[1]
    expect(
        count == case.shortest,
        f"the answer with {dict(case.one_token)} has {count} positions: expected {case.shortest}",
    )
    taken = ["empty prompt", "conversation", "one token"]
    ask, both = [case.prompt], [case.prompt, case.other_prompt]
    video = Video([one, two, three, one])
    more: list[tuple[str, bool, str, list[list[Any]], list[str]]] = [
        ("batch", adapter.batches, "a batch of two", [[one], [two]], both),
        ("several pictures", adapter.several_images, "two images", [[one, two]], ask),
        ("video", adapter.takes_video, "a video", [[video]], ask),
    ]
    for name, takes, what, images, prompts in more:
        if not takes:
            _refused(adapter, what, images, prompts)
            continue
        forward, rows = _try(case, adapter, what, images, prompts)
        if name == "batch":
            _check_batch(forward, rows, images, prompts)
        _check_dialogue(forward, prompts, what)
        taken.append(name)
    return ", ".join(taken)


def _try(
    case: AdapterCase,
    adapter: Adapter,
    what: str,
    images: Sequence[Sequence[Any]],
    prompts: Sequence[Any],
    **changes: Any,
) -> tuple[DenoisingForward, list[TargetGradients]]:
    """Generate as the family's own code does, with its logits at the first and the last step (check
    1 compares every step), and take a gradient of every example."""
    forward = case.bound(adapter, images=images, prompts=prompts, **changes)
    positions = token_positions(forward.request.layout)
    unique = len(positions.unique()) == len(positions)
    expect(unique, f"{what}: two image tokens are said to lie at one position")
    own = case.own(adapter, forward.request, **changes)
    examples = range(forward.request.batch)
    with forward.held():  # what was recorded is looked at once
        try:
            agrees(case, forward, own, sorted({0, len(own.logits) - 1}))
        except ConformanceError as error:
            raise ConformanceError(f"{what}: {error}") from error
        rows = target_gradients(forward, [_first(forward, b) for b in examples], examples)
    return forward, rows


def _check_dialogue(forward: DenoisingForward, prompts: Sequence[Any], what: str) -> None:
    """The request's dialogue reads as the texts of every prompt's users and assistants, but for
    blanks."""
    adapter, request = forward.adapter, forward.request
    shape, wanted = tuple(request.dialogue.shape), (request.batch, request.layout.prefix_length)
    expect(shape == wanted, f"{what}: the request's dialogue is {shape}: expected {wanted}")
    for example, prompt in enumerate(prompts):
        places, ids = adapter.prompt_tokens(request, example)
        said = request.dialogue[example]
        expect(
            int(said[places].sum()) == int(said.sum()),
            f"{what}: the request's dialogue holds positions that prompt_tokens does not name as "
            "text",
        )
        messages = [m for m in messages_of(prompt, ()) if m["role"] != "system"]
        texts = [part["text"] for m in messages for part in m["content"]]
        found = "".join(adapter.token_texts(ids[said[places]].tolist()))
        asked = "".join(t for text in texts for t in adapter.token_texts(adapter.encode(text)))
        expect(
            "".join(found.split()) == "".join(asked.split()),
            f"{what}: the request's dialogue reads {found!r}: expected {asked!r}, the texts of "
            "user and assistant without the template's",
        )


def _first(forward: DenoisingForward, example: int) -> Target:
    """The first token of an example that may be explained."""
    return target_at(forward, explained(forward, example)[0], example)


def _check_batch(
    forward: DenoisingForward,
    rows: Sequence[TargetGradients],
    images: Sequence[Sequence[Any]],
    prompts: Sequence[Any],
) -> None:
    """Every example of a batch has the logits and the gradient (one of ``rows``) that it has
    alone."""
    first = torch.tensor([0])
    for b in range(2):
        alone = forward.twin()
        alone.bind(forward.adapter.prepare([images[b]], [prompts[b]]), forward.trajectory.single(b))
        with forward.held():
            with torch.no_grad():
                got, wanted = forward.replay(torch.tensor([b]), first), alone.replay(first, first)
            (own,) = target_gradients(alone, [_first(forward, b)])
        pairs = [("logits", got, wanted)]
        pairs += [
            ("gradient", *pair) for pair in zip(rows[b].gradients, own.gradients, strict=True)
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
