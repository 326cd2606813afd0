r"""Loading of a DiffusionVL checkpoint, whose code comes with it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from captum_dcam.adapters.common.compat import around_loading, tied_to_words, without_arguments
from captum_dcam.adapters.common.remote import remote
from captum_dcam.adapters.diffusion_vl.facts import CHECKPOINT

MODEL_TYPE = "diffusionvl_qwenvl"
#: the model's class in the checkpoints' code, and in the authors' repository
CLASSES = (
    "DiffusionVL_Qwen2_5_VL_ForConditionalGeneration",
    "DiffusionVLQwenVLForCausalLM",
)


@contextmanager
def repaired() -> Iterator[None]:
    r"""DiffusionVL's code, which lies in its checkpoint, loads it inside the context.

    transformers 5 wants ``_tied_weights_keys`` to map, and calls ``tie_weights`` with arguments.
    """

    def around(cls: Any, load: Callable[..., Any], *args: Any, **options: Any) -> Any:
        if any(c.__name__ in CLASSES for c in cls.__mro__):
            tied_to_words(cls)
            without_arguments(cls)
        return load(*args, **options)

    with around_loading(around):
        yield


loaded = remote("diffusion_vl", CHECKPOINT, MODEL_TYPE, repaired=repaired)
