r"""Generation by the family's own ``generate``, and calls of the language model behind the images.

The family's own forward prepares embeddings, positions and deep visual features; it is stopped in
front of the language model and what it would have passed on is kept. So merging, M-RoPE and
deepstack stay the family's.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache, GenerationConfig, GenerationMixin
from transformers.modeling_outputs import BaseModelOutputWithPast

from captum_dcam.adapters.common.prefix import Prefix
from captum_dcam.adapters.common.qwen import unchanged
from captum_dcam.adapters.common.recording import seeded
from captum_dcam.adapters.common.settings import Setting, Settings, length, need_generator, number
from captum_dcam.errors import DcamError, InputError, SettingError, near

#: settings that are checked here; ``generate`` checks the others
ANSWER = Settings(
    "the autoregressive families",
    {
        "max_new_tokens": Setting(64, length, also="gen_length"),
        "temperature": Setting(None, number),
    },
    others=True,
)
#: settings of ``generate`` that the adapter makes itself, or whose steps are not one per token
REFUSED = {
    "num_beams": "a beam's tokens are not committed one per step",
    "num_beam_groups": "a beam's tokens are not committed one per step",
    "num_return_sequences": "one answer per example is recorded; call generate once more",
    "assistant_model": "several tokens are committed at once",
    "prompt_lookup_num_tokens": "several tokens are committed at once",
    "use_cache": 'cache says so: load(…, cache="none") computes without a cache',
    "past_key_values": "cache says so",
    "cache_implementation": "cache says so",
    "steps": "an autoregressive model takes one step per token",
    "block_length": "an autoregressive model writes token by token",
    "input_ids": "the request holds it",
    "inputs": "the request holds it",
    "inputs_embeds": "the request holds it",
    "attention_mask": "the request holds it",
    "return_dict_in_generate": "always on",
    "output_logits": "always on",
    "output_scores": "not recorded",
    "output_attentions": "choose the method attention",
    "output_hidden_states": "read the tap",
    "streamer": "the answer is returned whole",
    "custom_generate": "code of others would decode, with other steps than are recorded",
    "trust_remote_code": "give it to load: generate runs no code of a checkpoint",
}


def _known() -> set[str]:
    """Everything that ``generate`` knows by name: its arguments and a configuration's fields."""
    arguments = inspect.signature(GenerationMixin.generate).parameters
    fields = (name for name in vars(GenerationConfig()) if not name.startswith("_"))
    return {*fields, *arguments, *ANSWER.known} - {"self", "kwargs"}


def checked(settings: dict[str, Any], generator: torch.Generator | None) -> dict[str, Any]:
    r"""Settings for ``generate``; raises before any work.

    ``gen_length`` is the library's word for ``max_new_tokens``. Sampling is asked for by
    ``do_sample=True`` or a ``temperature`` above 0, whatever the checkpoint's own
    ``generation_config`` says: without it decoding is greedy.
    """
    out = dict(settings)
    for name, reason in REFUSED.items():
        ones = name in ("num_beams", "num_beam_groups", "num_return_sequences")
        if ones and out.get(name) == 1:
            del out[name]
        if out.get(name) is not None:
            raise InputError(f"{name}={out[name]!r} cannot be used here: {reason}")
        out.pop(name, None)
    out = ANSWER.read(out)
    known = _known()
    if unknown := next((name for name in out if name not in known), None):
        raise SettingError(
            f"unknown setting {unknown!r} of the autoregressive families{near(unknown, known)}"
        )
    temperature = out["temperature"]
    if not temperature:
        del out["temperature"]
    if temperature == 0:
        if out.get("do_sample"):
            raise InputError("do_sample with temperature 0 draws nothing: leave out one of them")
        out["do_sample"] = False
    out.setdefault("do_sample", temperature is not None)
    need_generator(out["do_sample"], generator)
    return out


@dataclass(frozen=True, kw_only=True)
class Prompt(Prefix):
    r"""A prefix with what the families' language models are given besides.

    Args:
        embeds, cache, last: as in :class:`~captum_dcam.adapters.common.prefix.Prefix`; ``last`` is
            normed (B, D).
        positions (Tensor): (B, k, P) int64, k = 3 for M-RoPE, else 1.
        mask (Tensor): (B, P) int64, 0 at padding.
        deep_at (Tensor, optional): (B, P) bool, where deep visual features are added.
        deep (tuple of Tensor): for each of the first blocks, (B, n, D) added to its output there.
    """

    positions: Tensor
    mask: Tensor
    deep_at: Tensor | None = None
    deep: tuple[Tensor, ...] = ()


@contextmanager
def _named(settings: dict[str, Any]) -> Iterator[None]:
    """What ``generate`` refuses becomes an InputError that names the settings it was given beyond
    those that are checked here."""
    others = {k: v for k, v in settings.items() if k not in (*ANSWER.known, "do_sample")}
    try:
        yield
    except (TypeError, ValueError) as error:
        if not others or isinstance(error, DcamError):
            raise
        raise InputError(f"generate refuses one of {others}: {error}") from error


@torch.no_grad()
def decoded(
    model: Any,
    inputs: dict[str, Any],
    settings: dict[str, Any],
    generator: torch.Generator | None,
    cached: bool,
) -> tuple[Tensor, Tensor]:
    r"""Run ``model.generate``.

    Returns:
        tuple: tokens (B, T), what follows an end being padding; and each token's probability
        (B, T) float32 by the model's own logits, before any warper or penalty.
    """
    with unchanged(model), seeded(generator if settings["do_sample"] else None, bits=31):
        with _named(settings):
            out = model.generate(
                **inputs,
                **settings,
                use_cache=cached,
                return_dict_in_generate=True,
                output_logits=True,
                disable_compile=True,
            )
    tokens = out.sequences[:, -len(out.logits) :]
    sure = [
        logits.double().softmax(-1).gather(1, tokens[:, t, None].to(logits.device))[:, 0]
        for t, logits in enumerate(out.logits)
    ]
    return tokens, torch.stack(sure, 1).float()


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
    deep_at, deep = passed.get("visual_pos_masks"), passed.get("deepstack_visual_embeds") or ()
    return Prompt(
        embeds,
        positions=positions.transpose(0, 1),
        mask=mask,
        deep_at=deep_at,
        deep=tuple(d.view(len(embeds), -1, d.shape[-1]) for d in deep),
    )


def run(model: Any, prefix: Prompt, tokens: Tensor | None, cache: DynamicCache | None) -> Tensor:
    r"""Normed states of the prefix, of ``tokens`` (B, T) behind the cached prefix, or of both.

    Args:
        model (nn.Module): the whole model.
        prefix (Prompt): whose own keys and values are in ``cache`` if it has any.
        tokens (Tensor, optional): (B, T) of the answer.
        cache (DynamicCache, optional): is filled, or continued. None: prefix and tokens together
    """
    language = model.model.language_model
    embeds, positions, mask = prefix.embeds, prefix.positions.transpose(0, 1), prefix.mask
    deep: dict[str, Any] = {}
    if tokens is not None:
        words = language.get_input_embeddings()(tokens).to(embeds.dtype)
        valid = positions.masked_fill(mask[None] == 0, -1)
        start = valid.amax((0, 2))[:, None] + 1
        behind = start + torch.arange(tokens.shape[1], device=tokens.device)
        behind = behind.expand(len(positions), *behind.shape)
        mask = torch.cat((mask, torch.ones_like(tokens)), 1)
        if prefix.cache is None:
            words, behind = torch.cat((embeds, words), 1), torch.cat((positions, behind), 2)
        embeds, positions = words, behind
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
    for layer, (keys, values) in enumerate(prefix.cache):
        cache.update(keys, values, layer)  # copies: the prefix's stay as they are
    states = run(model, prefix, tokens, cache)
    return model.lm_head(torch.cat((prefix.last[:, None], states[:, :-1]), 1))
