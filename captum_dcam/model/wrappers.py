r"""What trainers, servers and compilers put around a model, taken off: the family's own is read.

What they put *into* it stays: LoRA's layers are active, accelerate's hooks move weights and inputs.
"""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.parallel import DataParallel, DistributedDataParallel

from captum_dcam.errors import InputError, MissingPackageError, WeightsError
from captum_dcam.files import read_json
from captum_dcam.packages import importable

#: wrappers that split weights among processes, by the names of their classes
SHARDED = ("FullyShardedDataParallel", "DeepSpeedEngine")


def unwrapped(model: nn.Module) -> nn.Module:
    r"""The model inside ``torch.compile``, ``DataParallel``, ``DistributedDataParallel`` and PEFT's
    models, in whatever order they were put around it; another model as it is.

    Args:
        model (nn.Module): as its user has it.

    Raises:
        InputError: what cannot be taken off, with the call to make: prompts that PEFT has learned,
            weights that are split among processes, accelerate's mixed precision, and layers that
            were compiled in place where torch is older than 2.6.

    Examples::

        >>> from torch import nn
        >>> layer = nn.Linear(2, 2)
        >>> unwrapped(nn.DataParallel(torch.compile(layer))) is layer
        True
    """
    while (inner := _inside(model)) is not None:
        model = inner
    if compiled(model) and not hasattr(torch.compiler, "set_stance"):
        raise InputError(
            f"layers of this {type(model).__name__} are compiled, and torch {torch.__version__} "
            "cannot run them as they are written (from 2.6 it can): load it without .compile()"
        )
    return model


def compiled(model: nn.Module) -> bool:
    """Whether a module, or one inside it, was compiled: hooks that are put on it later would not
    run there."""
    return any(
        hasattr(m, "_orig_mod") or getattr(m, "_compiled_call_impl", None) is not None
        for m in model.modules()
    )


def _inside(model: Any) -> Any:
    """What the outermost wrapper holds; None where there is none."""
    kinds = [c.__name__ for c in type(model).__mro__]
    if sharded := next((k for k in kinds if k in SHARDED), None):
        raise InputError(
            f"the model is in a {sharded}, which splits its weights among processes: gather them "
            "(its save to one checkpoint), and load that with captum_dcam.load(folder)"
        )
    if "_original_forward" in vars(model):
        raise InputError(
            f"accelerate's Accelerator.prepare has put mixed precision around this "
            f"{type(model).__name__}: give wrap accelerator.unwrap_model(model, "
            "keep_fp32_wrapper=False)"
        )
    if isinstance(model, DataParallel | DistributedDataParallel):
        return model.module
    if "_orig_mod" in model._modules:
        return model._orig_mod
    if hasattr(model, "peft_config") and hasattr(model, "get_base_model"):
        return _without_peft(model)
    return None


def _without_peft(model: Any) -> Any:
    """The base model with PEFT's layers in it; InputError for prompts, which are outside of it."""
    names = model.active_adapter
    for name in [names] if isinstance(names, str) else names:
        config = model.peft_config[name]
        if getattr(config, "is_prompt_learning", False):
            kind = getattr(config.peft_type, "value", config.peft_type)
            raise InputError(
                f"PEFT's adapter {name!r} is of type {kind}, whose learned prompt is outside of "
                "the layers, so that nothing here would see it: give wrap model.get_base_model() "
                "to explain the model without it; LoRA and other adapters inside layers stay active"
            )
    return model.get_base_model()


# -- folders that PEFT has saved -------------------------------------------------------------------


def base_of(source: str) -> str | None:
    r"""The checkpoint that the adapters in a folder of PEFT's belong to.

    Args:
        source (str): what is to be loaded.

    Returns:
        str: folder or hub name; None where ``source`` is no such folder.

    Raises:
        MissingPackageError: PEFT is not installed.
        WeightsError: the folder names no checkpoint.
    """
    path = Path(source) / "adapter_config.json"
    if not path.is_file() or (path.parent / "config.json").is_file():
        return None
    base = read_json(path, WeightsError, "save the adapter again").get("base_model_name_or_path")
    if not isinstance(base, str) or not base:
        raise WeightsError(
            f"{path} names no base model: load it, put the adapter into it with "
            f"peft.PeftModel.from_pretrained(model, {source!r}), and give that to captum_dcam.wrap"
        )
    if not importable("peft"):
        raise MissingPackageError(
            f"{source} holds an adapter of PEFT's for {base}, and the package peft cannot be "
            "imported: pip install peft"
        )
    return base


def adapted(model: nn.Module, source: str) -> None:
    """Put the adapter that a folder of PEFT's holds into the layers of its base model; InputError
    for one that is outside of them."""
    unwrapped(import_module("peft").PeftModel.from_pretrained(model, source))
