r"""The embedded masked-diffusion multimodal model.

Vision tower (convolutional stem, small ViT) → projector → bidirectional LLaDA-type transformer
(RMSNorm, RoPE, SwiGLU) → tied output embedding. Attention is block-causal over *segments*: queries
of a segment see every key up to the segment's end. One segment is full bidirectional attention
(LLaDA-V's); ``(prefix, response)`` is LaViDa's, with which the prefix can be computed once and
cached. The model was trained with both.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, PreTrainedModel
from transformers.utils import ModelOutput

from captum_dcam import checks
from captum_dcam.errors import InputError
from captum_dcam.mini.configuration import MiniConfig
from captum_dcam.mini.vision import MiniVisionTower, attend

#: keys and values of one block, each (B, heads, L, D / heads)
KeyValue = tuple[Tensor, Tensor]


@dataclass
class MaskedDiffusionOutput(ModelOutput):
    """Logits (B, L, V), of which ``[:, p]`` predict position p itself, and the cache if asked."""

    logits: Tensor | None = None
    cache: tuple[KeyValue, ...] | None = None  # transformers 5.24 allows no other name


# -- the transformer -------------------------------------------------------------------------------


class TiedEmbedding(nn.Embedding):
    """Embeds ids, and gives the logits of hidden states: both by a call, so that the weights are
    there where accelerate fetches them for each."""

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight) if x.is_floating_point() else super().forward(x)


class MiniRMSNorm(nn.Module):
    """Root-mean-square norm, computed in float32 or wider."""

    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        wide = x if x.dtype == torch.float64 else x.float()
        scale = torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.eps)
        return (wide * scale * self.weight).to(x.dtype)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding of (B, heads, L, d) by angles (B or 1, 1, L, d/2), half-split layout."""
    a, b = x.chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1)


class MiniAttention(nn.Module):
    """Block-causal multi-head attention over segments, with an optional key/value cache."""

    def __init__(self, config: MiniConfig) -> None:
        super().__init__()
        d = config.hidden_size
        self.config = config
        self.heads = config.num_attention_heads
        self.q_proj = nn.Linear(d, d, bias=False)
        self.k_proj = nn.Linear(d, d, bias=False)
        self.v_proj = nn.Linear(d, d, bias=False)
        self.o_proj = nn.Linear(d, d, bias=False)

    def _split(self, x: Tensor) -> Tensor:
        return x.view(x.shape[0], x.shape[1], self.heads, -1).transpose(1, 2)

    def forward(
        self,
        x: Tensor,
        rope: tuple[Tensor, Tensor],
        segments: Sequence[int],
        masks: Sequence[Tensor | None],
        past: KeyValue | None,
    ) -> tuple[Tensor, KeyValue]:
        q = rotate(self._split(self.q_proj(x)), *rope)
        k = rotate(self._split(self.k_proj(x)), *rope)
        v = self._split(self.v_proj(x))
        if past is not None:
            k, v = torch.cat((past[0], k), dim=2), torch.cat((past[1], v), dim=2)
        end = k.shape[2] - x.shape[1]
        eager = self.config._attn_implementation == "eager"
        outs = []
        for part, length, mask in zip(q.split(list(segments), dim=2), segments, masks, strict=True):
            end += length
            outs.append(attend(part, k[:, :, :end], v[:, :, :end], mask, eager))
        mixed = torch.cat(outs, dim=2).transpose(1, 2).flatten(2)
        return self.o_proj(mixed), (k, v)


class MiniBlock(nn.Module):
    """Transformer block; returns ``(hidden, (keys, values))``, ``(hidden, None)`` without cache."""

    def __init__(self, config: MiniConfig) -> None:
        super().__init__()
        d, m = config.hidden_size, config.intermediate_size
        self.input_norm = MiniRMSNorm(d, config.rms_norm_eps)
        self.attention = MiniAttention(config)
        self.mlp_norm = MiniRMSNorm(d, config.rms_norm_eps)
        self.gate_proj = nn.Linear(d, m, bias=False)
        self.up_proj = nn.Linear(d, m, bias=False)
        self.down_proj = nn.Linear(m, d, bias=False)

    def forward(
        self,
        hidden: Tensor,
        rope: tuple[Tensor, Tensor],
        segments: Sequence[int],
        masks: Sequence[Tensor | None],
        past: KeyValue | None = None,
        use_cache: bool = False,
    ) -> tuple[Tensor, KeyValue | None]:
        mixed, present = self.attention(self.input_norm(hidden), rope, segments, masks, past)
        hidden = hidden + mixed
        x = self.mlp_norm(hidden)
        hidden = hidden + self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))
        return hidden, present if use_cache else None


class MiniForMaskedDiffusion(PreTrainedModel):
    r"""Masked-diffusion multimodal LLM in Hugging Face's habits.

    ``forward`` takes a sequence and replaces its ``<image>`` placeholders by projected image
    tokens, row by row, image by image. Decoding is in :func:`captum_dcam.mini.modeling.generate`.
    """

    config_class = MiniConfig
    config: MiniConfig
    base_model_prefix = ""
    main_input_name = "pixel_values"
    _supports_sdpa = True
    _no_split_modules = ("MiniBlock", "VisionBlock")

    def __init__(self, config: MiniConfig) -> None:
        super().__init__(config)
        d = config.hidden_size
        self.vision_tower = MiniVisionTower(config)
        self.projector = nn.Sequential(nn.Linear(d, d), nn.GELU(), nn.Linear(d, d))
        self.embed_tokens = TiedEmbedding(config.vocab_size, d)
        self.layers = nn.ModuleList(MiniBlock(config) for _ in range(config.num_hidden_layers))
        self.norm = MiniRMSNorm(d, config.rms_norm_eps)
        self.post_init()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=module.in_features**-0.5)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, nn.Embedding):
            nn.init.normal_(module.weight, std=self.config.hidden_size**-0.5)
        elif isinstance(module, MiniVisionTower):
            nn.init.normal_(module.position_embedding, std=0.1)

    def generate(self, **inputs: Any) -> Any:
        """Decode an answer: :func:`captum_dcam.mini.modeling.generate` on this model."""
        return generate(self, **inputs)

    def get_input_embeddings(self) -> nn.Module:
        return self.embed_tokens

    def get_image_features(self, pixel_values: Tensor, pool: int = 1) -> Tensor:
        """Projected image tokens (B, N, D) of normalised pixels (B, 3, S, S)."""
        return self.projector(self.vision_tower(pixel_values, pool))

    def embed(self, input_ids: Tensor, pixel_values: Tensor | None = None) -> Tensor:
        """Word embeddings (B, L, D), with image tokens in place of ``<image>`` placeholders.

        Raises:
            ValueError: the placeholders do not match the images' tokens.
        """
        words = self.embed_words(input_ids)
        where = input_ids == self.config.image_token_id
        if pixel_values is None:
            return words
        images = self.get_image_features(pixel_values.flatten(0, -4)).reshape(-1, words.shape[-1])
        if int(where.sum()) != images.shape[0]:
            raise InputError(
                f"input_ids hold {int(where.sum())} image placeholders but pixel_values "
                f"{tuple(pixel_values.shape)} give {images.shape[0]} image tokens: prepare both "
                "with the same MiniProcessor call"
            )
        return words.masked_scatter(where.unsqueeze(-1), images.to(words.dtype))

    def embed_words(self, input_ids: Tensor) -> Tensor:
        """Scaled word embeddings (B, L, D)."""
        return self.embed_tokens(input_ids) * self.config.hidden_size**0.5

    def unembed(self, hidden: Tensor) -> Tensor:
        """Final norm and tied output embedding: (…, D) → (…, V)."""
        logits: Tensor = self.embed_tokens(self.norm(hidden))
        return logits

    def rope(self, positions: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Cosine and sine (B, 1, L, d/2) of positions (B, L), which may be fractional."""
        half = self.config.hidden_size // self.config.num_attention_heads // 2
        exponent = torch.arange(half, device=positions.device, dtype=torch.float64) / half
        angle = positions.double()[:, None, :, None] * self.config.rope_theta**-exponent
        return angle.cos().to(dtype), angle.sin().to(dtype)

    def forward(
        self,
        input_ids: Tensor | None = None,
        pixel_values: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        segments: Sequence[int] | None = None,
        segment_masks: Sequence[Tensor | None] | None = None,
        position_ids: Tensor | None = None,
        past_key_values: tuple[KeyValue, ...] | None = None,
        use_cache: bool = False,
        logits_from: int = 0,
    ) -> MaskedDiffusionOutput:
        r"""One denoising call.

        Args:
            input_ids (Tensor): (B, L); ``<image>`` placeholders are filled from ``pixel_values``.
            pixel_values (Tensor, optional): (B, 3, S, S) or (B, images, 3, S, S), normalised.
            inputs_embeds (Tensor, optional): (B, L, D) in place of the two above.
            segments (sequence of int, optional): block-causal segment lengths, sum L.
                Default: one segment, full bidirectional attention
            segment_masks (sequence, optional): per segment None or a mask that broadcasts to
                (B, heads, queries, keys): bool (True: may attend) or additive.
            position_ids (Tensor, optional): (B, L). Default: consecutive after the cache
            past_key_values (tuple, optional): cache of an earlier call with ``use_cache=True``.
            logits_from (int, optional): first position whose logits are wanted. Default: 0

        Returns:
            MaskedDiffusionOutput: logits (B, L - logits_from, V).
        """
        if inputs_embeds is None:
            if input_ids is None:
                raise InputError("give input_ids or inputs_embeds: both are None")
            inputs_embeds = self.embed(input_ids, pixel_values)
        length = inputs_embeds.shape[1]
        segments = (length,) if segments is None else tuple(segments)
        if sum(segments) != length:
            raise InputError(
                f"segments {segments} add up to {sum(segments)}, the input to {length}"
            )
        masks = (None,) * len(segments) if segment_masks is None else segment_masks
        past_length = 0 if past_key_values is None else past_key_values[0][0].shape[2]
        if position_ids is None:
            steps = torch.arange(past_length, past_length + length, device=inputs_embeds.device)
            position_ids = steps[None]
        rope = self.rope(position_ids, inputs_embeds.dtype)
        hidden, cache = inputs_embeds, []
        for i, layer in enumerate(self.layers):
            past = None if past_key_values is None else past_key_values[i]
            hidden, present = layer(hidden, rope, segments, masks, past=past, use_cache=use_cache)
            cache.append(present)
        return MaskedDiffusionOutput(
            logits=self.unembed(hidden[:, logits_from:]),
            cache=tuple(cache) if use_cache else None,
        )


AutoConfig.register(MiniConfig.model_type, MiniConfig, exist_ok=True)
AutoModel.register(MiniConfig, MiniForMaskedDiffusion, exist_ok=True)


# -- decoding: iterative denoising of a masked canvas ----------------------------------------------
#
# The families that the model stands for differ in one thing that matters to attribution. With
# ``prefix_cache`` the image and the prompt are computed once, and a step computes only the response
# (as LaViDa); without it, every step computes the whole sequence (as LLaDA-V). Both use
# embed_prefix and denoise, and so does every replay.

REMASKING = ("low_confidence", "random", "entropy", "margin")
SCHEDULES = ("linear", "cosine", "shift")


@dataclass(frozen=True)
class Prefix:
    """What the steps of one request share.

    ``embeds`` (B, P, D) are the prefix's input embeddings; ``cache`` holds its keys and values, or
    is None when the prefix is not cached. ``valid`` (B, P) is False at padding; None: no padding.
    """

    embeds: Tensor
    positions: Tensor
    valid: Tensor | None
    cache: tuple[KeyValue, ...] | None

    def select(self, index: Tensor) -> Prefix:
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
    ).cache
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
    behind = 0
    if prefix.cache is None:
        behind = prefix.embeds.shape[1]
        response = torch.cat((prefix.embeds, response), dim=1)
        positions = torch.cat((prefix.positions, positions), dim=1)
    return model(
        inputs_embeds=response,
        segment_masks=masks,
        position_ids=positions,
        past_key_values=prefix.cache,
        logits_from=behind,
    ).logits


def commits_per_step(masked: int, steps: int, schedule: str) -> list[int]:
    """How many of ``masked`` tokens each step commits; the numbers add up to ``masked``.

    ``linear`` spreads them evenly, the remainder first; ``cosine`` starts slowly; ``shift``, the
    time shift by 1/3 of LaViDa's evaluation, starts fast.
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


def confidence_of(
    probs: Tensor, chosen: Tensor, remasking: str, generator: torch.Generator | None = None
) -> Tensor:
    """Confidence (B, T) by which tokens are committed, highest first; ``random`` draws it."""
    if remasking == "random":
        assert generator is not None
        drawn = torch.rand(chosen.shape, generator=generator, device=generator.device)
        return drawn.to(chosen.device)
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
    if gen_length % block_length:
        raise InputError(
            f"gen_length {gen_length} is not a multiple of block_length {block_length}"
        )
    blocks = gen_length // block_length
    if steps < blocks or steps % blocks:
        raise InputError(
            f"steps is {steps}: expected a positive multiple of the {blocks} blocks "
            f"(gen_length {gen_length} / block_length {block_length})"
        )
    checks.choice("remasking", remasking, REMASKING)
    checks.choice("schedule", schedule, SCHEDULES)


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
    start: Tensor | None = None,
) -> Decoded:
    r"""Decode an answer and record every step.

    Args:
        model (MiniForMaskedDiffusion): the model.
        pixel_values (Tensor): (B, 3, S, S) or (B, images, 3, S, S), normalised.
        input_ids (Tensor): (B, P), ``<image>`` placeholders and the prompt.
        attention_mask (Tensor, optional): (B, P), 0 at padding (left).
        gen_length (int, optional): tokens of the canvas. Default: 32
        block_length (int, optional): tokens per semi-autoregressive block; ``gen_length`` for no
            blocks. Default: 4, with which the model decodes best, where that fits ``gen_length``
            and ``steps``, else ``gen_length``
        steps (int, optional): denoising steps in all. Default: ``gen_length``
        temperature (float, optional): of sampling; 0 is greedy. Default: 0
        remasking (str, optional): ``low_confidence``, ``random``, ``entropy`` or ``margin``.
        schedule (str, optional): ``linear``, ``cosine`` or ``shift``. Default: ``"linear"``
        prefix_cache (bool, optional): compute image and prompt once. Default: True
        generator (torch.Generator, optional): needed by ``temperature`` > 0 and ``random``.
        start (Tensor, optional): (1, T) canvas of the first step: tokens that stay, and masks to
            fill. A block's steps share its masks, and end with them. Default: masks alone

    Returns:
        Decoded: tokens (B, T), canvases (S, B, T), commit_step and confidence (B, T).
    """
    gen_length = checks.whole("gen_length", gen_length, why=", the canvas needs at least one token")
    steps = gen_length if steps is None else checks.whole("steps", steps)
    temperature = checks.real("temperature", temperature)
    prefix_cache = checks.flag("prefix_cache", prefix_cache)
    checks.draws("generator", generator)
    if block_length is None:
        fits = gen_length % 4 == 0 and steps % max(gen_length // 4, 1) == 0
        block_length = 4 if fits else gen_length
    block_length = checks.whole("block_length", block_length)
    check_settings(gen_length, block_length, steps, remasking, schedule)
    if (temperature > 0 or remasking == "random") and generator is None:
        raise InputError("sampling needs a generator: pass torch.Generator().manual_seed(0)")
    prefix = embed_prefix(model, pixel_values, input_ids, attention_mask)
    if prefix_cache:
        prefix = cache_prefix(model, prefix)
    b, device = input_ids.shape[0], input_ids.device
    mask = model.config.mask_token_id
    canvas = torch.full((b, gen_length), mask, device=device)
    if start is not None:
        canvas[:] = start
    commit_step = torch.zeros_like(canvas)
    confidence = torch.zeros(b, gen_length, device=device)
    canvases: list[Tensor] = []
    each = steps // (gen_length // block_length)
    for end in range(block_length, gen_length + 1, block_length):
        todo = int((canvas[0, end - block_length : end] == mask).sum())
        for count in commits_per_step(todo, each, schedule):
            open_ = canvas == mask
            open_[:, end:] = False
            if todo < block_length and not bool(open_.any()):
                break
            step = len(canvases)
            canvases.append(canvas.clone())
            logits = denoise(model, prefix, canvas)
            chosen, probs = _choose(logits, mask, temperature, generator)
            sure = confidence_of(probs, chosen, remasking, generator)
            where = sure.masked_fill(~open_, -math.inf).topk(count, dim=1).indices
            canvas.scatter_(1, where, chosen.gather(1, where))
            commit_step.scatter_(1, where, step)
            picked = confidence_of(probs, chosen, "low_confidence").float()
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
