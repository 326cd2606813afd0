r"""How DiffusionGemma decodes: encoder and decoder as its ``generate`` runs them, and its record.

The encoder reads the prompt once and every finished canvas after it; the decoder reads a canvas
behind the encoder's keys and values. Nothing else leads from one to the other. Masks are the
family's: given none, its forward would run image tokens causally.

``generate`` shows its drafts to a streamer, and nothing else: canvases and self-conditioning are
caught where the decoder is given them. What it is given before a step are ids (B, T), the answer as
far as it is finished, then the canvas, then a filler where nothing is yet; the number of the
canvas; and self-conditioning (B, C, D), the words that the step before expected, zeros where there
was none.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.generation.streamers import BaseStreamer

from captum_dcam.adapters.common.prefix import KeyValue, Prefix
from captum_dcam.adapters.common.settings import Setting, Settings, count
from captum_dcam.errors import InputError
from captum_dcam.model.trajectory import Given, Trajectory

#: without values: the checkpoint's
SETTINGS = Settings(
    "DiffusionGemma",
    {
        "max_new_tokens": Setting(None, count, also="gen_length"),
        "max_denoising_steps": Setting(None, count, also="steps"),
        "t_min": Setting(),
        "t_max": Setting(),
        "entropy_bound": Setting(),
        "stability_threshold": Setting(),
        "confidence_threshold": Setting(),
    },
    unknown="the family's generate takes other settings, but would ignore them without a word",
)


def checked(settings: dict[str, Any], canvas: int) -> dict[str, Any]:
    r"""Settings for ``generate``; raises before any work.

    Args:
        settings (dict): what the caller gave.
        canvas (int): C, tokens of a canvas.
    """
    given = {name: value for name, value in settings.items() if value is not None}
    if "temperature" in given:
        raise InputError(
            f"temperature={given['temperature']!r}: the family's falls from t_max to t_min over "
            "the steps: give those (0.8 and 0.4 by default); there is no greedy mode"
        )
    if given.pop("block_length", canvas) != canvas:
        raise InputError(
            f"block_length is {settings['block_length']}: the model's canvas has {canvas} tokens; "
            "leave it out"
        )
    return {name: value for name, value in SETTINGS.read(given).items() if value is not None}


def check_context(config: Any, prefix: int, settings: dict[str, Any]) -> None:
    """Raise ValueError unless all canvases fit behind a prompt of ``prefix`` tokens."""
    canvas, context = config.canvas_length, config.text_config.max_position_embeddings
    whole = -(-settings.get("max_new_tokens", canvas) // canvas) * canvas
    if prefix + whole > context:
        raise InputError(
            f"the prompt has {prefix} tokens and {whole} are asked for (whole canvases of "
            f"{canvas}), but the model's context is {context}: ask for fewer, or give smaller or "
            "fewer images"
        )


def options_of(settings: dict[str, Any]) -> dict[str, Any]:
    """Checked settings as ``generate`` takes them."""
    from transformers.models.diffusion_gemma.generation_diffusion_gemma import (
        EntropyBoundSamplerConfig,
    )

    out = dict(settings)
    if "entropy_bound" in out:
        bound = EntropyBoundSamplerConfig(entropy_bound=float(out.pop("entropy_bound")))
        out["sampler_config"] = bound
    return out


@dataclass(frozen=True, kw_only=True)
class Prompt(Prefix):
    r"""A prefix with (B, P) bool, True at image tokens; its cache is the encoder's, of the sliding
    window in some layers."""

    visual: Tensor


def embedded(model: Any, input_ids: Tensor, inputs: dict[str, Tensor]) -> Prompt:
    """Vision tower, projection and word embeddings."""
    encoder = model.model.encoder
    words = encoder.get_input_embeddings()(input_ids)
    pictures = encoder.get_image_features(
        inputs["pixel_values"], inputs["image_position_ids"], return_dict=True
    ).pooler_output.to(words.device, words.dtype)
    visual = inputs["mm_token_type_ids"].bool()
    return Prompt(words.masked_scatter(visual[..., None], pictures), visual=visual)


def prefilled(model: Any, prefix: Prompt) -> Prompt:
    """The prefix with the encoder's keys and values."""
    cache = _cache(model)
    length = prefix.embeds.shape[1]
    _encode(model, cache, prefix.embeds, length, prefix.visual.long())
    return prefix.filled((layer.keys, layer.values) for layer in cache.layers)


def denoised(model: Any, prefix: Prompt, before: Tensor, canvas: Tensor, signal: Tensor) -> Tensor:
    r"""Logits (B, C, V) of a canvas.

    Args:
        model (nn.Module): the whole model.
        prefix (Prompt): prefilled.
        before (Tensor): (B, n · C) tokens of the canvases before it.
        canvas (Tensor): (B, C) ids.
        signal (Tensor): (B, C, D) self-conditioning; zeros at a canvas's first step.
    """
    cache = extended(model, prefix, before, canvas.shape[1])
    with conditioned(model.model.decoder, signal):
        return decoded(model, cache, prefix.embeds.shape[1] + before.shape[1], canvas)


def extended(model: Any, prefix: Prompt, before: Tensor, size: int) -> DynamicCache:
    """The prefix's cache with the canvases ``before``, encoded one after the other."""
    assert prefix.cache is not None
    length = prefix.embeds.shape[1]
    cache = _cache(model, prefix.cache, length)
    for part in before.split(size, 1) if before.shape[1] else ():
        length += size
        _encode(model, cache, model.model.encoder.get_input_embeddings()(part), length)
    return cache


def decoded(
    model: Any, cache: DynamicCache, start: int, canvas: Tensor, **conditioning: Tensor | None
) -> Tensor:
    """Logits (B, C, V) of a canvas (B, C) at position ``start`` behind what the cache holds."""
    hidden = model.model.decoder(
        decoder_input_ids=canvas,
        past_key_values=cache,
        decoder_position_ids=_positions(start, canvas.shape[1], canvas.device),
        **conditioning,
    ).last_hidden_state
    return head(model, hidden)


@torch.no_grad()
def signals(
    model: Any, prefix: Prompt, before: Tensor, canvases: Tensor, settings: dict[str, Any]
) -> Tensor:
    r"""Self-conditioning of every step of a canvas, from its ids alone.

    Args:
        model, prefix, before: as in :func:`denoised`.
        canvases (Tensor): (steps, B, C) ids before every step.
        settings (dict): of ``generate``, as far as they are not the checkpoint's.

    Returns:
        Tensor: (steps, B, C, D).
    """
    config, _ = model._prepare_generation_config(None, **settings)
    cooled = model._prepare_logits_processor(config)
    cache = extended(model, prefix, before, canvases.shape[-1])
    start = prefix.embeds.shape[1] + before.shape[1]
    logits: Tensor | None = None
    with conditioned(model.model.decoder) as found:
        for step, canvas in enumerate(canvases):
            logits = decoded(model, cache, start, canvas, self_conditioning_logits=logits)
            left = torch.tensor(config.max_denoising_steps - step, dtype=torch.int32)
            logits = cooled(canvas, logits, cur_step=left.to(canvas.device)).to(model.dtype)
    return torch.stack(found)


def head(model: Any, normed: Tensor) -> Tensor:
    """Output head with the family's soft cap, float32 or wider: (…, D) to (…, V)."""
    return capped(model, model.lm_head(normed))


def wider(dtype: torch.dtype) -> torch.dtype:
    """The type of logits: float32, as the family has it, or float64 where the model is."""
    return dtype if dtype == torch.float64 else torch.float32


def capped(model: Any, logits: Tensor) -> Tensor:
    """The soft cap on what the output head gave."""
    logits = logits.to(wider(logits.dtype))
    return torch.tanh(logits / model.final_logit_softcapping) * model.final_logit_softcapping


@contextmanager
def conditioned(decoder: Any, signal: Tensor | None = None) -> Iterator[list[Tensor]]:
    """Let the decoder run with a recorded self-conditioning signal (B, C, D); None: with its own.

    Yields:
        list: the signals that it ran with, filled as it runs.
    """
    found: list[Tensor] = []

    def swap(_module: Any, args: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        found.append(args[1].clone() if signal is None else signal.to(args[1]))
        return args[0], found[-1]

    with decoder.self_conditioning.register_forward_pre_hook(swap):
        yield found


def _cache(model: Any, pairs: Sequence[KeyValue] = (), length: int = 0) -> DynamicCache:
    """A cache of the family's layers; with keys and values of ``length`` tokens, shared, as every
    update makes new tensors."""
    cache = DynamicCache(config=model.config.get_text_config(decoder=True))
    for layer, (keys, values) in zip(cache.layers, pairs, strict=bool(pairs)):
        layer.lazy_initialization(keys, values)
        layer.keys, layer.values = keys, values
        if layer.is_sliding:
            layer.cumulative_length = length
    return cache


def _encode(
    model: Any, cache: DynamicCache, embeds: Tensor, length: int, types: Tensor | None = None
) -> None:
    """Fill the cache up to ``length`` tokens, the last of which are given."""
    count = embeds.shape[1]
    positions = _positions(length - count, count, embeds.device)
    seen = torch.ones(len(embeds), length, dtype=torch.bool, device=embeds.device)
    masks = model.model.encoder.create_masks_for_generate(
        config=model.config,
        inputs_embeds=embeds,
        attention_mask=seen,
        past_key_values=cache,
        position_ids=positions,
        mm_token_type_ids=types,
    )
    model.model.encoder.language_model(
        inputs_embeds=embeds,
        attention_mask=masks,
        position_ids=positions,
        past_key_values=cache,
    )


def _positions(start: int, count: int, device: torch.device) -> Tensor:
    return torch.arange(start, start + count, dtype=torch.int32, device=device)[None]


# -- states ---------------------------------------------------------------------------------------


#: number of the canvas in the state that shows the whole answer: each is read
EVERY = -1


def states_of(
    canvases: Sequence[Tensor], signals: Sequence[Tensor], tokens: Tensor, filler: int
) -> tuple[Tensor, Tensor, Tensor]:
    r"""What the model is given before every step, over all canvases.

    Args:
        canvases (sequence of Tensor): ids (steps, B, C) of every canvas.
        signals (sequence of Tensor): self-conditioning (steps, B, C, D) of every canvas.
        tokens (Tensor): (B, T) of the finished answer.
        filler (int): id that stands where nothing is yet.

    Returns:
        tuple: ids (S, B, T), the answer as far as it is finished, then the canvas, then the filler;
        number (S, B) of the canvas; signals (S, B, C, D).
    """
    ids, numbers = [], []
    for number, steps in enumerate(canvases):
        count, batch, size = steps.shape
        whole = tokens.expand(count, *tokens.shape).clone()
        whole[:, :, number * size : (number + 1) * size] = steps
        whole[:, :, (number + 1) * size :] = filler
        ids.append(whole)
        numbers.append(torch.full((count, batch), number, device=tokens.device))
    return torch.cat(ids), torch.cat(numbers), torch.cat(list(signals))


def forced(
    tokens: Tensor, silence: Tensor, vocabulary: int, filler: int
) -> tuple[Tensor, Tensor, Tensor]:
    r"""States of a given answer (B, T), token t hidden in state t.

    Without a mask token a token is hidden as the family's sampler hides it: one drawn from the rest
    of the vocabulary stands in its place, the same at every call. The other tokens of its canvas
    and the canvases before it are visible.

    Args:
        tokens (Tensor): (B, T), whole canvases.
        silence (Tensor): (C, D) self-conditioning of a canvas's first step.
        vocabulary (int): ids to draw from.
        filler (int): id that stands where nothing is yet.
    """
    (batch, count), size = tokens.shape, len(silence)
    draws = torch.Generator().manual_seed(0)
    other = torch.randint(1, vocabulary, (count,), generator=draws).to(tokens.device)
    ids = tokens.expand(count, batch, count).clone()
    at = torch.arange(count, device=tokens.device)
    ids[at, :, at] = ((tokens + other) % vocabulary).T
    number = at // size
    ids[(number[:, None] < number)[:, None].expand_as(ids)] = filler
    return ids, number[:, None].expand(count, batch), silence.expand(count, batch, -1, -1)


# -- the family's own generate ---------------------------------------------------------------------


@torch.no_grad()
def sampled(
    model: Any, input_ids: Tensor, inputs: dict[str, Tensor], settings: dict[str, Any]
) -> Recorder:
    """Run ``model.generate`` and record it; draws from torch's global random state."""
    recorder = Recorder(model)
    with recorder.watching():
        model.generate(
            input_ids=input_ids,
            **inputs,
            **options_of(settings),
            streamer=recorder,
            cache_implementation="dynamic",
            disable_compile=True,
        )
    recorder.finish()
    return recorder


@contextmanager
def certain(model: Any, given: Given | None, size: int) -> Iterator[None]:
    r"""Inside the context the decoder sees given tokens in every canvas, and is sure of them.

    A canvas starts as random tokens and is drawn again where the sampler does not accept, so that
    a token stays only by its own certainty. Here given tokens stand in what the decoder is given,
    and its head gives them all of the probability that the soft cap leaves: the sampler accepts
    them at once, they cost nothing of its bound on entropy, and self-conditioning expects them.

    Args:
        model (nn.Module): the whole model.
        given (Given or None): (1, T) of whole canvases; None: nothing changes.
        size (int): C, tokens of a canvas.
    """
    if given is None:
        yield
        return
    parts = list(zip(given.tokens.split(size, 1), given.at.split(size, 1), strict=True))
    now = -1

    def started(_module: Any, _args: Any) -> None:
        nonlocal now
        now += 1

    def shown(_module: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        canvas = kwargs["decoder_input_ids"]
        tokens, at = (x.to(canvas.device) for x in parts[min(now, len(parts) - 1)])
        return args, {**kwargs, "decoder_input_ids": tokens.where(at, canvas)}

    def sure(_module: Any, _args: Any, logits: Tensor) -> Tensor:
        tokens, at = (x.to(logits.device) for x in parts[min(now, len(parts) - 1)])
        most = torch.finfo(logits.dtype).max
        own = torch.full_like(logits, -most).scatter(-1, tokens[..., None], most)
        return torch.where(at[..., None], own, logits)

    inner = model.model
    with (
        inner.encoder.register_forward_pre_hook(started),
        inner.decoder.register_forward_pre_hook(shown, with_kwargs=True),
        model.lm_head.register_forward_hook(sure),
    ):
        yield


@dataclass
class Recorder(BaseStreamer):
    r"""What one ``generate`` did; a streamer to it, and hooks.

    Attributes:
        canvases (list): for every canvas a list of its steps' ids (B, C) before the step.
        signals (list): the same of the decoder's self-conditioning (B, C, D).
        drafts (list): the same of what the step would have written (B, C).
        sure (list): the same of the drafts' probabilities (B, C), without temperature.
        final (list): (B, C) of every canvas, padded behind the end of the answer.
        tokens, commit_step, confidence (Tensor): (B, T), once finished: the answer, every token's
            commit step, and its probability there.
    """

    model: Any
    canvases: list[list[Tensor]] = field(default_factory=list)
    signals: list[list[Tensor]] = field(default_factory=list)
    drafts: list[list[Tensor]] = field(default_factory=list)
    sure: list[list[Tensor]] = field(default_factory=list)
    final: list[Tensor] = field(default_factory=list)
    _logits: Tensor | None = None
    _begun: bool = False

    def put(self, value: Tensor) -> None:
        """The prompt, then every finished canvas."""
        if self._begun:
            self.final.append(value.to(self.canvases[-1][-1].device))
        self._begun = True

    def put_draft(self, value: Tensor) -> None:
        """The argmax of a step; of examples that are done, of the step that ended them."""
        assert self._logits is not None
        draft, logits = value.to(self._logits.device), capped(self.model, self._logits)
        odds = logits.gather(-1, draft[..., None])[..., 0] - logits.logsumexp(-1)
        self.drafts[-1].append(draft)
        self.sure[-1].append(odds.exp().float())

    def end(self) -> None:
        """Nothing is open."""

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Hooks on the decoder while the context is open."""
        decoder = self.model.model.decoder

        def step(_module: Any, _args: Any, kwargs: dict[str, Any]) -> None:
            if len(self.final) == len(self.canvases):
                for kind in (self.canvases, self.signals, self.drafts, self.sure):
                    kind.append([])
            self.canvases[-1].append(kwargs["decoder_input_ids"].clone())

        def signal(_module: Any, args: tuple[Tensor, Tensor]) -> None:
            self.signals[-1].append(args[1].clone())

        def seen(_module: Any, _args: Any, out: Tensor) -> None:
            self._logits = out

        with (
            decoder.register_forward_pre_hook(step, with_kwargs=True),
            decoder.self_conditioning.register_forward_pre_hook(signal),
            self.model.lm_head.register_forward_hook(seen),
        ):
            yield

    def states(self, filler: int) -> tuple[Tensor, Tensor, Tensor]:
        """States of all steps, see :func:`states_of`."""
        canvases, signals = ([torch.stack(c) for c in x] for x in (self.canvases, self.signals))
        return states_of(canvases, signals, self.tokens, filler)

    def finish(self) -> None:
        """Join the canvases' tokens, and read off when each was committed."""
        steps, odds, first = [], [], 0
        for drafts, sure in zip(self.drafts, self.sure, strict=True):
            own = settled(torch.stack(drafts))
            steps.append(own + first)
            odds.append(torch.stack(sure).gather(0, own[None])[0])
            first += len(drafts)
        joined = (torch.cat(parts, 1) for parts in (self.final, steps, odds))
        self.tokens, self.commit_step, self.confidence = joined

    def lengths(self, prefix: int) -> tuple[int, ...]:
        """Tokens that the encoder reads: the prompt's, then before every step. Before the first one
        of a later canvas it reads the canvas before."""
        found = [prefix]
        for number, steps in enumerate(self.canvases):
            found += [steps[0].shape[1] if number else 0, *[0] * (len(steps) - 1)]
        return tuple(found)


@dataclass
class PipelineRecorder(Recorder):
    r"""What one run of diffusers' ``DiffusionGemmaPipeline`` on one example did; its
    ``callback_on_step_end``.

    The pipeline samples as ``generate`` does, but for two things, which are mended while it is
    recorded. It gives the encoder a two-dimensional mask, with which image tokens see earlier ones
    only. And it ends a canvas by what its last step drew, noise where the step was not sure, where
    ``generate`` takes the argmax.

    Args:
        input_ids (Tensor): (1, P) of the request.

    Attributes:
        trajectory (Trajectory): once the run has ended.
    """

    input_ids: Tensor = field(kw_only=True)
    trajectory: Trajectory = field(init=False)

    def __call__(
        self, pipeline: Any, _step: int, timestep: int, _given: dict[str, Any]
    ) -> dict[str, Tensor]:
        """The end of a step; at a canvas's last one the canvas that it leaves."""
        assert self._logits is not None
        draft = capped(self.model, self._logits).argmax(-1)
        self.put_draft(draft)
        return {"canvas": draft} if timestep == pipeline.scheduler.num_inference_steps - 1 else {}

    @contextmanager
    def watching(self) -> Iterator[None]:
        encoder = self.model.model.encoder
        with super().watching(), encoder.register_forward_pre_hook(self._encodes, with_kwargs=True):
            yield

    def _encodes(
        self, encoder: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The prompt, or a finished canvas, with the family's masks."""
        ids = kwargs["input_ids"]
        if not self._begun and not torch.equal(ids, self.input_ids.to(ids.device)):
            raise InputError(
                f"the pipeline reads a prompt of {tuple(ids.shape)} ids that are not the request's "
                f"{tuple(self.input_ids.shape)}: give it the images and the messages that were "
                "given to prepare, one example, and the same processor"
            )
        if self._begun and bool(torch.isin(ids, self._ends).any()):
            raise InputError(
                "the pipeline goes on behind the end of the answer: leave out eos_early_stop=False"
            )
        self.put(ids)
        own = encoder.create_masks_for_generate(
            config=self.model.config,
            inputs_embeds=torch.empty((*ids.shape, 0), dtype=self.model.dtype, device=ids.device),
            attention_mask=kwargs["attention_mask"].bool(),
            past_key_values=kwargs["past_key_values"],
            position_ids=kwargs["position_ids"],
            mm_token_type_ids=kwargs.get("mm_token_type_ids"),
        )
        return args, {**kwargs, "attention_mask": own}

    @property
    def _ends(self) -> Tensor:
        """Ids that end an answer."""
        ends = self.model.generation_config.eos_token_id
        listed = ends if isinstance(ends, list | tuple) else [] if ends is None else [ends]
        return torch.tensor(listed, dtype=torch.long, device=self.input_ids.device)

    def finish(self) -> None:
        if not any(self.drafts):
            raise InputError(
                "the pipeline told no step: run it inside the context, with "
                "callback_on_step_end=steps"
            )
        last = self.drafts[-1][-1]
        ended = torch.isin(last, self._ends.to(last.device)).cumsum(1)
        behind = ended - torch.isin(last, self._ends.to(last.device)).long() > 0
        self.final.append(last.masked_fill(behind, self.model.generation_config.pad_token_id or 0))
        super().finish()


def settled(drafts: Tensor) -> Tensor:
    """(B, C) first step from which every draft (S, B, C) is the last one."""
    same = (drafts == drafts[-1]).flip(0).cumprod(0)
    return len(drafts) - same.sum(0)
