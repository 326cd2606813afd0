"""Answers that are written one token after another, as trajectories: step s commits token s."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from captum_dcam.model.layout import Layout
from captum_dcam.model.trajectory import Trajectory


def seen(count: int, device: torch.device, diagonal: int) -> Tensor:
    """(S, T) bool of T tokens in T steps: those before each step's own (-1), or it as well (0)."""
    return torch.ones(count, count, dtype=torch.bool, device=device).tril(diagonal)


def states_of(tokens: Tensor, filler: int) -> tuple[Tensor, ...]:
    """Step t sees the tokens (B, T) before t; padding stands for the rest."""
    before = seen(tokens.shape[1], tokens.device, -1)
    return (tokens[None].where(before[:, None], filler),)


def query_position(layout: Layout, position: int) -> int:
    """Position p is predicted from the one before it."""
    return layout.prefix_length + position - 1


def written(
    tokens: Tensor,
    confidence: Tensor,
    cache: str,
    layout: Layout,
    filler: int,
    settings: dict[str, Any],
) -> Trajectory:
    """The trajectory of an answer (B, T) whose tokens have ``confidence`` (B, T)."""
    count, prefix = tokens.shape[1], layout.prefix_length
    # the cached run reads the first token from the prefill: step 0 has no run of its own
    behind = (prefix, 0, *[1] * (count - 1))
    return Trajectory(
        tokens=tokens,
        states=states_of(tokens, filler),
        final_state=(tokens,),
        commit_step=torch.arange(count, device=tokens.device).expand_as(tokens).clone(),
        confidence=confidence,
        cache=cache,
        image_end=layout.image_end,
        settings=settings,
        read_at=seen(count, tokens.device, 0)[:, None].expand(-1, len(tokens), -1),
        own_calls=True,  # token by token
        lengths=behind if cache == "prefix" else tuple(prefix + t for t in range(count)),
    )
