"""Generation by the family's own ``generate``, with what cannot be recorded refused."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from captum_dcam.adapters.autoregressive.language import unchanged
from captum_dcam.adapters.common.recording import seeded
from captum_dcam.adapters.common.settings import Setting, Settings, length, need_generator, number
from captum_dcam.errors import InputError

#: settings that are checked here; ``generate`` checks the others
ANSWER = Settings(
    "the autoregressive families",
    {
        "max_new_tokens": Setting(64, length, also="gen_length"),
        "temperature": Setting(None, number),
    },
    others=True,
)
#: settings of ``generate`` that the adapter makes itself, or whose steps are not one a token
REFUSED = {
    "num_beams": "a beam's tokens are not committed one a step",
    "num_beam_groups": "a beam's tokens are not committed one a step",
    "num_return_sequences": "one answer an example is recorded; call generate once more",
    "assistant_model": "several tokens are committed at once",
    "prompt_lookup_num_tokens": "several tokens are committed at once",
    "use_cache": 'cache says so: load(…, cache="none") computes without a cache',
    "past_key_values": "cache says so",
    "cache_implementation": "cache says so",
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
    out = ANSWER.read(out)
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
