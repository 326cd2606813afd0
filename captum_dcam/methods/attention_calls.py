r"""Attention computations as torch functions, and a mode that sees them inside blocks.

A :class:`torch.overrides.TorchFunctionMode` sees every call of ``scaled_dot_product_attention``
(and, where attention is written out, every softmax) while a model runs; hooks on the blocks tell
which block it belongs to. So no family has to be known.
"""

from __future__ import annotations

import functools
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from captum_dcam.methods.base import wide

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

    @functools.cached_property
    def mean(self) -> Tensor:
        """Weights (queries, keys), averaged over heads; one head in memory at a time."""
        return functools.reduce(torch.add, map(self.head, range(self.heads))) / self.heads

    def mean_positive(self, gradient: Tensor) -> Tensor:
        """Mean over heads of the positive part of weights × their gradient (queries, keys)."""
        heads = range(self.heads)
        parts = ((self.head(h) * self.head_gradient(h, gradient)).relu() for h in heads)
        return functools.reduce(torch.add, parts) / self.heads


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
