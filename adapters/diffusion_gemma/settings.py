r"""Settings of DiffusionGemma's ``generate``, which ignores those it does not know."""

from __future__ import annotations

from typing import Any

from captum_dcam.adapters.common.settings import Setting, Settings, count
from captum_dcam.errors import InputError

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
            "fewer pictures"
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
