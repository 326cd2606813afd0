r"""Repairs that LaViDa's code needs under newer transformers."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from captum_dcam.adapters.common.compat import (
    deepspeed,
    default_frequencies,
    moved_names,
    parents_constructor,
    siglip_token,
    tied_by_map,
    unchecked,
    without_arguments,
)
from captum_dcam.adapters.common.loading import upstream, whole
from captum_dcam.adapters.lavida.facts import INSTALL
from captum_dcam.model.versions import transformers_major

#: class name → language model
VARIANTS = {"LlavaLladaForMaskedDiffusion": "llada", "LlavaDreamForMaskedDiffusion": "dream"}


def package() -> Any:
    r"""Upstream's package ``llava``, repaired; returns its ``llava.model.builder``.

    Names that have moved, deepspeed where it is not installed, and classes, see
    :func:`repair_classes`.

    Raises:
        ImportError: no such package, or one of another project of LLaVA's kind.
    """
    moved_names()
    install = (
        f"{INSTALL}. Other projects have a package llava too (LLaDA-V, LLaVA): one at a time can "
        "be installed"
    )
    names = ("language_model.llava_llada", "language_model.llava_dream", "builder")
    with deepspeed():
        llada, dream, builder = upstream("LaViDa", install, *(f"llava.model.{n}" for n in names))
    repair_classes(llada, dream)
    return builder


def repair_classes(llada: Any, dream: Any) -> None:
    r"""Upstream's classes under transformers 5; the arguments are its two modules.

    Besides what :mod:`captum_dcam.adapters.common.compat` says of the functions called here,
    ``ROPE_INIT_FUNCTIONS`` has no ``default``, ``Cache`` cannot be made without layers, and the
    generation configuration's ``from_model_config`` looks for Dream's settings in transformers' own
    configuration.
    """
    if transformers_major() < 5:
        return
    parents_constructor(llada.LlavaLladaConfig, llada.LLaDAConfig)
    parents_constructor(dream.LlavaDreamConfig, dream.DreamConfig)
    without_arguments(llada.LLaDAModelLM)
    tied_by_map(llada.LlavaLladaForMaskedDiffusion, dream.LlavaDreamForMaskedDiffusion)
    siglip_token()
    language: Any = importlib.import_module(dream.DreamBaseModel.__module__)
    known = language.ROPE_INIT_FUNCTIONS
    if "default" not in known:
        language.ROPE_INIT_FUNCTIONS = {**known, "default": default_frequencies}
    language.DreamPrefixLMCache.__init__ = _empty_cache
    language.DreamGenerationConfig.validate = unchecked
    language.DreamGenerationConfig.from_model_config = classmethod(_from_model)


def _empty_cache(self: Any) -> None:
    self.past_key_values, self.layers = {}, []


def _from_model(cls: Any, config: Any) -> Any:
    """A generation configuration of a model's; ``top_k`` as transformers 4 filled it in."""
    names = ("mask_token_id", "pad_token_id", "bos_token_id", "eos_token_id")
    return cls(top_k=50, **{n: getattr(config, n, None) for n in names})


@contextmanager
def repaired() -> Iterator[Any]:
    r"""LaViDa's code can be imported, and loads its checkpoints, inside the context.

    Its checkpoints are loaded whole, see :func:`~captum_dcam.adapters.common.loading.whole`.

    Yields:
        module: upstream's ``llava.model.builder``.

    Raises:
        ImportError: no such package, or one of another project of LLaVA's kind.
    """
    builder = package()
    with whole("LaViDa", *(getattr(builder, name) for name in VARIANTS)):
        yield builder
