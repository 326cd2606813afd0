r"""Loading of a Fast-dVLM checkpoint, whose code comes with it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from captum_dcam.adapters.common.compat import around_loading
from captum_dcam.adapters.common.remote import remote
from captum_dcam.adapters.fast_dvlm.facts import CHECKPOINT

CLASSES = ("Fast_dVLMForConditionalGeneration",)


@contextmanager
def repaired() -> Iterator[None]:
    """The code that lies in the checkpoint loads inside the context: it reads ``pad_token_id`` of
    the configuration's parts, which transformers 5.9 and later leave out."""

    def around(cls: Any, load: Callable[..., Any], *args: Any, **options: Any) -> Any:
        if cls.__name__ in CLASSES:
            config = options.get("config")
            parts = (getattr(config, name, None) for name in ("text_config", "vision_config"))
            for part in parts:
                if part is not None and not hasattr(part, "pad_token_id"):
                    part.pad_token_id = getattr(part, "eos_token_id", None) or 0
        return load(*args, **options)

    with around_loading(around):
        yield


loaded = remote("fast_dvlm", CHECKPOINT, repaired=repaired)
