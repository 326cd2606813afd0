r"""Attention weights: how they are seen in any model, and as maps: raw, rollout, grad-rollout.

A :class:`torch.overrides.TorchFunctionMode` sees every call of ``scaled_dot_product_attention``
(and, where attention is written out, every softmax) while a model runs; hooks on the blocks tell
which block it belongs to. So no family has to be known. The original computation runs as it is; the
weights are computed beside it, when they are asked for.

All methods read the row of the position that predicts the word, at the keys that are image tokens.
All are non-negative by definition: they tell where information may have come from, not whether it
spoke for or against the word.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import cached_property, partial, reduce
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from captum_dcam.errors import MethodError
from captum_dcam.methods.base import (
    AttributionTask,
    PerPosition,
    Replays,
    TokenValues,
    against,
    check_block,
    entered,
)
from captum_dcam.model.sequence import check_single, check_whole, padded
from captum_dcam.model.tap import wide

#: what to do about a model whose attention is computed where torch cannot show it
INVISIBLE = (
    'load the model with attn_implementation="sdpa" or "eager", or choose a method that does not '
    "need attention weights"
)


class Fused(NamedTuple):
    """Arguments of ``torch.nn.functional.scaled_dot_product_attention``, in its order."""

    query: Tensor
    key: Tensor
    value: Tensor
    attn_mask: Tensor | None = None
    dropout_p: float = 0.0
    is_causal: bool = False
    scale: float | None = None
    enable_gqa: bool = False

    def run(self, func: Callable) -> Tensor:
        """Call the function; settings at their defaults are left out (older torch lacks some)."""
        defaults = self._field_defaults
        given = {k: v for k, v in self._asdict().items() if v is not defaults.get(k, ...)}
        return func(**given)


def probabilities(scores: Tensor, mask: Tensor | None, causal: bool) -> Tensor:
    r"""Softmax of scores (…, q, k) as ``scaled_dot_product_attention`` masks them.

    A boolean mask is True where a query may attend, any other is added; ``causal`` lets query i see
    keys 0 to i (the upper left triangle). A query that may attend to nothing gets zeros.
    """
    if causal:
        seen = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
        scores = scores.masked_fill(~seen, -torch.inf)
    if mask is not None:
        boolean = mask.dtype == torch.bool
        scores = scores.masked_fill(~mask, -torch.inf) if boolean else scores + mask
    empty = (scores == -torch.inf).all(-1, keepdim=True)
    return scores.masked_fill(empty, 0).softmax(-1).masked_fill(empty, 0)


class Call(ABC):
    r"""One attention computation of batch 1 inside a block.

    Attributes:
        node (Tensor): whose gradient gives that of the weights: the output of fused attention, the
            weights themselves where they are written out.
        heads (int), queries (int), keys (int): shape of the weights.
    """

    node: Tensor
    heads: int
    queries: int
    keys: int

    @abstractmethod
    def head(self, index: int) -> Tensor:
        """Weights (queries, keys) of one head, float32 or wider."""

    @abstractmethod
    def head_gradient(self, index: int, gradient: Tensor) -> Tensor:
        """Gradient (queries, keys) of one head's weights, from that of ``node``."""

    @cached_property
    def mean(self) -> Tensor:
        """Weights (queries, keys), averaged over heads; one head in memory at a time."""
        return reduce(torch.add, map(self.head, range(self.heads))) / self.heads

    def mean_positive(self, gradient: Tensor) -> Tensor:
        """Mean over heads of the positive part of weights × their gradient (queries, keys)."""
        heads = range(self.heads)
        parts = ((self.head(h) * self.head_gradient(h, gradient)).relu() for h in heads)
        return reduce(torch.add, parts) / self.heads


class FusedCall(Call):
    """A call of ``scaled_dot_product_attention``; weights are computed when asked."""

    def __init__(self, call: Fused, output: Tensor) -> None:
        self.node = output
        self._call = call._replace(
            query=call.query.detach(), key=call.key.detach(), value=call.value.detach()
        )
        self.heads, self.queries = call.query.shape[1:3]
        self.keys = call.key.shape[2]

    def _group(self, x: Tensor, index: int) -> Tensor:
        """Keys or values of a query head; grouped heads share them."""
        return wide(x[0, index * x.shape[1] // self.heads])

    def head(self, index: int) -> Tensor:
        call = self._call
        query = wide(call.query[0, index])
        scale = query.shape[-1] ** -0.5 if call.scale is None else call.scale
        mask = call.attn_mask
        if mask is not None:
            mask = mask.detach().expand(1, self.heads, self.queries, self.keys)[0, index]
        scores = query @ self._group(call.key, index).mT * scale
        return probabilities(scores, mask, call.is_causal)

    def head_gradient(self, index: int, gradient: Tensor) -> Tensor:
        return wide(gradient[0, index]) @ self._group(self._call.value, index).mT


class WrittenCall(Call):
    """A softmax (1, heads, q, k) that was seen in a block."""

    def __init__(self, weights: Tensor) -> None:
        self.node = weights
        _, self.heads, self.queries, self.keys = weights.shape

    def head(self, index: int) -> Tensor:
        return wide(self.node[0, index].detach())

    def head_gradient(self, index: int, gradient: Tensor) -> Tensor:
        return wide(gradient[0, index])


class BlockMode(TorchFunctionMode):
    """A mode that knows which transformer block is running; None outside all."""

    def __init__(self) -> None:
        super().__init__()
        self.block: int | None = None

    def __torch_function__(
        self, func: Callable, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        kwargs = kwargs or {}
        return self.call(func, args, kwargs) if self.block is not None else func(*args, **kwargs)

    def call(self, func: Callable, args: tuple, kwargs: dict) -> Any:
        """What a torch function called inside a block returns."""
        raise NotImplementedError


@contextmanager
def inside_blocks(
    blocks: Sequence[nn.Module], mode: BlockMode, twins: Sequence[nn.Module] = ()
) -> Iterator[None]:
    """Enter a mode and keep ``mode.block`` up to date while the context is open. ``twins`` are the
    adapter's ``step_blocks``: each counts as the block of its number."""

    def enter(index: int) -> Callable[..., None]:
        def hook(_module: nn.Module, _args: Any) -> None:
            mode.block = index

        return hook

    def leave(_module: nn.Module, _args: Any, _output: Any) -> None:
        mode.block = None

    with ExitStack() as hooks:
        for index, block in (*enumerate(blocks), *enumerate(twins)):
            hooks.enter_context(block.register_forward_pre_hook(enter(index)))
            # first of a block's hooks: what other hooks compute is not the block's
            hooks.enter_context(block.register_forward_hook(leave, prepend=True))
        try:
            with mode:
                yield
        finally:
            mode.block = None


def is_fused(func: Callable) -> bool:
    """Whether a torch function is fused attention."""
    return func is F.scaled_dot_product_attention


def is_written(func: Callable, result: Any) -> bool:
    """Whether a torch function is a softmax whose result has the shape of attention weights."""
    named = getattr(func, "__name__", "") == "softmax"
    return named and isinstance(result, Tensor) and result.ndim == 4


# -- the whole sequence --------------------------------------------------------------------------


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
        self._reading = Replays(task.forward, partial(recording, self.blocks, gradients, twins))

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
                "scaled_dot_product_attention nor a softmax of (batch, heads, queries, keys): it "
                "is linear attention, which has no weights, or runs in a kernel that torch does "
                f"not show; {INVISIBLE}"
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

    def gradients(self, position: int, token: int, foil: int | None = None) -> list[list[Tensor]]:
        """Mean over heads of (A ⊙ ∂logit/∂A)⁺ of every call (queries, keys), block by block."""
        logits, found = self.at(position)
        nodes = [call.node for parts in found for call in parts]
        with torch.enable_grad():
            score = against(logits[position], foil)[token]
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


# -- the methods ---------------------------------------------------------------------------------


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
        return lambda position, _token, _foil: attentions.row(position, blocks)


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

        def values(position: int, _token: int, _foil: int | None) -> Tensor:
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
    foils=True,
)
class GradRollout(_Weights):
    r"""Relevance by gradient-weighted attention (Eq. 5 and 6, self-attention).

    :math:`R = \prod_b (I + \mathrm{mean}_h (A_b \odot \nabla_{A_b} y)^+)`, y the token's logit; the
    map is the row of the word's position. Only that row is carried through the product.
    """

    def reader(self, task: AttributionTask) -> TokenValues:
        attentions = Attentions(task, gradients=True)

        def values(position: int, token: int, foil: int | None = None) -> Tensor:
            row = attentions.unit_row(position)
            for parts in reversed(attentions.gradients(position, token, foil)):
                row = row + through(row, parts)
            return row

        return values
