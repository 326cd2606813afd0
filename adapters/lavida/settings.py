r"""Settings of LaViDa's Dream decoder; those of LLaDA are shared with LaViDa-O."""

from __future__ import annotations

from typing import Any

import torch

from captum_dcam.adapters.common.llada import GEN_LENGTH, STEPS, check_steps
from captum_dcam.adapters.common.settings import (
    Setting,
    Settings,
    count,
    need_generator,
    number,
    one_of,
    share,
)
from captum_dcam.errors import InputError

SETTINGS = Settings(
    "LaViDa-Dream",
    {
        "gen_length": GEN_LENGTH,
        **STEPS,
        "alg": Setting("entropy", one_of("origin", "maskgit_plus", "topk_margin", "entropy")),
        "alg_temp": Setting(0.0, number),
        "top_p": Setting(0.95, share, none=True),
        "top_k": Setting(50, count, none=True),
    },
    refused={"remasking": "its counterpart here is alg"},
)


def checked(
    given: dict[str, Any], cached: bool, generator: torch.Generator | None
) -> dict[str, Any]:
    """The settings, checked before any work is done; the whole canvas is one block."""
    made = SETTINGS.read(given)
    drawn = made["temperature"] > 0 or made["alg_temp"] > 0 or made["alg"] == "origin"
    need_generator(drawn, generator)
    made["block_length"] = made["gen_length"]
    each = check_steps(made)
    left = made["gen_length"] - cached  # the prefill commits a token
    if made["schedule"] is not None and each > left:
        raise InputError(
            f"{each} steps with schedule {made['schedule']!r}: LaViDa-Dream fails when there are "
            f"more steps than the {left} tokens that the prefill leaves; give fewer steps, a "
            "longer gen_length, or no schedule"
        )
    return made
