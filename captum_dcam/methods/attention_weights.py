r"""Attention weights of any model that computes attention with torch, its numbers unchanged.

The original computation runs as it is; the weights are computed beside it, when asked.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from captum_dcam.errors import MethodError
from captum_dcam.methods.attention_calls import (
    INVISIBLE,
    BlockMode,
    Call,
    Fused,
    FusedCall,
    WrittenCall,
    inside_blocks,
    is_fused,
    is_written,
)
from captum_dcam.methods.base import AttributionTask
from captum_dcam.methods.sequence_values import sequence_length
from captum_dcam.model.sequence import check_single, check_whole, padded, unkept


class _Recorder(BlockMode):
    """Keeps every attention computation; with ``gradients`` its node is made part of a graph."""

    def __init__(self, gradients: bool) -> None:
        super().__init__()
        self.gradients = gradients
        self.calls: dict[int, list[Call]] = {}

    def call(self, func: Callable, args: tuple, kwargs: dict) -> Any:
        result = func(*args, **kwargs)
        assert self.block is not None
        fused = is_fused(func)
        if not fused and not is_written(func, result):
            return result
        if self.gradients and not result.requires_grad:
            result = result.detach().requires_grad_()  # below it nothing has a graph: it starts one
        made = FusedCall(Fused(*args, **kwargs), result) if fused else WrittenCall(result)
        self.calls.setdefault(self.block, []).append(made)
        return result


@contextmanager
def recording(
    blocks: Sequence[nn.Module], gradients: bool = False, twins: Sequence[nn.Module] = ()
) -> Iterator[dict[int, list[Call]]]:
    r"""Record the attention of transformer blocks while the context is open.

    Args:
        blocks (sequence of nn.Module): attention computed outside them is ignored.
        gradients (bool, optional): make every call's ``node`` require grad, so that
            :func:`torch.autograd.grad` can be asked for it. Default: False
        twins (sequence of nn.Module, optional): the adapter's ``step_blocks``.

    Yields:
        dict: block → its :class:`Call` s in order, filled as the model runs.
    """
    recorder = _Recorder(gradients)
    with inside_blocks(blocks, recorder, twins):
        yield recorder.calls


def check_seen(calls: dict[int, list[Call]], blocks: Sequence[int], kinds: Sequence[str]) -> None:
    """Raise MethodError for blocks whose attention was not seen."""
    missing = [b for b in blocks if not calls.get(b)]
    if missing:
        raise MethodError(
            f"no attention weights of blocks {missing} ({kinds[missing[0]]}): their attention is "
            "neither torch's scaled_dot_product_attention nor a softmax of (batch, heads, queries, "
            f"keys), so it runs in a kernel that torch does not show; {INVISIBLE}"
        )


class Attentions:
    r"""Attention of the whole sequence of L tokens, in the states of a task's tokens.

    With a prefix cache the prefix's rows come from one prefill, the answer's from the step; without
    a cache all from the step. The last state is kept: tokens that share it share its pass.

    Args:
        task (AttributionTask): batch 1.
        gradients (bool, optional): keep the graph for :meth:`gradients`. Default: False
    """

    def __init__(self, task: AttributionTask, gradients: bool = False) -> None:
        self.task, self.wanted = task, gradients
        self.forward = unkept(task.forward)
        self.blocks = list(self.forward.adapter.blocks)
        self.length = sequence_length(task)
        self._prefix: tuple[Any, dict[int, list[Call]]] | None = None
        self._state: tuple[int, Tensor, tuple[tuple[Call, ...], ...]] | None = None

    def at(self, position: int) -> tuple[Tensor, tuple[tuple[Call, ...], ...]]:
        """Logits (T, V) and, block by block, the calls whose rows make up the sequence."""
        step = self.task.step(position)
        if self._state is None or self._state[0] != step:
            self._state = None  # frees the graph of the state before
            with torch.set_grad_enabled(self.wanted):
                self._state = (step, *self._run(step))
        return self._state[1:]

    def _run(self, step: int) -> tuple[Tensor, tuple[tuple[Call, ...], ...]]:
        forward = self.forward
        if self._prefix is None:
            with recording(self.blocks, self.wanted) as calls:
                memory = forward.prefill()
            self._prefix = memory, calls
        memory, before = self._prefix
        device = self.task.pixels.device
        # select() copies, so that a family whose cache grows in place leaves the prefill's alone
        own = forward.adapter.select(memory, torch.zeros(1, dtype=torch.long, device=device))
        with recording(self.blocks, self.wanted, forward.adapter.step_blocks) as calls:
            logits = forward.step(own, torch.tensor([0]), torch.tensor([step]))
        kinds = [type(b).__name__ for b in self.blocks]
        check_seen(calls, range(len(self.blocks)), kinds)
        if forward.trajectory.cache == "prefix":
            check_seen(before, range(len(self.blocks)), kinds)
        found = tuple((*before.get(i, ()), *calls[i]) for i in range(len(self.blocks)))
        for index, parts in enumerate(found):
            self._check_shapes(index, [(c.queries, c.keys) for c in parts])
        return logits[0], found

    def _check_shapes(self, index: int, shapes: Sequence[tuple[int, int]]) -> None:
        """Raise MethodError unless queries make up the sequence, behind keys of their own."""
        if self.forward.trajectory.cache == "none" and len(shapes) > 1:
            check_whole(min(q for q, _ in shapes), self.length)
        count = sum(q for q, _ in shapes)
        if self.forward.adapter.step_blocks:  # written part after part: later ones are not there
            check_single(count, self.length)
            count = self.length
        if count != self.length or max(k for _, k in shapes) > self.length:
            raise MethodError(
                f"attention of block {index} has shapes {shapes} (queries, keys): expected "
                f"{self.length} queries in all, one for every position, and no more keys; "
                f"{INVISIBLE}"
            )

    def query(self, position: int) -> int:
        """The position in the sequence that predicts a response position."""
        request = self.forward.request
        return self.forward.adapter.query_position(request.layout, position)

    def matrix(self, position: int, block: int) -> Tensor:
        """Weights (L, L) of a block in a position's state, averaged over heads; 0 where a query
        does not see a key."""
        _, found = self.at(position)
        parts, start = [], 0
        for call in found[block]:
            first = first_key(start, call.queries, call.keys)
            parts.append(F.pad(call.mean, (first, self.length - first - call.keys)))
            start += call.queries
        return padded(torch.cat(parts), self.length)

    def row(self, position: int, blocks: Sequence[int]) -> Tensor:
        """Weights (L,) from the query of a response position, averaged over heads and blocks."""
        _, found = self.at(position)
        rows = [pick(found[b], self.query(position), self.length) for b in blocks]
        return torch.stack(rows).mean(0)

    def gradients(self, position: int, token: int) -> list[list[Tensor]]:
        """Mean over heads of (A ⊙ ∂logit/∂A)⁺ of every call (queries, keys), block by block."""
        logits, found = self.at(position)
        nodes = [call.node for parts in found for call in parts]
        with torch.enable_grad():
            score = logits[position, token]
        grads = iter(torch.autograd.grad(score, nodes, retain_graph=True, materialize_grads=True))
        return [[call.mean_positive(next(grads)) for call in parts] for parts in found]


def first_key(start: int, queries: int, keys: int) -> int:
    """Position of a call's first key: its keys end with its own queries, and where a cache has a
    sliding window they do not begin with the sequence."""
    return max(0, start + queries - keys)


def pick(parts: Sequence[Call], query: int, length: int) -> Tensor:
    """Row ``query`` (length,) of a block's weights on the CPU, averaged over heads."""
    start = 0
    for call in parts:
        if query < start + call.queries:
            row = torch.stack([call.head(h)[query - start] for h in range(call.heads)]).mean(0)
            first = first_key(start, call.queries, call.keys)
            return F.pad(row.cpu(), (first, length - first - call.keys))
        start += call.queries
    raise IndexError(f"query {query} behind the last")


def through(row: Tensor, matrices: Sequence[Tensor]) -> Tensor:
    """``row @ matrix``, the matrix (L, L) given as rows of calls (queries, keys), one under the
    other; keys that a call did not see count as 0."""
    out, start = torch.zeros_like(row), 0
    for matrix in matrices:
        queries, keys = matrix.shape
        first = first_key(start, queries, keys)
        out[first : first + keys] += (row[start : start + queries].to(matrix) @ matrix).to(row)
        start += queries
    return out
