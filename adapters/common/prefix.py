"""A prefix that is computed once: what the steps of a request share, and the adapter's part."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, TypeVar

from torch import Tensor

from captum_dcam.model.adapter import Adapter

#: an attention layer's keys and values, each (B, heads, P, d)
KeyValue = tuple[Tensor, Tensor]
P = TypeVar("P", bound="Prefix")


@dataclass(frozen=True)
class Prefix:
    r"""What all steps of B examples share; every tensor of a subclass is batch first, too.

    Args:
        embeds (Tensor): (B, P, D) input embeddings of prompt and images.
        cache (tuple, optional): keys and values of every block, once prefilled.
        last (Tensor, optional): (B, …) of the prefix's last position, once prefilled: what the
            answer's first token is read from, where position p is predicted at p - 1.
    """

    embeds: Tensor
    cache: tuple[KeyValue, ...] | None = None
    last: Tensor | None = None

    def filled(self: P, cache: Iterable[KeyValue], last: Tensor | None = None) -> P:
        """The same prefix, prefilled."""
        return replace(self, cache=tuple(cache), last=last)

    def select(self: P, index: Tensor) -> P:
        """The prefixes of examples ``index`` (R,): copies."""
        return replace(self, **{f.name: _rows(getattr(self, f.name), index) for f in fields(self)})

    @property
    def tensors(self) -> list[Tensor]:
        """What steps see of a cached prefix: keys and values, then ``last``."""
        pairs = [t for pair in self.cache or () for t in pair]
        return pairs if self.last is None else [*pairs, self.last]

    def replaced(self: P, tensors: Sequence[Tensor]) -> P:
        """Other tensors in place of those of :attr:`tensors` that require grad."""
        new = iter(tensors)
        every = [next(new) if t.requires_grad else t for t in self.tensors]
        last = None if self.last is None else every.pop()
        return self.filled(zip(every[::2], every[1::2], strict=True), last)


def _rows(value: Any, index: Tensor) -> Any:
    """Rows ``index`` of a tensor, or of every tensor of a tuple; all else as it is."""
    if isinstance(value, tuple):
        return tuple(_rows(v, index) for v in value)
    return value[index] if isinstance(value, Tensor) else value


class PrefixAdapter(Adapter):
    """An adapter whose memory is a :class:`Prefix`."""

    def select(self, memory: Prefix, index: Tensor) -> Prefix:
        return memory.select(index)

    def memory_tensors(self, memory: Prefix) -> list[Tensor]:
        return memory.tensors

    def replace_memory(self, memory: Prefix, tensors: Sequence[Tensor]) -> Prefix:
        return memory.replaced(tensors)
