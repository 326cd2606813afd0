r"""A generation, computed again call by call, for methods that look into the blocks."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

from captum_dcam.errors import InputTypeError, LayerError
from captum_dcam.model.adapter import Adapter
from captum_dcam.model.forward import DenoisingForward
from captum_dcam.model.sequence import unkept

T = TypeVar("T")


class Reading(Generic[T]):
    r"""The calls of one example's generation: the prefill once, each step from a copy of its cache.

    Args:
        forward (DenoisingForward): bound, batch 1.
        watch (callable): gives the context that is open during every call; it yields what is seen.
            It must not refer to the reading's owner: a circle would keep graphs in memory.
    """

    def __init__(
        self, forward: DenoisingForward, watch: Callable[[], AbstractContextManager[T]]
    ) -> None:
        self.forward, self._watch = unkept(forward), watch
        self._prefix: tuple[Any, T] | None = None
        self._last: tuple[int, Tensor, T] | None = None

    def prefix(self) -> tuple[Any, T]:
        """The prefill's memory and what was seen of it."""
        if self._prefix is None:
            with self._watch() as seen:
                memory = self.forward.prefill()
            self._prefix = memory, seen
        return self._prefix

    def step(self, step: int) -> tuple[Tensor, T]:
        """Logits (T, V) of a step and what was seen of it; only the last step is kept."""
        if self._last is None or self._last[0] != step:
            self._last = None  # frees the graph of the step before
            memory, _ = self.prefix()
            example, device = torch.tensor([0]), self.forward.request.pixels.device
            with self._watch() as seen:
                # select() copies: a cache that grows in place would grow with every step
                own = self.forward.adapter.select(memory, example.to(device))
                logits = self.forward.step(own, example, torch.tensor([step]))
            self._last = step, logits[0], seen
        return self._last[1:]


def check_block(adapter: Adapter, block: int) -> int:
    """A block's index from 0; unlike the tapped one, the last block may be read."""
    count = len(adapter.blocks)
    if isinstance(block, bool) or not isinstance(block, int):
        raise InputTypeError(f"block is {block!r}: expected a block's number, 0 to {count - 1}")
    if not -count <= block < count:
        raise LayerError(
            f"block {block} is not in the model: {adapter.family} has {count} blocks, 0 to "
            f"{count - 1}, or -1 for the last"
        )
    return block % count
