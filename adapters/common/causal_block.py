r"""Block diffusion on a context that is causal: what its families share.

As :mod:`captum_dcam.adapters.common.block` has it, but prompt and finished blocks are stored as an
autoregressive model computes them, each position from those before it. Only the block that is being
denoised sees itself whole. Its first token is not denoised: the call that stores what stands before
the block, for the first one the prefill, predicts it as the next token. So of such a call one row
is read, and it is a step of one token.

A step's replay runs the whole answer in one pass: what is before the step's block causally, as it
is stored, the block open to itself. Blocks are counted from the prompt's end. Where nothing is
masked, every block is open to itself: no generation computes that.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.functional import pad
from transformers import DynamicCache

from captum_dcam.adapters.common.block import BlockAdapter, BlockLog, left, pairs, stored
from captum_dcam.adapters.common.prefix import Prefix
from captum_dcam.errors import InputError
from captum_dcam.model.adapter import Request
from captum_dcam.model.layout import Layout
from captum_dcam.model.tap import wide


@dataclass
class CausalBlockLog(BlockLog):
    """The record of one answer (1, T), whose blocks' first tokens have steps of their own."""

    _first: Tensor | None = None

    def predicted(self, logits: Tensor) -> None:
        """Logits (1, 1, V) of what follows all that is stored; a step, if a block begins there."""
        self._first = logits

    def step(self, number: int, own: Tensor) -> None:
        first, last = self._begun(number, own)
        self._step((first + 1, last), own[:, 1:])

    def finished(self, number: int, own: Tensor) -> None:
        """What stands in block ``number`` (1, L) when it is stored."""
        first, last = self._begun(number, own)  # a block of one token has no other step
        self._open = False
        self.canvas[:, first:last] = own

    def _begun(self, number: int, own: Tensor) -> tuple[int, int]:
        first, last = self.blocks.span(number)
        if own.shape[1] != last - first:
            raise InputError(
                f"the family's code computes {own.shape[1]} tokens of the answer in one step: "
                f"expected a block of {last - first}; it decodes in another way than this adapter "
                "knows, so nothing can be recorded"
            )
        if self._first is not None:
            if bool((self.canvas[:, :first] == self.mask_id).any()):
                raise left(first)
            self._step((first, first + 1), torch.full_like(own[:, :1], self.mask_id))
            self.scored(self._first)
            self.canvas[:, first : first + 1], self._first = own[:, :1], None
        return first, last

    def close(self, answer: Tensor) -> None:
        """The decoder's answer (1, …), which ends where it is over; masks stand for the rest of its
        block, which is no part of it."""
        last = self.spans[-1][1]
        told = min(last, answer.shape[1])
        if self._open:
            self.canvas[:, :told] = answer[:, :told]
        self.cut(last)
        self.finish(pad(self.canvas[:, :told], (0, last - told), value=self.mask_id))

    @contextmanager
    def hearing(self, adapter: CausalBlockAdapter) -> Iterator[None]:
        """Record the family's own decoder while the context is open: its first call is the prefill,
        every other one computes a block."""
        number = -1  # of the block
        ids, options = torch.empty(0), {}

        def embedded(_module: nn.Module, args: tuple[Any, ...]) -> None:
            nonlocal ids
            ids = args[0]

        def called(_module: nn.Module, _args: Any, kwargs: dict[str, Any]) -> None:
            nonlocal options
            options = kwargs

        def headed(_module: nn.Module, _args: Any, output: Tensor) -> None:
            nonlocal number
            if number >= 0 and not adapter.stores(ids, options):
                self.step(number, ids)
                self.scored(output[:, :-1] if adapter.shifted else output)
                return
            if number >= 0:
                self.finished(number, ids)
            number += 1
            self.predicted(output[:, -1:])

        with (
            adapter.decoder.embed_tokens.register_forward_pre_hook(embedded),
            adapter.decoder.register_forward_pre_hook(called, with_kwargs=True),
            adapter.head.register_forward_hook(headed),
        ):
            yield


class CausalBlockAdapter(BlockAdapter):
    r"""What the adapters of such families share; arguments as
    :class:`~captum_dcam.adapters.common.block.BlockAdapter` has them.
    """

    whole_prompt = True
    record: ClassVar[type[BlockLog]] = CausalBlockLog
    unfillable: ClassVar[str] = "how its decoder takes given tokens is not known"
    #: inside a block position p is predicted at p - 1, as everywhere else
    shifted: ClassVar[bool] = False

    #: the prompt's name among the arguments of the family's ``generate``
    prompt_name: ClassVar[str] = "input_ids"

    @abstractmethod
    def stores(self, ids: Tensor, options: Mapping[str, Any]) -> bool:
        """Whether a call of the transformer with these ids (1, L) and keyword arguments stores the
        block."""

    def places(self, memory: Prefix, at: Tensor) -> Tensor:
        """Position ids (…, n) of the answer's positions ``at`` (n,). Default: counted on"""
        return (memory.embeds.shape[1] + at)[None]

    def prompt_places(self, embedded: Prefix) -> Tensor:
        """Those of the prompt (…, P). Default: from 0 on"""
        return torch.arange(embedded.embeds.shape[1], device=embedded.embeds.device)[None]

    def decode(self, request: Request, made: dict[str, Any], log: BlockLog) -> Tensor:
        assert isinstance(log, CausalBlockLog)
        inputs = self.inputs(request.pixels, request.extras)
        inputs[self.prompt_name] = inputs.pop("input_ids")
        with log.hearing(self):
            found = self.model.generate(**inputs, **self.options(made))
        ids: Tensor = found[0]  # of a list, of a batch, or beside the number of calls
        return ids.view(1, -1)[:, request.layout.prefix_length :]

    def _span_of(self, block: tuple[int, int], at: Sequence[int], begun: bool) -> tuple[int, int]:
        """The first token, alone, and then the others."""
        first, last = block
        if begun == (first in at) or (first in at and len(at) > 1):
            raise InputError(
                f"a step reveals tokens {list(at)}: expected token {first}, the first of its "
                "block, in a step of its own before the others: the call in front of the block "
                "predicts it"
            )
        return (first + 1, last) if begun else (first, first + 1)

    def query_position(self, layout: Layout, position: int) -> int:
        first = position % self.block_length == 0
        return layout.prefix_length + position - (first or self.shifted)

    def visible_state(self, tokens: Tensor) -> tuple[Tensor, ...]:
        """The answer; tokens that end one stand where it has none."""
        return (tokens.masked_fill(tokens == self.mask_id, self._filler),)

    def masked(self, seen: Tensor, dtype: torch.dtype) -> Tensor:
        """As attention in torch takes it, for rows (R, n, m)."""
        return seen[:, None]

    def prefill(self, embedded: Prefix) -> Prefix:
        embeds, cache = embedded.embeds, DynamicCache()
        at = torch.arange(embeds.shape[1], device=embeds.device)
        seen = (at <= at[:, None])[None]
        states = self.call(embeds, seen, self.prompt_places(embedded), cache)
        return embedded.filled(pairs(cache), states[:, -1])

    def denoise(self, memory: Prefix, *state: Tensor) -> Tensor:
        """Logits (R, T, V) of the whole answer, of which the step's block and the token behind it
        are the generation's. Where a given answer ends inside a block, tokens that end an answer
        fill the block."""
        (canvas,) = state
        prompt, size = memory.embeds.shape[1], self.block_length
        whole = self._blocks(prompt).whole(canvas.shape[1])
        ids = pad(canvas, (0, whole - canvas.shape[1]), value=self._filler)
        at = torch.arange(whole, device=ids.device)
        number = at // size
        masked = (ids == self.mask_id).unflatten(1, (-1, size)).any(-1)  # (R, blocks)
        first = masked.int().argmax(1, keepdim=True)
        open_ = (number[::size] == first) | ~masked.any(1, keepdim=True)
        own = (number == number[:, None]) & open_[:, None, number]
        seen = pad((at <= at[:, None]) | own, (prompt, 0), value=True)
        words = self.decoder.embed_tokens(ids)
        hidden = self.call(words, seen, self.places(memory, at), stored(memory))
        assert memory.last is not None
        before = torch.cat((memory.last[:, None].to(hidden), hidden[:, :-1]), 1)
        rows = before if self.shifted else hidden.index_copy(1, at[::size], before[:, ::size])
        return wide(self.head(rows[:, : canvas.shape[1]]))
