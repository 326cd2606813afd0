r"""How many words are differentiated at once: as many as fit into free memory, and no more than are
quicker than fewer."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from captum_dcam.model.adapter import Adapter
from captum_dcam.model.forward import DenoisingForward

#: most words at once: with a cached prefix steps are short
MOST = {"prefix": 16, "none": 4}


def rows_at_once(forward: DenoisingForward, cached: int = 0, budget: int | None = None) -> int:
    r"""Number of words, each a row of a batch of steps, that are differentiated at once.

    A row needs a copy of the prefix's keys and values, or their gradient, and what the backward
    pass keeps of its tokens: the inputs and outputs of linear layers. Rows that are differentiated
    in fewer passes give the same maps within rounding.

    Args:
        forward (DenoisingForward): with a bound generation.
        cached (int, optional): bytes of the keys and values of one example's prefix. Default: 0
        budget (int, optional): bytes. Default: what is free on the GPU that has least; on other
            devices memory is no limit

    Returns:
        int: at least 1, at most 16 with a cached prefix and 4 without.
    """
    trajectory, adapter = forward.trajectory, forward.adapter
    most = MOST[trajectory.cache]
    budget = free_bytes(adapter) if budget is None else budget
    if budget is None:
        return most
    tokens, blocks = trajectory.tokens.shape[1], list(adapter.step_blocks or adapter.blocks)
    if trajectory.cache == "none":
        tokens, blocks = tokens + forward.request.layout.prefix_length, blocks[forward.layer + 1 :]
    logits = tokens * adapter.vocabulary * 2  # and their gradient
    row = cached + (tokens * _widths(blocks) + logits) * adapter.dtype.itemsize
    return max(1, min(most, budget // max(row, 1)))


def _widths(blocks: Iterable[nn.Module]) -> int:
    """Values per token that go into and come out of linear layers, quantised ones too."""
    every: Iterable[Any] = (part for block in blocks for part in block.modules())
    linear = (part for part in every if hasattr(part, "in_features"))
    return sum(int(part.in_features) + int(part.out_features) for part in linear)


def free_bytes(adapter: Adapter) -> int | None:
    """Bytes that are free for tensors, on the GPU of the model's blocks that has least; None where
    none is on a GPU by CUDA."""
    places = places_of(adapter)
    found = [
        torch.cuda.mem_get_info(place)[0]
        + torch.cuda.memory_reserved(place)
        - torch.cuda.memory_allocated(place)
        for place in places
        if place.type == "cuda"
    ]
    return min(found, default=None)


def places_of(adapter: Adapter) -> set[torch.device]:
    """The devices that hold the model's blocks; where these are offloaded, that which computes."""
    return {p.device for block in adapter.blocks for p in block.parameters()} | {adapter.device}
