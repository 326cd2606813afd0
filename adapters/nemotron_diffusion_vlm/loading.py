r"""Loading of a Nemotron-Labs-Diffusion-VLM checkpoint, whose code comes with it."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from typing import Any

from captum_dcam.adapters.common.compat import lent, swapped
from captum_dcam.adapters.common.remote import remote
from captum_dcam.adapters.nemotron_diffusion_vlm.facts import CHECKPOINT

MODEL_TYPE = "nemotron_labs_diffusion_vlm"
CLASSES = ("NemotronLabsDiffusionVLMModel",)


@contextmanager
def repaired() -> Iterator[None]:
    r"""The code that lies in the checkpoint loads inside the context.

    It is written for transformers before 5.9: ``masking_utils`` had ``sdpa_mask_older_torch`` then,
    and its masks took ``input_embeds`` and ``cache_position``.
    """
    from transformers import masking_utils as masks

    names = ("create_causal_mask", "create_sliding_window_causal_mask")
    with (
        lent(masks, sdpa_mask_older_torch=masks.sdpa_mask),
        swapped(masks, **{name: _as_before(getattr(masks, name)) for name in names}),
    ):
        yield


def _as_before(function: Callable[..., Any]) -> Callable[..., Any]:
    known = inspect.signature(function).parameters
    if "input_embeds" in known:
        return function

    @wraps(function)
    def called(*args: Any, **kwargs: Any) -> Any:
        if "input_embeds" in kwargs:
            kwargs["inputs_embeds"] = kwargs.pop("input_embeds")
        return function(*args, **{name: v for name, v in kwargs.items() if name in known})

    return called


loaded = remote(
    "nemotron_diffusion_vlm", CHECKPOINT, MODEL_TYPE, repaired=repaired, processing="AutoTokenizer"
)
