r"""Loading of a MinerU-Diffusion checkpoint, whose code comes with it."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from captum_dcam.adapters.common.compat import around_loading, tied_to_words
from captum_dcam.adapters.common.remote import remote
from captum_dcam.adapters.mineru_diffusion.facts import CHECKPOINT

MODEL_TYPE = "mineru_diffusion"
CLASSES = ("MinerUDiffusionForConditionalGeneration",)


@contextmanager
def repaired() -> Iterator[None]:
    """MinerU-Diffusion's code, which lies in its checkpoint, loads it inside the context.

    transformers 5 wants ``_tied_weights_keys`` of its language model to map.
    """

    def around(cls: Any, load: Callable[..., Any], *args: Any, **options: Any) -> Any:
        if cls.__name__ in CLASSES:
            tied_to_words(sys.modules[cls.__module__].SDARForCausalLM)
        return load(*args, **options)

    with around_loading(around):
        yield


loaded = remote("mineru_diffusion", CHECKPOINT, MODEL_TYPE, repaired=repaired)
