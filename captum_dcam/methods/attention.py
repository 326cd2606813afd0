r"""Attention weights as maps: raw, rollout, grad-rollout.

All read the row of the position that predicts the word, at the keys that are image tokens. All are
non-negative by definition: they tell where information may have come from, not whether it spoke for
or against the word.

The weights are those of any model that computes attention with torch. The original computation runs
as it is; the weights are computed beside it, when they are asked for.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
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
from captum_dcam.methods.base import (
    AttributionTask,
    PerPosition,
    Reading,
    TokenValues,
    check_block,
    entered,
)
from captum_dcam.model.sequence import check_single, check_whole, padded


class _Recorder(BlockMode):
    """Keeps every attention computation; with ``gradients`` its node becomes part of a graph."""

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


class Attentions:
    r"""Attention of the whole sequence of L tokens, in the states of a task's tokens.

    With a prefix cache the prefix's rows come from one prefill, the answer's from the step; without
    a cache all come from the step. The last state is kept: its tokens cost one pass together.

    Args:
        task (AttributionTask): batch 1.
        gradients (bool, optional): keep the graph for :meth:`gradients`. Default: False
    """

    def __init__(self, task: AttributionTask, gradients: bool = False) -> None:
        self.task, self.forward, self.length = task, task.forward, task.length
        self.blocks = list(task.forward.adapter.blocks)
        self._gradients, twins = gradients, task.forward.adapter.step_blocks
        self._reading = Reading(task.forward, partial(recording, self.blocks, gradients, twins))

    def at(self, position: int) -> tuple[Tensor, tuple[tuple[Call, ...], ...]]:
        """Logits (T, V) and, block by block, the calls whose rows make up the sequence."""
        with torch.set_grad_enabled(self._gradients):
            logits, calls = self._reading.step(self.task.step(position))
            _, before = self._reading.prefix()
        self._check_seen(calls)
        if self.forward.trajectory.cache == "prefix":
            self._check_seen(before)
        found = tuple((*before.get(i, ()), *calls[i]) for i in range(len(self.blocks)))
        for index, parts in enumerate(found):
            self._check_shapes(index, [(c.queries, c.keys) for c in parts])
        return logits, found

    def _check_seen(self, calls: dict[int, list[Call]]) -> None:
        """Raise MethodError for blocks whose attention was not seen."""
        missing = [i for i in range(len(self.blocks)) if not calls.get(i)]
        if missing:
            raise MethodError(
                f"no attention weights of blocks {missing} "
                f"({type(self.blocks[missing[0]]).__name__}): their attention is neither torch's "
                "scaled_dot_product_attention nor a softmax of (batch, heads, queries, keys), so "
                f"it runs in a kernel that torch does not show; {INVISIBLE}"
            )

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

    def unit_row(self, position: int) -> Tensor:
        """(L,) 1 at the position that predicts a response position, else 0."""
        dtype = torch.promote_types(self.forward.adapter.dtype, torch.float32)
        row = torch.zeros(self.length, dtype=dtype)
        row[self.query(position)] = 1
        return row

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


class _Weights(PerPosition):
    """Attention methods: one call shows whether the model's attention can be seen."""

    def check(self, task: AttributionTask) -> None:
        super().check(task)
        Attentions(task).at(task.targets[0].positions[0] if task.targets else 0)


@entered(
    "attention",
    "Attention",
    "attention",
    "attention weights as they are",
    "1",
    "attention",
    text=True,
)
class RawAttention(_Weights):
    r"""Attention from the word's position to every image token, averaged over heads.

    The text part is the same row at text tokens. It does not depend on the token's id: two tokens
    that are read at one position in one state have the same map.

    Args:
        block (int, optional): whose weights; negative counts from the end. Default: the mean over
            all blocks
    """

    block: int | None = None

    def check(self, task: AttributionTask) -> None:
        self.reader(task)
        super().check(task)

    def reader(self, task: AttributionTask) -> TokenValues:
        adapter, attentions = task.forward.adapter, Attentions(task)
        every = range(len(adapter.blocks))
        blocks = every if self.block is None else [check_block(adapter, self.block)]
        return lambda position, _token: attentions.row(position, blocks)


@entered(
    "attention_rollout",
    "Attention rollout",
    "attention",
    "Abnar & Zuidema, ACL 2020",
    "1",
    "attention",
    text=True,
)
class AttentionRollout(_Weights):
    r"""Attention rollout: the product over blocks of :math:`(\bar A + I) / 2` (Eq. 1 and Sec. 3).

    :math:`\bar A` is averaged over heads; rows add up to 1. Only the row of the word's position is
    carried through the product. Like raw attention it does not depend on the token's id.
    """

    def reader(self, task: AttributionTask) -> TokenValues:
        attentions = Attentions(task)

        def values(position: int, _token: int) -> Tensor:
            _, found = attentions.at(position)
            row = attentions.unit_row(position)
            for parts in reversed(found):
                row = (row + through(row, [call.mean for call in parts])) / 2
                row = row / row.sum()
            return row

        return values


@entered(
    "grad_rollout",
    "Grad-rollout",
    "attention",
    "Chefer et al., ICCV 2021",
    "1 + 1 back",
    "attention",
    "gradients",
    text=True,
)
class GradRollout(_Weights):
    r"""Relevance by gradient-weighted attention (Eq. 5 and 6, self-attention).

    :math:`R = \prod_b (I + \mathrm{mean}_h (A_b \odot \nabla_{A_b} y)^+)`, y the token's logit; the
    map is the row of the word's position. Only that row is carried through the product.
    """

    def reader(self, task: AttributionTask) -> TokenValues:
        attentions = Attentions(task, gradients=True)

        def values(position: int, token: int) -> Tensor:
            row = attentions.unit_row(position)
            for parts in reversed(attentions.gradients(position, token)):
                row = row + through(row, parts)
            return row

        return values
