r"""The language model behind the pictures: what the family computes before it, and runs of it.

The family's own forward prepares embeddings, positions and deep visual features; it is stopped in
front of the language model and what it would have passed on is kept. So merging, M-RoPE and
deepstack stay the family's.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache
from transformers.modeling_outputs import BaseModelOutputWithPast

from captum_dcam.adapters.common.prefix import Prefix


@dataclass(frozen=True, kw_only=True)
class Prompt(Prefix):
    r"""A prefix with what the families' language models are given besides.

    Args:
        embeds, cache, last: as in :class:`~captum_dcam.adapters.common.prefix.Prefix`; ``last`` is
            normed (B, D).
        positions (Tensor): (k, B, P) int64, k = 3 for M-RoPE, else 1.
        mask (Tensor): (B, P) int64, 0 at padding.
        deep_at (Tensor, optional): (B, P) bool, where deep visual features are added.
        deep (tuple of Tensor): for each of the first blocks, (B, n, D) added to its output there.
    """

    positions: Tensor
    mask: Tensor
    deep_at: Tensor | None = None
    deep: tuple[Tensor, ...] = ()

    def select(self, index: Tensor) -> Prompt:
        return replace(
            super().select(index),
            positions=self.positions[:, index],
            mask=self.mask[index],
            deep_at=None if self.deep_at is None else self.deep_at[index],
            deep=tuple(d[index] for d in self.deep),
        )


@contextmanager
def unchanged(model: nn.Module) -> Iterator[None]:
    """What the family keeps on the model between calls (M-RoPE deltas) is as before afterwards."""
    holders = [(m, m.rope_deltas) for m in model.modules() if hasattr(m, "rope_deltas")]
    try:
        yield
    finally:
        for module, value in holders:
            module.rope_deltas = value


def embedded(model: Any, inputs: dict[str, Any]) -> Prompt:
    """Run the family's forward up to the language model."""
    core = model.model
    caught: list[dict[str, Any]] = []

    def stop(**kwargs: Any) -> BaseModelOutputWithPast:
        caught.append(kwargs)
        return BaseModelOutputWithPast(last_hidden_state=kwargs["inputs_embeds"])

    language = core.language_model
    before = vars(language).get("forward")  # accelerate puts one there
    language.forward = stop
    try:
        with unchanged(model):
            core(**inputs, use_cache=False)
    finally:
        del language.forward
        if before is not None:
            language.forward = before
    passed = caught[0]
    embeds, mask = passed["inputs_embeds"], inputs["attention_mask"]
    positions = passed.get("position_ids")
    if positions is None:
        positions = (mask.cumsum(1) - 1).clamp_min(0)[None]
    deep_at = passed.get("visual_pos_masks")
    deep = tuple(
        d.view(len(embeds), -1, d.shape[-1]) for d in passed.get("deepstack_visual_embeds") or ()
    )
    return Prompt(embeds, positions=positions, mask=mask, deep_at=deep_at, deep=deep)


def run(model: Any, prefix: Prompt, tokens: Tensor | None, cache: DynamicCache | None) -> Tensor:
    r"""Normed states of the prefix, of ``tokens`` (B, T) behind the cached prefix, or of both.

    Args:
        model (nn.Module): the whole model.
        prefix (Prompt): whose own keys and values are in ``cache`` if it has any.
        tokens (Tensor, optional): (B, T) of the answer.
        cache (DynamicCache, optional): is filled, or continued. None: prefix and tokens together
    """
    language = model.model.language_model
    embeds, positions, mask = prefix.embeds, prefix.positions, prefix.mask
    deep: dict[str, Any] = {}
    if tokens is not None:
        words = language.get_input_embeddings()(tokens).to(embeds.dtype)
        valid = positions.masked_fill(mask[None] == 0, -1)
        start = valid.amax((0, 2))[:, None] + 1
        behind = start + torch.arange(tokens.shape[1], device=tokens.device)
        behind = behind.expand(len(positions), *behind.shape)
        mask = torch.cat((mask, torch.ones_like(tokens)), 1)
        behind_cache = prefix.cache is not None
        embeds = words if behind_cache else torch.cat((embeds, words), 1)
        positions = behind if behind_cache else torch.cat((positions, behind), 2)
    if prefix.deep and prefix.deep_at is not None and prefix.cache is None:
        longer = embeds.shape[1] - prefix.deep_at.shape[1]
        deep = {
            "visual_pos_masks": nn.functional.pad(prefix.deep_at, (0, longer)),
            "deepstack_visual_embeds": [d.flatten(0, 1) for d in prefix.deep],
        }
    return language(
        inputs_embeds=embeds,
        attention_mask=mask,
        position_ids=positions if len(positions) > 1 else positions[0],
        past_key_values=cache,
        use_cache=cache is not None,
        **deep,
    ).last_hidden_state


def prefilled(model: Any, prefix: Prompt) -> Prompt:
    """The prefix with its keys, values and last state."""
    cache = DynamicCache()
    last = run(model, prefix, None, cache)[:, -1]
    return prefix.filled(((layer.keys, layer.values) for layer in cache.layers), last)


def denoised(model: Any, prefix: Prompt, tokens: Tensor) -> Tensor:
    """Logits (B, T, V) that predict each of ``tokens`` from those before it."""
    if prefix.cache is None or prefix.last is None:
        states = run(model, prefix, tokens, None)[:, prefix.embeds.shape[1] - 1 : -1]
        return model.lm_head(states)
    cache = DynamicCache()
    for number, (keys, values) in enumerate(prefix.cache):
        cache.update(keys, values, number)  # copies: the prefix's stay as they are
    states = run(model, prefix, tokens, cache)
    return model.lm_head(torch.cat((prefix.last[:, None], states[:, :-1]), 1))
