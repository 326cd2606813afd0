"""``load`` a model by name, or ``wrap`` one that is loaded already."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import Any

import torch
from packaging.specifiers import SpecifierSet
from torch import nn

from captum_dcam.adapter import ADAPTERS, Adapter, Facts, find
from captum_dcam.checkpoints import family_of, read_config
from captum_dcam.errors import RemoteCodeError, UnknownNameError, WeightsError, near
from captum_dcam.plugins import load_plugins


def families() -> dict[str, type[Adapter]]:
    """All registered families by name, those of other packages too."""
    import captum_dcam.adapters  # noqa: F401  registers them

    load_plugins()
    return dict(sorted(ADAPTERS.items()))


def load(
    source: str | Path = "mini",
    family: str | None = None,
    *,
    device: torch.device | str | None = None,
    dtype: torch.dtype | str | None = None,
    device_map: Any = None,
    revision: str | None = None,
    trust_remote_code: bool = False,
    **options: Any,
) -> Adapter:
    r"""Load a model and its adapter.

    Args:
        source (str or path, optional): ``"mini"`` for the embedded model, a folder that
            ``save_pretrained`` wrote, or a name on the Hugging Face hub. Default: ``"mini"``
        family (str, optional): family name. Default: found from the checkpoint's ``config.json``
        device (device, optional): where the model goes. Default: the CPU, or ``device_map``
        dtype (dtype, optional): Default: the family's own
        device_map (str or dict, optional): spreads the model over devices, through accelerate.
        revision (str, optional): branch, tag or commit on the hub. Default: the newest
        trust_remote_code (bool, optional): let Python code inside the checkpoint run on this
            machine. Default: False
        **options: the family's own (``regime``, ``attn_implementation``, …).

    Raises:
        UnknownNameError: neither a known name nor a checkpoint of a known family.
        WeightsError: files are missing, damaged, or belong to another family.
        ImportError: the family's upstream package is missing, transformers is of a version that
            the family does not run with, or ``device_map`` is given without accelerate.
        RemoteCodeError: the checkpoint's own code would have to run, and is not allowed.
        ValueError: options that exclude each other, a device that is not here.
    """
    _check_options(source, device, device_map)
    cls, name = _found(str(source), family, revision)
    _check_environment(cls, str(source), trust_remote_code)
    given = {"device": device, "dtype": dtype, "device_map": device_map, "revision": revision}
    given = {key: value for key, value in given.items() if value is not None}
    if trust_remote_code:
        given["trust_remote_code"] = True
    return cls.load(name, **given, **options)


def wrap(model: nn.Module, processor: Any, family: str | None = None, **options: Any) -> Adapter:
    r"""Adapter of a loaded model, whatever version of whatever package it is of.

    Args:
        model (nn.Module): as its authors load it.
        processor (object): the family's processor.
        family (str, optional): Default: the family that recognises the model
        **options: the family's (``regime``, …).

    Raises:
        TypeError: ``model`` is no module.
        UnknownNameError: no family recognises it, or several do.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(
            f"model is a {type(model).__name__}: expected a torch.nn.Module, "
            "wrap(model, processor); to load a checkpoint by its name: captum_dcam.load(name)"
        )
    if family is not None:
        return find(family)(model, processor, **options)
    owners = [name for name, cls in families().items() if cls.owns(model)]
    if len(owners) == 1:
        return find(owners[0])(model, processor, **options)
    if owners:
        raise UnknownNameError(
            f"several families recognise a {type(model).__name__}: name one with family=…: "
            f"{', '.join(owners)}"
        )
    raise UnknownNameError(
        f"no family recognises a {type(model).__name__}; known: {', '.join(families())}. Name one "
        "with family=…, or write an adapter (docs/ADAPTERS.md)"
    )


def _found(
    source: str, family: str | None, revision: str | None
) -> tuple[type[Adapter], str | None]:
    """The adapter class, and what it is to load: None for its own default."""
    if family is not None:
        cls = find(family)
        if source == family:
            return cls, None
        _check_family(cls, source, revision)
        return cls, source
    known = families()
    if source in known:
        return known[source], None
    config = read_config(source, revision)
    name = None if config is None else family_of(source, config, known)
    if name is None:
        raise UnknownNameError(_unknown(source, config, list(known)))
    return known[name], source


def _unknown(source: str, config: dict[str, Any] | None, known: list[str]) -> str:
    """What to say of a source that no family knows."""
    if config is None:
        return (
            f"unknown model {source!r}{near(source, known)}. Or give a folder that save_pretrained "
            "wrote, or a name on the hub (owner/name); another family: docs/ADAPTERS.md"
        )
    kinds = " or ".join(config.get("architectures") or ()) or "model"
    code = ", whose code comes with it (it was not run)" if config.get("auto_map") else ""
    return (
        f"unknown model {source!r}: it holds a {kinds} of type {config.get('model_type')!r}{code}; "
        f"known families: {', '.join(known)}. If it is one of theirs, say family=…; another family "
        "is added as docs/ADAPTERS.md says"
    )


def _check_family(cls: type[Adapter], source: str, revision: str | None) -> None:
    """Raise WeightsError for a checkpoint that another family claims."""
    config = read_config(source, revision)
    if config is None:
        return  # the family says what it expects
    other = family_of(source, config, families())
    if other is not None and other != cls.family:
        kinds = " or ".join(config.get("architectures") or ()) or "model"
        raise WeightsError(
            f"{source} holds a {kinds} of type {config.get('model_type')!r}, which is of family "
            f"{other!r}, not {cls.family!r}: leave out family=…, or give a checkpoint of "
            f"{cls.family}"
        )


# -- what must be there before anything is loaded ------------------------------------------------


def _check_options(source: str | Path, device: torch.device | str | None, device_map: Any) -> None:
    if device is not None and device_map is not None:
        raise ValueError(
            f"device={device!s} and device_map={device_map!r} exclude each other: give one"
        )
    if device_map is not None and importlib.util.find_spec("accelerate") is None:
        raise ImportError(
            f"device_map={device_map!r} needs accelerate, which is not installed: "
            "pip install accelerate; or give device=…"
        )
    if device is not None:
        check_device(device)


def check_device(device: torch.device | str) -> torch.device:
    """The device; ValueError where this machine does not have it."""
    try:
        found = torch.device(device)
    except RuntimeError as error:
        raise ValueError(f"unknown device {device!r}: expected cpu, cuda, cuda:1, mps") from error
    if found.type == "cuda" and (found.index or 0) >= torch.cuda.device_count():
        raise ValueError(
            f"device {device} is not here: torch sees {torch.cuda.device_count()} CUDA devices"
        )
    if found.type == "mps" and not torch.backends.mps.is_available():
        raise ValueError("device mps is not here: torch finds no Apple GPU")
    return found


def _check_environment(cls: type[Adapter], source: str, trusted: bool) -> None:
    facts = Facts() if cls.facts is None else cls.facts
    check_transformers(cls.family, facts.transformers)
    if facts.package is not None and not importable(facts.package):
        raise ImportError(
            f"{cls.family} needs its authors' package {facts.package!r}, which cannot be imported: "
            f"{facts.install}; or load the model as they do and use captum_dcam.wrap"
        )
    if facts.remote_code and not trusted:
        raise RemoteCodeError(
            f"{source} brings its own Python code, which would run on this machine: read it, fix "
            "its revision=…, and pass trust_remote_code=True; or load the model yourself and use "
            "captum_dcam.wrap"
        )


def check_transformers(family: str, wanted: str) -> None:
    """Raise ImportError unless the installed transformers lies in a range such as ``>=5.0,<6``."""
    import transformers

    version = transformers.__version__
    if not SpecifierSet(wanted).contains(version, prereleases=True):
        raise ImportError(
            f"{family} runs with transformers{wanted}, and {version} is installed: pip install "
            f"'transformers{wanted}'; or load the model in the way that works for you and use "
            "captum_dcam.wrap, which asks for no version"
        )


def importable(package: str) -> bool:
    """Whether a top-level package is there; it is not imported."""
    if package in sys.modules:
        return sys.modules[package] is not None
    return importlib.util.find_spec(package) is not None
