"""Calls of the twin behind its images, and its generation: greedy or sampled, token by token."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from captum_dcam.adapters.common.prefix import Prefix
from captum_dcam.adapters.common.settings import TEMPERATURE, Setting, Settings, length
from captum_dcam.mini import modeling
from captum_dcam.mini.causal import MiniForCausalLM

SETTINGS = Settings(
    "mini_ar",
    {"gen_length": Setting(32, length, also="max_new_tokens"), **TEMPERATURE},
    refused={
        name: "an autoregressive model writes token by token"
        for name in ("steps", "block_length", "remasking", "schedule")
    },
)


@dataclass(frozen=True, kw_only=True)
class Prompt(Prefix):
    r"""A prefix with what the twin is given besides.

    Args:
        embeds, cache: as in :class:`~captum_dcam.adapters.common.prefix.Prefix`.
        last (Tensor, optional): (B, V) logits of the answer's first token, once prefilled.
        positions (Tensor): (B, P) int64.
        valid (Tensor): (B, P) bool, False at padding.
    """

    positions: Tensor
    valid: Tensor


def embedded(
    model: MiniForCausalLM, pixels: Tensor, input_ids: Tensor, attention_mask: Tensor
) -> Prompt:
    """Image and prompt as the first block is given them."""
    prefix = modeling.embed_prefix(model, pixels, input_ids, attention_mask)
    return Prompt(prefix.embeds, positions=prefix.positions, valid=attention_mask.bool())


def prefilled(model: MiniForCausalLM, prompt: Prompt) -> Prompt:
    """The prompt with its keys, values and the first token's logits."""
    out = model(
        inputs_embeds=prompt.embeds,
        segment_masks=(prompt.valid[:, None, None],),
        position_ids=prompt.positions,
        use_cache=True,
        logits_from=prompt.embeds.shape[1] - 1,
    )
    return prompt.filled(out.cache, out.logits[:, 0])


def denoised(model: MiniForCausalLM, prompt: Prompt, tokens: Tensor) -> Tensor:
    """Logits (B, T, V) that predict each of ``tokens`` (B, T) from those before it."""
    words = model.embed_words(tokens)
    count = tokens.shape[1]
    positions = prompt.positions[:, -1:] + 1 + torch.arange(count, device=tokens.device)
    valid = torch.cat((prompt.valid, torch.ones_like(tokens, dtype=torch.bool)), 1)
    first = 0
    if prompt.cache is None:
        words = torch.cat((prompt.embeds, words), 1)
        positions = torch.cat((prompt.positions, positions), 1)
        first = prompt.embeds.shape[1] - 1
    logits = model(
        inputs_embeds=words,
        segment_masks=(valid[:, None, None],),
        position_ids=positions,
        past_key_values=prompt.cache,
        logits_from=first,
    ).logits[:, :-1]
    if prompt.cache is None or prompt.last is None:
        return logits
    return torch.cat((prompt.last[:, None], logits), 1)


@torch.no_grad()
def generated(
    model: MiniForCausalLM,
    prompt: Prompt,
    gen_length: int,
    temperature: float,
    generator: torch.Generator | None,
) -> tuple[Tensor, Tensor]:
    r"""Write an answer behind a prompt, prefilled or not.

    Returns:
        tuple: tokens (B, T), of which what follows an end is padding, and their probabilities
        (B, T) float32; T is where the longest answer ends, ``gen_length`` at most.
    """
    end, pad = model.config.eos_token_id, model.config.pad_token_id
    rows = len(prompt.embeds)
    tokens = torch.full((rows, gen_length), pad, device=prompt.embeds.device)
    sure = torch.zeros(rows, gen_length, device=prompt.embeds.device)
    open_ = torch.ones(rows, dtype=torch.bool, device=prompt.embeds.device)
    count = 0
    while count < gen_length and bool(open_.any()):
        logits = denoised(model, prompt, tokens[:, : count + 1])[:, count].double()
        odds = logits.softmax(-1)
        chosen = logits.argmax(-1)
        if temperature > 0:
            warm = (logits / temperature).softmax(-1).cpu()
            chosen = torch.multinomial(warm, 1, generator=generator)[:, 0].to(chosen.device)
        tokens[:, count] = chosen.where(open_, pad)
        sure[:, count] = odds.gather(1, tokens[:, count, None])[:, 0].float()
        open_ = open_ & (chosen != end)
        count += 1
    return tokens[:, :count].clone(), sure[:, :count].clone()
