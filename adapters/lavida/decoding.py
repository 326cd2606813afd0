r"""How LaViDa decodes: recording its two language models, and one step with gradients.

LLaDA predicts position p at position p and hands out keys and values as ``(k, v)`` a block; Dream
predicts p at p - 1 and has a cache object, and its first token is the argmax of the prefill's last
row. Both embed the canvas's ids anew at every step, so a hook on the embedding sees every canvas.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from captum_dcam.adapters.common.compat import plain_tables
from captum_dcam.adapters.common.recording import CanvasLog


@dataclass
class Recorder(CanvasLog):
    r"""Canvases and logits of a generation, through hooks.

    Args:
        length (int): T, tokens of the canvas.
        dream (bool): position p is predicted at p - 1, and behind a cache the first token is taken
            from the prefill before the first step.
    """

    length: int = 0
    dream: bool = False
    _first: Tensor | None = None

    @contextmanager
    def watching(self, words: nn.Module, head: nn.Module) -> Iterator[None]:
        """Hooks on the embedding of ids and on what gives logits, while the context is open."""

        def embedded(_module: nn.Module, args: tuple[Any, ...]) -> None:
            if args[0].ndim == 2:  # the prompt's ids come as one row without a batch
                self.see(args[0][:, -self.length :])

        def scored(_module: nn.Module, _args: Any, output: Any) -> None:
            logits = output if isinstance(output, Tensor) else output.logits
            if not self.canvases:
                self._first = logits[:, -1]  # the prefill's
                return
            if self.dream:
                logits = torch.cat((logits[:, :1], logits[:, :-1]), dim=1)
            self.read(logits[:, -self.length :])

        handles = [words.register_forward_pre_hook(embedded), head.register_forward_hook(scored)]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def steps_of_commits(self) -> Tensor:
        """(1, T) int64: commit steps; what was there before the first step counts as its."""
        return self.commit_step.clamp_min(0)

    def sureness(self, tokens: Tensor) -> Tensor:
        """(1, T) confidences; Dream's first token has that of the prefill."""
        out = self.confidence.clone()
        if self.dream and self._first is not None:
            chosen = self._first.double().softmax(-1).gather(-1, tokens[:, :1])
            out[:, :1] = chosen.float().cpu()
        return out


def watched(model: Any, dream: bool) -> tuple[nn.Module, nn.Module]:
    """What embeds the canvas, and what gives logits."""
    inner = model.model
    return (inner.embed_tokens, model.lm_head) if dream else (inner.transformer.wte, inner)


@dataclass(frozen=True)
class Prefix:
    r"""What the steps of a request share.

    Args:
        embeds (Tensor): (B, P, D) embeddings of prompt and pictures.
        cache (tuple, optional): for every block its keys and values (B, heads, P, d); None where
            the prefix is not cached.
        first (Tensor, optional): (B, V) Dream's logits of the first token, from the prefill.
        kind (type, optional): class of Dream's cache.
    """

    embeds: Tensor
    cache: tuple[tuple[Tensor, Tensor], ...] | None = None
    first: Tensor | None = None
    kind: type | None = None

    def rows(self, index: Tensor) -> Prefix:
        cache = self.cache
        return replace(
            self,
            embeds=self.embeds[index],
            cache=None if cache is None else tuple((k[index], v[index]) for k, v in cache),
            first=None if self.first is None else self.first[index],
        )

    @property
    def tensors(self) -> list[Tensor]:
        """What steps see of the prefix: keys and values, then Dream's first logits."""
        pairs = [t for pair in self.cache or () for t in pair]
        return pairs if self.first is None else [*pairs, self.first]

    def replaced(self, tensors: Sequence[Tensor]) -> Prefix:
        """Other tensors in place of those that require grad."""
        new = iter(tensors)
        every = [next(new) if t.requires_grad else t for t in self.tensors]
        first = None if self.first is None else every.pop()
        return replace(self, cache=tuple(zip(every[::2], every[1::2], strict=True)), first=first)


def prefilled(model: Any, prefix: Prefix, dream: bool) -> Prefix:
    """Run the blocks over the prefix and keep what steps need of it."""
    if not dream:
        out = model.model(None, input_embeddings=prefix.embeds, use_cache=True)
        return replace(prefix, cache=tuple((k, v) for k, v in out.attn_key_values))
    out = model.forward_dream(None, None, None, inputs_embeds=prefix.embeds, use_cache=True)
    held = out.past_key_values
    pairs = tuple(held.past_key_values[i] for i in range(len(model.model.layers)))
    return replace(prefix, cache=pairs, first=out.logits[:, -1], kind=type(held))


def step_logits(model: Any, prefix: Prefix, canvas: Tensor, dream: bool) -> Tensor:
    """Logits (R, T, V) of one step: row t predicts canvas position t."""
    words = (model.model.embed_tokens if dream else model.model.transformer.wte)(canvas)
    count = canvas.shape[1]
    embeds = words
    if prefix.cache is None:
        embeds = torch.cat((prefix.embeds.to(words.dtype), words), dim=1)
    if not dream:
        past = None if prefix.cache is None else list(prefix.cache)
        out = model.model(None, input_embeddings=embeds, past_key_values=past)
        return out.logits[:, -count:]
    held = None
    if prefix.cache is not None:
        assert prefix.kind is not None
        held = prefix.kind()
        held.past_key_values = dict(enumerate(prefix.cache))
    out = model.forward_dream(None, None, None, inputs_embeds=embeds, past_key_values=held)
    if prefix.first is None:
        return out.logits[:, -count - 1 : -1]
    return torch.cat((prefix.first[:, None], out.logits[:, :-1]), dim=1)


def unembedded(model: Any, hidden: Tensor, dream: bool) -> Tensor:
    """Final norm and output head."""
    inner = model.model
    if dream:
        return model.lm_head(inner.norm(hidden))
    parts, config = inner.transformer, inner.config
    normed = parts.ln_f(hidden)
    tied = getattr(config, "weight_tying", False)
    logits = nn.functional.linear(normed, parts.wte.weight) if tied else parts.ff_out(normed)
    return logits / config.d_model**0.5 if getattr(config, "scale_logits", False) else logits


@contextmanager
def as_written(model: Any) -> Iterator[None]:
    r"""The model computes as its code reads while the context is open; then all is as before.

    - LLaDA's constructor leaves checkpointing of whole blocks on, which cuts hooks off from the
      graph. Its cached positions may stem from ``torch.inference_mode``, and be in no graph.
    - Dream's blocks are compiled, anew for every length and mode of gradients, with other rounding.
    """
    inner = model.model
    before = getattr(inner, "activation_checkpointing_strategy", None)
    if hasattr(inner, "transformer"):
        plain_tables(model)
    with torch.compiler.set_stance("force_eager"):
        if before is None:
            yield
            return
        inner.set_activation_checkpointing(None)
        try:
            yield
        finally:
            inner.set_activation_checkpointing(before)
