r"""Repairs that LaViDa's code needs under newer transformers, and without deepspeed."""

from __future__ import annotations

import functools
import importlib
import importlib.util
import sys
import types
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch.utils.checkpoint

from captum_dcam.adapters.common.compat import (
    default_frequencies,
    empty_tower,
    moved_names,
    parents_constructor,
    siglip,
    siglip_token,
    tied_by_map,
    transformers_major,
    unchecked,
    without_arguments,
)
from captum_dcam.adapters.common.loading import upstream
from captum_dcam.adapters.lavida.facts import INSTALL


def package() -> Any:
    r"""Upstream's package ``llava``, repaired; returns its ``llava.model.builder``.

    - ``deepspeed`` is imported for the checkpointing of training alone: where it is not installed
      a stand-in with that function takes its place.
    - names that have moved; classes, see :func:`repair_classes`.

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


@contextmanager
def deepspeed() -> Iterator[None]:
    """A module ``deepspeed`` inside the context, where none is installed."""
    if importlib.util.find_spec("deepspeed") is not None:
        yield
        return
    made: Any = types.ModuleType("deepspeed")
    made.__spec__ = importlib.machinery.ModuleSpec("deepspeed", None)
    made.checkpointing = types.SimpleNamespace(
        checkpoint=functools.partial(torch.utils.checkpoint.checkpoint, use_reentrant=True)
    )
    sys.modules["deepspeed"] = made
    try:
        yield
    finally:
        del sys.modules["deepspeed"]


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
def loading(classes: Sequence[Any]) -> Iterator[list[str]]:
    r"""Upstream's builder loads with the vision tower that its checkpoint holds.

    Under transformers 5 towers are built empty, see
    :func:`~captum_dcam.adapters.common.compat.empty_tower`; see also :func:`fill_tower`.

    Args:
        classes (sequence of type): the model classes that the builder loads.

    Yields:
        list of str: filled with the names of parameters that the checkpoint does not hold.
    """
    from transformers import PreTrainedModel

    missing: list[str] = []
    original: Any = vars(PreTrainedModel)["from_pretrained"]

    def from_pretrained(cls: Any, *args: Any, **kwargs: Any) -> Any:
        if cls not in classes:
            return original.__func__(cls, *args, **kwargs)
        model, info = original.__func__(cls, *args, output_loading_info=True, **kwargs)
        missing.extend(info["missing_keys"])
        return model

    base: Any = PreTrainedModel  # Dream's class calls its parent's, and takes a model only
    base.from_pretrained = classmethod(from_pretrained)
    try:
        with nullcontext() if transformers_major() < 5 else empty_tower():
            yield missing
    finally:
        base.from_pretrained = original


def fill_tower(tower: Any, missing: Sequence[str]) -> list[str]:
    """Fill parts of a vision tower that the checkpoint does not hold from the tower's own; returns
    the names of what is missing elsewhere."""
    left = [n for n in missing if "vision_tower" not in n]
    if len(left) == len(missing) or transformers_major() < 5:  # older ones fill it when it is made
        return left
    held = siglip().SigLipVisionModel.from_pretrained(tower.vision_tower_name).state_dict()
    own = tower.vision_tower.state_dict()
    short = [n.rpartition("vision_tower.")[2] for n in missing if n not in left]
    tower.vision_tower.load_state_dict({**own, **{n: held[n] for n in short}})
    return left
