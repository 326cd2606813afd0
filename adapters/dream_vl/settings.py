r"""Settings of Dream-VL's ``diffusion_generate``; see :meth:`DreamVLAdapter.generate`."""

from __future__ import annotations

from typing import Any

import torch

from captum_dcam.adapters.common.settings import (
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
from captum_dcam.errors import InputError

SETTINGS = Settings(
    "Dream-VL",
    {
        "max_new_tokens": Setting(128, length, also="gen_length"),
        "steps": Setting(None, count),
        "alg": Setting("maskgit_plus", one_of("maskgit_plus", "topk_margin", "entropy", "origin")),
        "alg_temp": Setting(None, number),
        "temperature": Setting(0.0, number),
        "top_p": Setting(None, share),
        "top_k": Setting(None, count),
        "eps": Setting(1e-3, inside),
        "eos_penalty": Setting(0.0),
    },
)


def checked(given: dict[str, Any], generator: torch.Generator | None) -> dict[str, Any]:
    """Settings for ``diffusion_generate``; raises before any work on what cannot work."""
    given = dict(given)
    if given.pop("use_cache", False):
        raise InputError(
            "use_cache is True: Dream-VL's prompt cache fails at the second step (transformers 4: "
            "a shape error, 5: DynamicCache), so every step runs the whole sequence; leave it out"
        )
    out = SETTINGS.read(given)
    out["steps"] = out["max_new_tokens"] if out["steps"] is None else out["steps"]
    drawn = out["alg"] == "origin" or out["temperature"] > 0 or (out["alg_temp"] or 0) > 0
    need_generator(drawn, generator)
    return out
