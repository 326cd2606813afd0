"""Generation by the family's own ``generate``, with what cannot be recorded refused."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor

from captum_dcam.adapters.autoregressive.language import unchanged
from captum_dcam.errors import InputError

#: tokens of an answer at most, where the caller does not say
MAX_NEW_TOKENS = 64
#: settings of ``generate`` that the adapter makes itself, or whose steps are not one a token
REFUSED = {
    "num_beams": "a beam's tokens are not committed one a step",
    "num_beam_groups": "a beam's tokens are not committed one a step",
    "num_return_sequences": "one answer an example is recorded; call generate once more",
    "assistant_model": "several tokens are committed at once",
    "prompt_lookup_num_tokens": "several tokens are committed at once",
    "use_cache": 'the regime says so: load(…, regime="full") computes without a cache',
    "past_key_values": "the regime says so",
    "cache_implementation": "the regime says so",
    "steps": "an autoregressive model takes one step a token",
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
}


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
    if "gen_length" in out:
        if out.get("max_new_tokens") is not None:
            raise InputError("gen_length and max_new_tokens mean the same: give one of them")
        out["max_new_tokens"] = out.pop("gen_length")
    length = out.setdefault("max_new_tokens", MAX_NEW_TOKENS)
    if isinstance(length, bool) or not isinstance(length, int) or length < 1:
        raise InputError(f"max_new_tokens is {length!r}: an answer has at least one token")
    temperature = out.get("temperature")
    if temperature is not None and not 0 <= temperature < float("inf"):
        raise InputError(f"temperature is {temperature!r}: expected 0 (greedy) or more")
    if temperature == 0:
        if out.get("do_sample"):
            raise InputError("do_sample with temperature 0 draws nothing: leave out one of them")
        out["do_sample"] = False
        del out["temperature"]
    out.setdefault("do_sample", temperature is not None and temperature > 0)
    if out["do_sample"] and generator is None:
        raise InputError("sampling needs a generator: pass torch.Generator().manual_seed(0)")
    return out


@contextmanager
def seeded(generator: torch.Generator) -> Iterator[None]:
    """torch's global random state, which ``generate`` draws from, set by ``generator`` inside."""
    seed = int(torch.randint(2**31, (), generator=generator, device=generator.device))
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        yield


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
    drawn = settings["do_sample"] and generator is not None
    context = seeded(generator) if drawn and generator is not None else nullcontext()
    with unchanged(model), context:
        out = model.generate(
            **inputs,
            **settings,
            use_cache=cached,
            return_dict_in_generate=True,
            output_logits=True,
            disable_compile=True,
        )
    length = len(out.logits)
    tokens = out.sequences[:, -length:]
    sure = [
        logits.double().softmax(-1).gather(1, tokens[:, t, None].to(logits.device))[:, 0]
        for t, logits in enumerate(out.logits)
    ]
    return tokens, torch.stack(sure, 1).float()
