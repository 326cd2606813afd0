r"""Repairs that LaViDa's code needs under newer transformers."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

from captum_dcam.adapters.common.compat import (
    around_loading,
    deepspeed,
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
from captum_dcam.adapters.common.loading import check_complete, upstream
from captum_dcam.adapters.lavida.facts import INSTALL

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

    The vision tower is filled from the checkpoint, which holds it: under transformers 5 towers are
    built empty first, see :func:`~captum_dcam.adapters.common.compat.empty_tower`. Parts that a
    checkpoint does not hold come from the tower's own.

    Yields:
        module: upstream's ``llava.model.builder``.

    Raises:
        ImportError: no such package, or one of another project of LLaVA's kind.
        WeightsError: a checkpoint, loaded inside, that lacks other parameters.
    """
    builder = package()
    classes = {getattr(builder, name) for name in VARIANTS}

    def around(cls: Any, load: Callable[..., Any], *args: Any, **options: Any) -> Any:
        if cls not in classes:
            return load(*args, **options)
        with nullcontext() if transformers_major() < 5 else empty_tower():
            model, info = load(*args, **options, output_loading_info=True)
        lost = fill_tower(model.get_vision_tower(), info["missing_keys"])
        check_complete(str(args[0]), lost, "LaViDa checkpoint")
        return model

    with around_loading(around):
        yield builder


def fill_tower(tower: Any, missing: Iterable[str]) -> list[str]:
    """Fill parts of a vision tower that the checkpoint does not hold from the tower's own; returns
    the names of what is missing elsewhere."""
    missing = list(missing)
    left = [n for n in missing if "vision_tower" not in n]
    if len(left) == len(missing):
        return left
    held = siglip().SigLipVisionModel.from_pretrained(tower.vision_tower_name).state_dict()
    own = tower.vision_tower.state_dict()
    short = [n.rpartition("vision_tower.")[2] for n in missing if n not in left]
    tower.vision_tower.load_state_dict({**own, **{n: held[n] for n in short}})
    return left
