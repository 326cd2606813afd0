r"""Decoding of the embedded model: iterative denoising of a masked canvas.

The families it stands for differ in one thing that matters to attribution. With ``prefix_cache``
the image and the prompt are computed once and every step sees the response alone (LaViDa's regime);
without it every step computes the whole sequence (LLaDA-V's). Both go through
:func:`embed_prefix`, :func:`cache_prefix` and :func:`denoise`; so does every replay.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from itertools import pairwise

import torch
from torch import Tensor

from captum_dcam.mini.modeling import KeyValue, MiniForMaskedDiffusion

REMASKING = ("low_confidence", "random", "entropy", "margin")
SCHEDULES = ("linear", "cosine", "shift")


@dataclass(frozen=True)
class Prefix:
    """What the steps of one request share.

    ``embeds`` (B, P, D) are the prefix's input embeddings; ``cache`` its keys and values when the
    prefix is cached, else None. ``valid`` (B, P) is False at padding, None when there is none.
    """

    embeds: Tensor
    positions: Tensor
    valid: Tensor | None
    cache: tuple[KeyValue, ...] | None

    def rows(self, index: Tensor) -> Prefix:
        """The prefixes of examples ``index`` (R,), for R canvases."""
        return Prefix(
            self.embeds[index],
            self.positions[index],
            None if self.valid is None else self.valid[index],
            None if self.cache is None else tuple((k[index], v[index]) for k, v in self.cache),
        )


def embed_prefix(
    model: MiniForMaskedDiffusion,
    pixel_values: Tensor,
    input_ids: Tensor,
    attention_mask: Tensor | None = None,
) -> Prefix:
    """Embed image and prompt; nothing is cached yet."""
    valid = None
    if attention_mask is not None and not bool(attention_mask.all()):
        valid = attention_mask.bool()
    counted = torch.ones_like(input_ids) if valid is None else valid.long()
    positions = (counted.cumsum(1) - 1).clamp_min(0)
    return Prefix(model.embed(input_ids, pixel_values), positions, valid, None)


def cache_prefix(model: MiniForMaskedDiffusion, prefix: Prefix) -> Prefix:
    """Run the transformer over the prefix and keep its keys and values."""
    cache = model(
        inputs_embeds=prefix.embeds,
        segment_masks=None if prefix.valid is None else (prefix.valid[:, None, None],),
        position_ids=prefix.positions,
        use_cache=True,
        logits_from=prefix.embeds.shape[1],
    ).past_key_values
    return replace(prefix, cache=cache)


def denoise(model: MiniForMaskedDiffusion, prefix: Prefix, canvas: Tensor) -> Tensor:
    """Logits (B, T, V) of a canvas (B, T) behind a prefix of the same batch."""
    response = model.embed_words(canvas)
    start = prefix.positions[:, -1:] + 1
    positions = start + torch.arange(canvas.shape[1], device=canvas.device)
    masks = None
    if prefix.valid is not None:
        keys = torch.cat((prefix.valid, torch.ones_like(canvas, dtype=torch.bool)), dim=1)
        masks = (keys[:, None, None],)
    if prefix.cache is not None:
        return model(
            inputs_embeds=response,
            segment_masks=masks,
            position_ids=positions,
            past_key_values=prefix.cache,
        ).logits
    return model(
        inputs_embeds=torch.cat((prefix.embeds, response), dim=1),
        segment_masks=masks,
        position_ids=torch.cat((prefix.positions, positions), dim=1),
        logits_from=prefix.embeds.shape[1],
    ).logits


def commits_per_step(masked: int, steps: int, schedule: str) -> list[int]:
    """How many of ``masked`` tokens each step commits; they add up to ``masked``.

    ``linear`` spreads them evenly, the remainder first; ``cosine`` starts slowly; ``shift`` is the
    time shift by 1/3 that LaViDa's evaluation uses and starts fast.
    """
    if schedule == "linear":
        base, rest = divmod(masked, steps)
        return [base + (i < rest) for i in range(steps)]
    t = [i / steps for i in range(steps + 1)]
    if schedule == "cosine":
        done = [1 - math.cos(x * math.pi / 2) for x in t]
    else:
        done = [1 - (1 - x) / (1 + 2 * x) for x in t]
    marks = [round(masked * d) for d in done]
    return [b - a for a, b in pairwise(marks)]


def confidence_of(probs: Tensor, chosen: Tensor, remasking: str, noise: Tensor | None) -> Tensor:
    """Confidence (B, T) by which tokens are committed, highest first."""
    if remasking == "random":
        assert noise is not None
        return noise
    if remasking == "entropy":
        return (probs * probs.clamp_min(1e-12).log()).sum(-1)
    if remasking == "margin":
        top = probs.topk(2, dim=-1).values
        return top[..., 0] - top[..., 1]
    return probs.gather(-1, chosen.unsqueeze(-1)).squeeze(-1)


@dataclass(frozen=True)
class Decoded:
    """A recorded generation: canvases (S, B, T) before each step, and what each step committed."""

    tokens: Tensor
    canvases: Tensor
    commit_step: Tensor
    confidence: Tensor


def check_settings(
    gen_length: int, block_length: int, steps: int, remasking: str, schedule: str
) -> None:
    """Raise ValueError for decoding settings that cannot work, before any work is done."""
    if gen_length < 1:
        raise ValueError(f"gen_length is {gen_length}: the canvas needs at least one token")
    if block_length < 1 or gen_length % block_length:
        raise ValueError(
            f"gen_length {gen_length} is not a multiple of block_length {block_length}"
        )
    blocks = gen_length // block_length
    if steps < blocks or steps % blocks:
        raise ValueError(
            f"steps is {steps}: expected a positive multiple of the {blocks} blocks "
            f"(gen_length {gen_length} / block_length {block_length})"
        )
    if remasking not in REMASKING:
        raise ValueError(f"remasking is {remasking!r}: expected one of {REMASKING}")
    if schedule not in SCHEDULES:
        raise ValueError(f"schedule is {schedule!r}: expected one of {SCHEDULES}")


@torch.no_grad()
def generate(
    model: MiniForMaskedDiffusion,
    pixel_values: Tensor,
    input_ids: Tensor,
    attention_mask: Tensor | None = None,
    *,
    gen_length: int = 32,
    block_length: int | None = None,
    steps: int | None = None,
    temperature: float = 0.0,
    remasking: str = "low_confidence",
    schedule: str = "linear",
    prefix_cache: bool = True,
    generator: torch.Generator | None = None,
) -> Decoded:
    r"""Decode an answer and record every step.

    Args:
        model (MiniForMaskedDiffusion): the model.
        pixel_values (Tensor): (B, 3, S, S) or (B, images, 3, S, S), normalised.
        input_ids (Tensor): (B, P), ``<image>`` placeholders and the prompt.
        attention_mask (Tensor, optional): (B, P), 0 at padding (left).
        gen_length (int, optional): tokens of the canvas. Default: 32
        block_length (int, optional): semi-autoregressive block; ``gen_length`` for none.
            Default: 4, as the model decodes best, where that fits ``gen_length`` and ``steps``,
            else ``gen_length``
        steps (int, optional): denoising steps in all. Default: ``gen_length``
        temperature (float, optional): of sampling; 0 is greedy. Default: 0
        remasking (str, optional): ``low_confidence``, ``random``, ``entropy`` or ``margin``.
        schedule (str, optional): ``linear``, ``cosine`` or ``shift``. Default: ``"linear"``
        prefix_cache (bool, optional): compute image and prompt once. Default: True
        generator (torch.Generator, optional): needed by ``temperature`` > 0 and ``random``.

    Returns:
        Decoded: tokens (B, T), canvases (S, B, T), commit_step and confidence (B, T).
    """
    steps = gen_length if steps is None else steps
    if block_length is None:
        fits = gen_length % 4 == 0 and steps % max(gen_length // 4, 1) == 0
        block_length = 4 if fits else gen_length
    check_settings(gen_length, block_length, steps, remasking, schedule)
    if (temperature > 0 or remasking == "random") and generator is None:
        raise ValueError("sampling needs a generator: pass torch.Generator().manual_seed(0)")
    prefix = embed_prefix(model, pixel_values, input_ids, attention_mask)
    if prefix_cache:
        prefix = cache_prefix(model, prefix)
    b, device = input_ids.shape[0], input_ids.device
    canvas = torch.full((b, gen_length), model.config.mask_token_id, device=device)
    commit_step = torch.zeros_like(canvas)
    confidence = torch.zeros(b, gen_length, device=device)
    canvases = []
    blocks = gen_length // block_length
    plan = commits_per_step(block_length, steps // blocks, schedule)
    for step in range(steps):
        canvases.append(canvas.clone())
        logits = denoise(model, prefix, canvas)
        chosen, probs = _choose(logits, model.config.mask_token_id, temperature, generator)
        noise = None
        if remasking == "random":
            assert generator is not None
            noise = torch.rand(canvas.shape, generator=generator, device=generator.device).to(
                device
            )
        sure = confidence_of(probs, chosen, remasking, noise)
        block = step // len(plan)
        open_ = canvas == model.config.mask_token_id
        open_[:, (block + 1) * block_length :] = False
        ranked = sure.masked_fill(~open_, -math.inf)
        where = ranked.topk(plan[step % len(plan)], dim=1).indices
        canvas.scatter_(1, where, chosen.gather(1, where))
        commit_step.scatter_(1, where, step)
        picked = probs.gather(-1, chosen.unsqueeze(-1)).squeeze(-1).float()
        confidence.scatter_(1, where, picked.gather(1, where))
    return Decoded(canvas, torch.stack(canvases), commit_step, confidence)


def _choose(
    logits: Tensor, mask_id: int, temperature: float, generator: torch.Generator | None
) -> tuple[Tensor, Tensor]:
    """Token and probabilities per position; Gumbel noise when the temperature is above 0.

    The mask token itself is never chosen: a position would count as committed and stay masked.
    """
    probs = logits.double().softmax(-1)
    logits = logits.index_fill(-1, torch.tensor([mask_id], device=logits.device), -math.inf)
    if temperature <= 0:
        return logits.argmax(-1), probs
    assert generator is not None
    u = torch.rand(logits.shape, generator=generator, device=generator.device, dtype=torch.float64)
    gumbel = -(-u.clamp_min(1e-12).log()).log()
    return (logits.double() / temperature + gumbel.to(logits.device)).argmax(-1), probs
