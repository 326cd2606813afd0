r"""Generation by the family's own ``generate``, and calls of the language model behind the images.

The family's own forward prepares embeddings, positions and deep visual features; it is stopped in
front of the language model and what it would have passed on is kept. So merging, M-RoPE and
deepstack stay the family's.

Layers of linear attention (Qwen3.5) cache the convolution's last inputs and a recurrent state in
the place of keys and values; both are as differentiable, as long as no call writes over them.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Cache, DynamicCache, GenerationConfig, GenerationMixin
from transformers.modeling_outputs import BaseModelOutputWithPast

from captum_dcam.adapters.common.prefix import KeyValue, Prefix
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
            normed (B, D), and layers of linear attention have their two states in ``cache``.
        positions (Tensor): (B, k, P) int64, k = 3 for M-RoPE, else 1.
        mask (Tensor): (B, P) int64, 0 at padding.
        deep_at (Tensor, optional): (B, P) bool, where deep visual features are added.
        deep (tuple of Tensor): for each of the first blocks, (B, n, D) added to its output there.
        types (Tensor, optional): (B, P) int64, where images are, if the family masks by it.
        layered (Tensor, optional): (B, P, L, d) embeddings of the words for every block (Gemma 4).
    """

    positions: Tensor
    mask: Tensor
    deep_at: Tensor | None = None
    deep: tuple[Tensor, ...] = ()
    types: Tensor | None = None
    layered: Tensor | None = None


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


class Stopped(BaseModelOutputWithPast):
    """What a language model that was not run gives back: no more than the states it was given."""

    def __getattr__(self, name: str) -> None:
        if name.startswith("__"):
            raise AttributeError(name)


def embedded(model: Any, inputs: dict[str, Any]) -> Prompt:
    """Run the family's forward up to the language model."""
    core = model.model
    caught: list[dict[str, Any]] = []

    def stop(**kwargs: Any) -> Stopped:
        caught.append(kwargs)
        return Stopped(last_hidden_state=kwargs["inputs_embeds"])

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
    if positions is None or positions.ndim == 2:  # of text: as generate counts them
        positions = (mask.cumsum(1) - 1).clamp_min(0)[None]
    deep_at, deep = passed.get("visual_pos_masks"), passed.get("deepstack_visual_embeds") or ()
    own_masks = isinstance(passed["attention_mask"], dict)
    return Prompt(
        embeds,
        positions=positions.transpose(0, 1),
        mask=mask,
        deep_at=deep_at,
        deep=tuple(d.view(len(embeds), -1, d.shape[-1]) for d in deep),
        types=inputs["mm_token_type_ids"] if own_masks else None,
        layered=passed.get("per_layer_inputs"),
    )


def run(model: Any, prefix: Prompt, tokens: Tensor | None, cache: Cache | None) -> Tensor:
    r"""Normed states of the prefix, of ``tokens`` (B, T) behind the cached prefix, or of both.

    Args:
        model (nn.Module): the whole model.
        prefix (Prompt): whose own keys and values are in ``cache`` if it has any.
        tokens (Tensor, optional): (B, T) of the answer.
        cache (Cache, optional): is filled, or continued. None: prefix and tokens together
    """
    language = model.model.language_model
    embeds, positions, mask = prefix.embeds, prefix.positions.transpose(0, 1), prefix.mask
    layered = prefix.layered
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
        if layered is not None:
            own = language.get_per_layer_inputs(tokens, None)
            layered = own if prefix.cache is not None else torch.cat((layered, own), 1)
    given = {"inputs_embeds": embeds, "past_key_values": cache}
    given["position_ids"] = positions if len(positions) > 1 else positions[0]
    if layered is not None:
        given["per_layer_inputs"] = layered
    return language(
        **given,
        attention_mask=_mask(model, prefix, mask, given),
        use_cache=cache is not None,
        **_deep(prefix, embeds.shape[1]),
    ).last_hidden_state


def _mask(model: Any, prefix: Prompt, mask: Tensor, given: dict[str, Any]) -> Any:
    """What the language model makes its masks of; where images are masked in ways of their own, the
    family's masks. Behind a cached prefix there are no images."""
    if prefix.types is None or prefix.cache is not None:
        return mask
    names = ("inputs_embeds", "past_key_values", "position_ids")
    longer = mask.shape[1] - prefix.types.shape[1]
    return model.create_masks_for_generate(
        config=model.config,
        attention_mask=mask,
        mm_token_type_ids=nn.functional.pad(prefix.types, (0, longer)),
        **{name: given[name] for name in names},
    )


def _deep(prefix: Prompt, length: int) -> dict[str, Any]:
    """Deep visual features of a run over ``length`` places that holds the images."""
    if not prefix.deep or prefix.deep_at is None or prefix.cache is not None:
        return {}
    return {
        "visual_pos_masks": nn.functional.pad(
            prefix.deep_at, (0, length - prefix.deep_at.shape[1])
        ),
        "deepstack_visual_embeds": [d.flatten(0, 1) for d in prefix.deep],
    }


def prefilled(model: Any, prefix: Prompt) -> Prompt:
    """The prefix with its keys, values and last state."""
    cache = _cache(model)
    last = run(model, prefix, None, cache)[:, -1]
    return prefix.filled(map(_states, cache.layers), last)


def denoised(model: Any, prefix: Prompt, tokens: Tensor) -> Tensor:
    """Logits (B, T, V) that predict each of ``tokens`` from those before it."""
    if prefix.cache is None or prefix.last is None:
        states = run(model, prefix, tokens, None)[:, prefix.embeds.shape[1] - 1 : -1]
        return head(model, states)
    states = run(model, prefix, tokens, _cache(model, prefix.cache))
    return head(model, torch.cat((prefix.last[:, None], states[:, :-1]), 1))


def head(model: Any, normed: Tensor) -> Tensor:
    """The output head, with the soft cap of families that have one: (…, D) to (…, V)."""
    logits = model.lm_head(normed)
    cap = getattr(model.config.get_text_config(), "final_logit_softcapping", None)
    return logits if cap is None else torch.tanh(logits / cap) * cap


# -- caches ----------------------------------------------------------------------------------------


@cache
def recurrent() -> Any:
    r"""Class of what a layer of linear attention caches, assigned anew by every call.

    transformers' own layer copies into its states, which a gradient through an earlier call needs
    as they were. Versions that are older than the families here have none.
    """
    from transformers.cache_utils import LinearAttentionLayer

    class Recurrent(LinearAttentionLayer):
        def __init__(self) -> None:
            super().__init__()
            self.record_past = True  # else a single token is written into the convolution's state

        def update_conv_state(
            self,
            conv_states: Tensor,
            state_idx: int = 0,
            conv_kernel_size: int | None = None,
            **_: Any,
        ) -> Tensor:
            before = self.conv_states[state_idx]
            whole = conv_states if before is None else torch.cat((before, conv_states), -1)
            size = conv_kernel_size or whole.shape[-1]
            missing = max(size - whole.shape[-1], 0)
            self.conv_states[state_idx] = nn.functional.pad(whole, (missing, 0))[..., -size:]
            self.is_conv_states_initialized[state_idx] = self.has_previous_state[state_idx] = True
            return whole

        def update_recurrent_state(
            self, recurrent_states: Tensor, state_idx: int = 0, **_: Any
        ) -> Tensor:
            self.recurrent_states[state_idx] = recurrent_states
            self.is_recurrent_states_initialized[state_idx] = True
            return recurrent_states

    return Recurrent


def _cache(model: Any, filled: Iterable[KeyValue] = ()) -> Cache:
    """An empty cache, or one of what a prefix holds. Layers with a sliding window keep all: masks
    hide what is too far away."""
    kinds = getattr(model.config.get_text_config(), "layer_types", None) or ()
    if "linear_attention" in kinds:
        from transformers.cache_utils import DynamicLayer

        made = {"linear_attention": recurrent()}
        cached = Cache([made.get(kind, DynamicLayer)() for kind in kinds])
    else:
        cached = DynamicCache()
    for at, (one, two) in enumerate(filled):
        if at < len(cached.layers) and _recurs(cached.layers[at]):
            cached.layers[at].update_conv_state(one)
            cached.layers[at].update_recurrent_state(two)
        else:
            cached.update(one, two, at)  # copies: the prefix's stay as they are
    return cached


def _recurs(layer: Any) -> bool:
    """Whether a layer of a cache is one of linear attention."""
    return hasattr(layer, "recurrent_states")


def _states(layer: Any) -> KeyValue:
    """What a layer of a cache holds."""
    if _recurs(layer):
        return layer.conv_states[0], layer.recurrent_states[0]
    return layer.keys, layer.values
