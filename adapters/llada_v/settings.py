r"""Settings of LLaDA-V's ``generate``; see :meth:`LladaVAdapter.generate`."""

from __future__ import annotations

from typing import Any

import torch

from captum_dcam.adapters.common.settings import (
    Setting,
    Settings,
    count,
    in_blocks,
    length,
    need_generator,
    number,
    one_of,
)
from captum_dcam.errors import InputError, InputTypeError

SETTINGS = Settings(
    "LLaDA-V",
    {
        "gen_length": Setting(128, length),
        "block_length": Setting(None, count),
        "steps": Setting(None, count),
        "temperature": Setting(0.0, number),
        "cfg_scale": Setting(0.0, number),
        "remasking": Setting("low_confidence", one_of("low_confidence", "random")),
        "stopping_criteria": Setting(("<|eot_id|>",)),
        "generation_suffix": Setting(),
        "prefix_refresh_interval": Setting(),
    },
    refused={"max_new_tokens": "LLaDA-V ignores it: use gen_length"},
)


def checked(given: dict[str, Any], generator: torch.Generator | None, fast: bool) -> dict[str, Any]:
    """Arguments for the family's ``generate``; raises before any work on what cannot work."""
    out = SETTINGS.read(given)
    out["steps"] = out["gen_length"] if out["steps"] is None else out["steps"]
    in_blocks(out)
    if isinstance(out["stopping_criteria"], str):
        raise InputTypeError("stopping_criteria is a string: expected a list of stop strings")
    need_generator(out["temperature"] > 0 or out["remasking"] == "random", generator)
    if fast and out["cfg_scale"] > 0:
        raise InputError(
            f"cfg_scale is {out['cfg_scale']}: Fast-dLLM fails on guided decoding; call "
            "unregister_fast_dllm_hook(hook), or leave cfg_scale at 0"
        )
    refresh = out.pop("prefix_refresh_interval")
    if refresh is not None and (not fast or refresh < 1):
        raise InputError(
            f"prefix_refresh_interval is {refresh}: it is a setting of Fast-dLLM, at least 1; "
            "register its hook first"
        )
    if refresh is not None:
        out["prefix_refresh_interval"] = refresh
    out["stopping_criteria"] = list(out["stopping_criteria"]) or None
    return out
