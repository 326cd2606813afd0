r"""Repairs that Dream-VL's code needs under newer transformers."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

from torch import Tensor

from captum_dcam.adapters.common.compat import (
    around_loading,
    default_frequencies,
    lent,
    shadowed,
    tied_by_map,
    unchecked,
)
from captum_dcam.errors import InputError
from captum_dcam.model.versions import transformers_major

#: names of the model's class, or of one that it inherits from
CLASSES = ("DreamVLModel", "DimpleModel")


@contextmanager
def importable() -> Iterator[None]:
    r"""Upstream's modules can be imported, and its models built, inside the context.

    transformers 5 moved ``VideoInput`` from ``image_utils`` to ``video_utils``, and has no function
    for plain rotary embeddings (``ROPE_INIT_FUNCTIONS["default"]``).
    """
    from transformers import image_utils
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    moved = {}
    if not hasattr(image_utils, "VideoInput"):
        moved["VideoInput"] = importlib.import_module("transformers.video_utils").VideoInput
    missing = "default" not in ROPE_INIT_FUNCTIONS
    ROPE_INIT_FUNCTIONS.setdefault("default", default_frequencies)
    try:
        with lent(image_utils, **moved):
            yield
    finally:
        if missing:
            del ROPE_INIT_FUNCTIONS["default"]


@contextmanager
def repaired() -> Iterator[None]:
    """Dream-VL's code, which lies in its checkpoint, can be imported, and loads it, inside the
    context; see :func:`importable` and :func:`repair_classes`."""

    def around(cls: Any, load: Callable[..., Any], *args: Any, **options: Any) -> Any:
        if any(c.__name__ in CLASSES for c in cls.__mro__):
            repair_classes(cls)
        return load(*args, **options)

    with importable(), around_loading(around):
        yield


def generation_module(cls: Any) -> Any:
    """Upstream's module of the generation of a model class, which no import names: it lies in the
    checkpoint."""
    names = ("DreamVLGenerationMixin", "DimpleGenerationMixin")
    mixin = next(c for c in cls.__mro__ if c.__name__ in names)
    return importlib.import_module(mixin.__module__)


def is_dimple(cls: Any) -> bool:
    """Whether a class is Dimple's mixin of generation, or inherits from it."""
    return any(c.__name__ == "DimpleGenerationMixin" for c in cls.__mro__)


def generation_class(cls: Any) -> Any:
    """Upstream's configuration of a generation, for a model class."""
    name = "DimpleGenerationConfig" if is_dimple(cls) else "DreamVLGenerationConfig"
    return getattr(generation_module(cls), name)


def repair_classes(cls: Any) -> None:
    """Upstream's model class and its generation's configuration under transformers 5."""
    if transformers_major() < 5:
        return
    tied_by_map(cls)
    generation_class(cls).validate = unchecked


def callable_generate(model: Any) -> AbstractContextManager[None]:
    r"""Dream-VL's ``diffusion_generate`` can be called while the context is open.

    transformers 5 made ``GenerationMixin._expand_inputs_for_generation`` an ordinary method, which
    upstream calls without an object. For one sequence per example it changes nothing.
    """
    from transformers.generation.utils import GenerationMixin

    name = "_expand_inputs_for_generation"
    if isinstance(inspect.getattr_static(GenerationMixin, name), staticmethod):
        return nullcontext()
    return shadowed(model, **{name: _unexpanded})


def _unexpanded(
    expand_size: int = 1, input_ids: Tensor | None = None, **inputs: Any
) -> tuple[Tensor | None, dict[str, Any]]:
    """Input as it is; several sequences per example are not asked for here."""
    if expand_size != 1:
        raise InputError(f"num_return_sequences is {expand_size}: expected 1")
    return input_ids, inputs
