r"""Settings of MMaDA's ``mmu_generate``; see :meth:`MmadaAdapter.generate`."""

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

SETTINGS = Settings(
    "MMaDA",
    {
        "max_new_tokens": Setting(128, length, also="gen_length"),
        "block_length": Setting(None, count),
        "steps": Setting(None, count),
        "temperature": Setting(0.0, number),
        "cfg_scale": Setting(0.0, number),
        "remasking": Setting("low_confidence", one_of("low_confidence", "random")),
    },
    refused={
        "top_k": "MMaDA accepts and ignores it",
        "eot_token": "MMaDA accepts and ignores it: an answer is always as long as its canvas",
        "attention_mask": "a batch here has no padding, so there is nothing to mask",
    },
)


def checked(given: dict[str, Any], generator: torch.Generator | None) -> dict[str, Any]:
    """Arguments for ``mmu_generate``; raises before any work on what cannot work."""
    out = SETTINGS.read(given)
    out["steps"] = out["max_new_tokens"] if out["steps"] is None else out["steps"]
    in_blocks(out, "max_new_tokens")
    need_generator(out["temperature"] > 0 or out["remasking"] == "random", generator)
    return out
