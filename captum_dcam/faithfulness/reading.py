r"""Targets of a fixed answer, read again on edited images."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from captum_dcam.errors import InputError
from captum_dcam.model.adapter import Request
from captum_dcam.model.forward import DenoisingForward
from captum_dcam.model.trajectory import Trajectory
from captum_dcam.model.words import Target
from captum_dcam.refine.checks import check_maps

#: maps of targets: one (N, h, w) per grid
Explain = Callable[[DenoisingForward, tuple[Target, ...]], tuple[Tensor, ...]]
#: what a target's value is: sum of its tokens' logits, or mean of their log-probabilities
VALUES = ("logit", "log_probability")


def one_example(forward: DenoisingForward) -> Request:
    """The bound request, of one example; ValueError otherwise."""
    request = forward.request
    if request.batch != 1:
        raise InputError(
            f"{request.batch} examples are bound: expected one; narrow the forward with "
            "captum_dcam.model.forward.single(forward, example)"
        )
    return request


def check_counts(least: int = 1, **counts: int) -> None:
    """ValueError for what is no whole number of at least ``least``."""
    for name, value in counts.items():
        if not isinstance(value, int) or isinstance(value, bool) or value < least:
            raise InputError(f"{name} is {value!r}: expected a whole number of at least {least}")


def check_choice(name: str, value: str, known: Sequence[str]) -> None:
    """ValueError for what is not among the known."""
    if value not in known:
        raise InputError(f"{name} is {value!r}: expected one of {known}")


def rebound(
    forward: DenoisingForward,
    *,
    request: Request | None = None,
    trajectory: Trajectory | None = None,
) -> DenoisingForward:
    """The same model and block on another request or trajectory, nothing of the old one kept."""
    fresh = forward.twin()
    trajectory = forward.trajectory if trajectory is None else trajectory
    fresh.bind(request or one_example(forward), replace(trajectory, kept={}))
    return fresh


def with_pixels(forward: DenoisingForward, pixels: Tensor) -> DenoisingForward:
    r"""The bound example R times, with the same answer and other images.

    Args:
        forward (DenoisingForward): bound, one example.
        pixels (Tensor): (R, …), like the request's; cast to its dtype.
    """
    request, one = one_example(forward), forward.trajectory
    count = len(pixels)

    def times(values: Tensor, axis: int = 0) -> Tensor:
        shape = [-1] * values.ndim
        shape[axis] = count
        return values.expand(shape)

    return rebound(
        forward,
        request=replace(
            request,
            pixels=pixels.to(request.pixels),
            extras=tuple(times(e) for e in request.extras),
            prompts=request.prompts * count,
            images=request.images * count,
        ),
        trajectory=replace(
            one,
            tokens=times(one.tokens),
            states=tuple(times(s, 1) for s in one.states),
            final_state=tuple(times(s) for s in one.final_state),
            commit_step=times(one.commit_step),
            confidence=times(one.confidence),
        ),
    )


def read(
    copies: DenoisingForward,
    wanted: Sequence[tuple[int, Target]],
    *,
    score: str = "commit",
    value: str = "log_probability",
    chunk: int = 8,
    edited: Callable[[Tensor], AbstractContextManager[None]] | None = None,
) -> Tensor:
    r"""Values of targets on the images of :func:`with_pixels`, each token at its own step.

    Args:
        copies (DenoisingForward): R images with one answer.
        wanted (sequence): pairs of an image's row and a target.
        score (str): the state each token is read at.
        value (str): one of :data:`VALUES`.
        chunk (int): rows per forward pass.
        edited (callable, optional): of the rows whose image tokens pass the tap, a context in
            which they are edited.

    Returns:
        Tensor: (len(wanted),) float64, on the CPU.
    """
    assert value in VALUES
    found = [0.0] * len(wanted)
    trajectory, adapter = copies.trajectory, copies.adapter
    reads: dict[tuple[int, int], list[tuple[int, int, int, int]]] = {}
    for index, (row, target) in enumerate(wanted):
        for position, token in zip(target.positions, target.token_ids, strict=True):
            step = trajectory.step_of(row, position, score)
            part = (index, position, token, len(target.positions))
            reads.setdefault((row, step), []).append(part)
    everyone = torch.arange(copies.request.batch)
    during = edited or (lambda _rows: nullcontext())
    with torch.no_grad():
        memory: Any = None
        if trajectory.cache == "prefix" and reads:
            with during(everyone):
                memory = copies.prefill()
        keys = sorted(reads)
        for some in (keys[i : i + chunk] for i in range(0, len(keys), chunk)):
            rows, steps = (torch.tensor(column) for column in zip(*some, strict=True))
            if trajectory.cache == "prefix":
                at = rows.to(copies.request.pixels.device)
                logits = copies.step(adapter.select(memory, at), rows, steps)
            else:
                with during(rows):
                    logits = copies.replay(rows, steps)
            for line, key in zip(logits, some, strict=True):
                for index, position, token, length in reads[key]:
                    scores = line[position].cpu().double()
                    if value == "log_probability":
                        scores = scores.log_softmax(-1) / length
                    found[index] += float(scores[token])
    return torch.tensor(found, dtype=torch.float64)


def flat_maps(
    forward: DenoisingForward, maps: Iterable[Tensor], targets: Sequence[Target], caller: str
) -> Tensor:
    """Maps (N, h, w), one per grid, as rows (N, tokens) float64 on the CPU; checked."""
    shapes = one_example(forward).layout.shapes
    given = tuple(maps)
    for one in given:
        check_maps(one, caller, non_negative=False)
    expected = [(len(targets), *shape) for shape in shapes]
    if [tuple(m.shape) for m in given] != expected:
        raise InputError(
            f"maps have shapes {[tuple(m.shape) for m in given]}: expected {expected}, one (N, h, "
            "w) for each grid of image tokens, N targets"
        )
    return torch.cat([m.detach().cpu().double().flatten(1) for m in given], dim=1)
