r"""How Dream-VL and Dimple decode: settings and record of ``diffusion_generate``, and one step."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from captum_dcam.adapters.common.compat import unchecked
from captum_dcam.adapters.common.holes import placing
from captum_dcam.adapters.common.recording import CanvasLog
from captum_dcam.adapters.common.settings import (
    TEMPERATURE,
    Setting,
    Settings,
    count,
    inside,
    length,
    need_generator,
    number,
    one_of,
    share,
)
from captum_dcam.adapters.dream_vl.compat import callable_generate, generation_class
from captum_dcam.adapters.dream_vl.packing import Prompt
from captum_dcam.errors import InputError
from captum_dcam.model.trajectory import Given

SETTINGS = Settings(
    "Dream-VL",
    {
        "max_new_tokens": Setting(128, length, also="gen_length"),
        "steps": Setting(None, count),
        "alg": Setting("maskgit_plus", one_of("maskgit_plus", "topk_margin", "entropy", "origin")),
        "alg_temp": Setting(None, number),
        **TEMPERATURE,
        "top_p": Setting(None, share),
        "top_k": Setting(None, count),
        "eps": Setting(1e-3, inside),
        "eos_penalty": Setting(0.0),
    },
)


#: those of Dimple: its own ways of choosing, and all above a probability at once
DIMPLE = Settings(
    "Dimple",
    {
        **{n: s for n, s in SETTINGS.known.items() if n not in ("alg", "eos_penalty")},
        "alg": Setting(
            "maskgit_plus",
            one_of(
                *("maskgit_plus", "topk_margin", "entropy", "origin", "origin-ratio"),
                "autoregressive",
            ),
        ),
        "alg_p_threshold": Setting(None, share),
        "use_original_confidence": Setting(True, one_of(False, True)),
        "decoding_pipeline": Setting("dim", one_of("dim", "dream")),
    },
)


def checked(
    given: dict[str, Any], generator: torch.Generator | None, dimple: bool = False
) -> dict[str, Any]:
    """Settings for ``diffusion_generate``; raises before any work on what cannot work."""
    given = dict(given)
    if given.pop("use_cache", False):
        why = (
            "Dimple's prompt cache keeps what the first step computed of the prompt, while all of "
            "the answer was masked, and is not replayed here"
            if dimple
            else "Dream-VL's prompt cache fails at the second step (transformers 4: a shape error, "
            "5: DynamicCache)"
        )
        raise InputError(
            f"use_cache is True: {why}, so every step runs the whole sequence; leave it out"
        )
    out = (DIMPLE if dimple else SETTINGS).read(given)
    out["steps"] = out["max_new_tokens"] if out["steps"] is None else out["steps"]
    drawn = (
        out["alg"] in ("origin", "origin-ratio")
        or out["temperature"] > 0
        or (out["alg_temp"] or 0) > 0
    )
    need_generator(drawn, generator)
    return out


def generation_config(model: Any, settings: dict[str, Any]) -> Any:
    r"""Upstream's configuration object with these settings and nothing inherited.

    Without one upstream derives it from the model's configuration: in transformers 4 that gives
    temperature 1.0 and top_k 50, in transformers 5 it fails.
    """
    config = model.config
    made = generation_class(type(model))(
        **settings,
        use_cache=False,
        return_dict_in_generate=True,
        mask_token_id=config.mask_token_id,
        pad_token_id=config.pad_token_id,
    )
    made.validate = unchecked  # of models that were loaded without the repair of their classes
    return made


def step_logits(model: Any, prompt: Prompt, canvas: Tensor) -> Tensor:
    r"""Logits (R, T, V) of canvases (R, T); row t predicts position t.

    The model predicts position p from p - 1, so the rows begin at the prompt's last token.
    """
    answer = model.get_input_embeddings()(canvas)
    ids = torch.cat((prompt.ids, canvas), dim=1)
    mask = torch.cat((prompt.mask, torch.ones_like(canvas)), dim=1)
    grids = [g.flatten(0, 1) if g.shape[1] else None for g in prompt.grids]
    positions, _ = model.get_rope_index(ids, *grids, mask)
    with expanded_mask(model):
        logits = model(
            inputs_embeds=torch.cat((prompt.embeds.to(answer.dtype), answer), dim=1),
            attention_mask=mask,
            position_ids=positions,
            use_cache=False,
            return_dict=True,
        ).logits
    first = prompt.ids.shape[1] - 1
    return logits[:, first : first + canvas.shape[1]]


@contextmanager
def expanded_mask(model: Any) -> Iterator[None]:
    r"""The mask (B, N) that upstream insists on reaches its attention as (B, 1, N, N).

    Upstream expands it on CUDA only, and only for fused attention. Padding sees itself alone, so
    that no row of attention is empty; nobody sees padding. Flash attention takes it as it is.
    """
    kind = type(model.model.layers[0].self_attn).__name__

    def expand(_module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> Any:
        mask = kwargs.get("attention_mask")
        if mask is None or mask.ndim != 2 or "Flash" in kind or "Dimple" in kind:
            return None  # Dimple expands it by itself
        valid = mask.bool()
        seen = valid[:, None, :, None] & valid[:, None, None, :]
        seen = seen | torch.eye(mask.shape[1], dtype=torch.bool, device=mask.device)
        if "Sdpa" not in kind:  # written out: the mask is added to the scores
            dtype = kwargs["inputs_embeds"].dtype
            seen = torch.zeros_like(seen, dtype=dtype).masked_fill(~seen, torch.finfo(dtype).min)
        return args, {**kwargs, "attention_mask": seen}

    with model.model.register_forward_pre_hook(expand, with_kwargs=True):
        yield


def generated(
    model: Any, ids: Tensor, config: Any, inputs: dict[str, Any], given: Given | None = None
) -> CanvasLog:
    """Run upstream's ``diffusion_generate`` on one example (1, P), and record it by its own hooks:
    canvas and shifted logits before every choice. Another of them puts given tokens in."""
    prefix = ids.shape[1]
    log = CanvasLog(config.mask_token_id)

    def note(_step: int, x: Tensor, logits: Tensor) -> Tensor:
        log.see(x[:, prefix:])
        log.read(logits[:, prefix:])
        return logits

    if given is not None:
        inputs = {**inputs, "generation_tokens_hook_func": placing(given, prefix)}
    with callable_generate(model), expanded_mask(model):
        result = model.diffusion_generate(
            ids,
            generation_config=config,
            generation_logits_hook_func=note,
            **inputs,
        )
    log.finish(result.sequences[:, prefix:])
    return log
