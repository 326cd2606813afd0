"""``load`` a model by name, or ``wrap`` one that is loaded already.

A family is imported when it is asked for, or when all are searched. One that cannot be imported is
left out, and named in the error that somebody who looks for it gets.
"""

from __future__ import annotations

import difflib
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from packaging.specifiers import SpecifierSet
from safetensors import SafetensorError, safe_open
from torch import nn

from captum_dcam import checks
from captum_dcam.errors import (
    InputError,
    InputTypeError,
    MissingPackageError,
    RemoteCodeError,
    UnknownNameError,
    WeightsError,
    near,
)
from captum_dcam.files import read_json, reading
from captum_dcam.model import buffers
from captum_dcam.model.adapter import Adapter, FamilyFacts, device_of
from captum_dcam.model.families import (
    ADAPTERS,
    GROUP,
    built_in,
    load_plugin,
    plugins,
    said,
)
from captum_dcam.model.guard import LOADING, out_of_inference_mode
from captum_dcam.model.wrappers import adapted, base_of, unwrapped
from captum_dcam.packages import importable, needed


def families() -> dict[str, type[Adapter]]:
    """All families by name, those of other packages too, but for those that cannot be imported."""
    return _survey()[0]


def load(
    source: str | Path = "mini",
    family: str | None = None,
    *,
    device: torch.device | str | None = None,
    dtype: torch.dtype | str | None = None,
    device_map: Any = None,
    revision: str | None = None,
    trust_remote_code: bool = False,
    verify: bool = True,
    progress: bool = False,
    **options: Any,
) -> Adapter:
    r"""Load a model and its adapter.

    Args:
        source (str or path, optional): ``"mini"`` for the embedded model, a folder that
            ``save_pretrained`` wrote, perhaps PEFT's, whose base model is loaded with it, or a name
            on the Hugging Face hub. Default: ``"mini"``
        family (str, optional): family name. Default: found from the checkpoint's ``config.json``
        device (device, optional): where the model goes. Default: the GPU where torch sees one by
            CUDA, else the CPU; or ``device_map``
        dtype (dtype, optional): Default: the family's own: bfloat16 or what the checkpoint has;
            float32 for ``mini``
        device_map (str or dict, optional): spreads the model over devices, through accelerate.
        revision (str, optional): branch, tag or commit on the hub. Default: the newest
        trust_remote_code (bool, optional): let Python code inside the checkpoint run on this
            machine. Default: False
        verify (bool, optional): replay one step of the first generation, and raise a
            :class:`~captum_dcam.errors.ReplayError` where it is another. Default: True
        progress (bool, optional): show transformers' bars while it loads. Default: False
        **options: the family's own (``cache``, ``attn_implementation``, …).

    Raises:
        UnknownNameError: neither a known name nor a checkpoint of a known family.
        WeightsError: files are missing, damaged, or belong to another family.
        ImportError: the family's upstream package is missing, transformers is of a version that
            the family does not run with, or ``device_map`` is given without accelerate.
        RemoteCodeError: the checkpoint's own code would have to run, and is not allowed.
        ValueError: options that exclude each other, a device that is not here.
    """
    if type(trust_remote_code) is not bool:  # "False" is a text, and true
        raise InputTypeError(
            f"trust_remote_code is {trust_remote_code!r}, a {type(trust_remote_code).__name__}: "
            "expected True or False (on the command line: true or false)"
        )
    if family is not None and not isinstance(family, str):
        raise InputTypeError(f"family is {family!r}: expected a name, as captum-dcam models lists")
    verify = checks.flag("verify", verify)
    _check_options(source, device, device_map)
    base = base_of(str(source))
    cls, name = _found(base or str(source), family, revision)
    _check_environment(cls, str(source), trust_remote_code)
    if name is not None and Path(name).is_dir():
        check_files(Path(name))
    if device is None and device_map is None and torch.cuda.is_available():
        device = check_device(None)
    given = {"device": device, "dtype": dtype, "device_map": device_map, "revision": revision}
    given["trust_remote_code"] = trust_remote_code or None
    bars = nullcontext() if checks.flag("progress", progress) else without_bars()
    with LOADING, bars, out_of_inference_mode():
        # under a lock, as families repair upstream's modules meanwhile
        made = cls.load(name, **{k: v for k, v in given.items() if v is not None}, **options)
        if base is not None:
            adapted(made.model, str(source))
    made.source = str(source)
    if not verify:
        made.unverified = False
    return made


def wrap(
    model: nn.Module,
    processor: Any,
    family: str | None = None,
    *,
    verify: bool = True,
    **options: Any,
) -> Adapter:
    r"""Adapter of a loaded model, whatever version of whatever package it is of.

    Args:
        model (nn.Module): as its authors load it, perhaps spread by accelerate, or inside
            ``torch.compile``, ``DataParallel`` or PEFT's model, whose layers stay active.
        processor (object): the family's processor.
        family (str, optional): Default: the family that recognises the model
        verify (bool, optional): check the model before it is explained. Rotary tables and
            position ids that are wrong are computed again, and a warning says so; and one step of
            the first generation is replayed, as in :func:`load`. Default: True
        **options: the family's (``cache``, …).

    Raises:
        TypeError: ``model`` is no module; a processor of another kind.
        UnknownNameError: no family recognises it, or several do.
        ImportError: transformers is of a version that the family does not run with.
        ValueError: a processor that does not fit the model, or a wrapper that cannot be taken off,
            see :func:`~captum_dcam.model.wrappers.unwrapped`.
        WeightsError: a wrong buffer that cannot be computed, named; weights that are on meta.
    """
    verify = checks.flag("verify", verify)
    if isinstance(model, nn.Module):
        model = unwrapped(model)
    cls = _family_of(model, family)
    check_transformers(cls)
    device_of(model)  # refuses weights that are not there
    adapter = cls(model, processor, **options)
    adapter.unverified = verify
    if verify:
        _check_buffers(adapter)
    return adapter


@contextmanager
def without_bars() -> Iterator[None]:
    """Hide transformers' progress bars, and restore them afterwards."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


@contextmanager
def repair(family: str) -> Iterator[None]:
    r"""Authors' code, written for older packages, can be imported and loads its checkpoints inside
    the context, with whatever versions are installed.

    ::

        with captum_dcam.repair("lavida"):
            from llava.model.builder import load_pretrained_model
            tokenizer, model, images, _ = load_pretrained_model(folder, None, "llava_llada")
        adapter = captum_dcam.wrap(model, (tokenizer, images))

    Names that have moved and classes that would not load stay repaired; what stands in for a
    package, or goes around the loading of models, is gone behind the context. ``load`` does the
    same. Where nothing is broken, and for families of transformers itself, it does nothing.

    Args:
        family (str): as :func:`families` names it.

    Raises:
        UnknownNameError: no such family.
        ImportError: the authors' code is not installed, or transformers is of a version that the
            family does not run with.
    """
    cls = find(family)
    check_transformers(cls)
    with LOADING, cls.repaired():
        yield


def _check_buffers(adapter: Adapter) -> None:
    """Repair a model's buffers; a warning says which were wrong."""
    with adapter.lock, out_of_inference_mode():
        wrong = buffers.repair(adapter.model)
    if wrong:
        warnings.warn(
            f"wrong in this {type(adapter.model).__name__}: {buffers.counted(wrong)}. No "
            "checkpoint holds such tables, and loading left what memory held. They are computed "
            "again now; what the model answered before is not to be trusted: generate it anew. "
            "(captum_dcam.load does the same; verify=False leaves them as they are.)",
            stacklevel=3,
        )


def _family_of(model: nn.Module, family: str | None) -> type[Adapter]:
    """The class for a model: by the family's name, or the one that recognises it."""
    if not isinstance(model, nn.Module):
        raise InputTypeError(
            f"model is a {type(model).__name__}: expected a torch.nn.Module, "
            "wrap(model, processor); to load a checkpoint by its name: captum_dcam.load(name)"
        )
    if family is not None:
        return find(family)
    known, broken = _survey()
    owners = [name for name, cls in known.items() if cls.owns(model)]
    if len(owners) == 1:
        return known[owners[0]]
    if owners:
        raise UnknownNameError(
            f"several families recognise a {type(model).__name__}: name one with family=…: "
            f"{', '.join(owners)}"
        )
    raise UnknownNameError(
        f"no family recognises a {type(model).__name__}; known: {', '.join(known)}. Name one "
        f"with family=…, or write an adapter (docs/ADAPTERS.md){_left_out(broken)}"
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
    if source in {*built_in(), *ADAPTERS, *plugins()}:
        return find(source), None
    known, broken = _survey()
    if source in known:  # a package may bring several families under one entry point
        return known[source], None
    config = read_config(source, revision)
    name = None if config is None else family_of(source, config, known)
    if name is None:
        raise UnknownNameError(_unknown(source, config, list(known)) + _left_out(broken))
    return known[name], source


def _unknown(source: str, config: dict[str, Any] | None, known: list[str]) -> str:
    """The message about a source that no family knows."""
    if config is None:
        return (
            f"unknown model {source!r}{near(source, known)}. Or give a folder that save_pretrained "
            "wrote, or a name on the hub (owner/name); another family: docs/ADAPTERS.md"
        )
    code = ", whose code comes with it (it was not run)" if config.get("auto_map") else ""
    return (
        f"unknown model {source!r}: it holds {_kind(config)}{code}; "
        f"known families: {', '.join(known)}. If it is one of theirs, say family=…; another family "
        "is added as docs/ADAPTERS.md says"
    )


def _kind(config: Mapping[str, Any]) -> str:
    kinds = " or ".join(config.get("architectures") or ()) or "model"
    return f"a {kinds} of type {config.get('model_type')!r}"


def _check_family(cls: type[Adapter], source: str, revision: str | None) -> None:
    """Raise WeightsError for a checkpoint that another family claims."""
    config = read_config(source, revision)
    if config is None:
        return  # the family says what it expects
    other = family_of(source, config, families())
    if other not in (None, cls.family):
        raise WeightsError(
            f"{source} holds {_kind(config)}, which is of family {other!r}, not {cls.family!r}: "
            f"leave out family=…, or give a checkpoint of {cls.family}"
        )


# -- what must be there before anything is loaded ------------------------------------------------


def _check_options(source: str | Path, device: torch.device | str | None, device_map: Any) -> None:
    if device is not None and device_map is not None:
        raise InputError(
            f"device={device!s} and device_map={device_map!r} exclude each other: give one"
        )
    spread = isinstance(device_map, str | dict | int | torch.device) and device_map not in ("", {})
    if device_map is not None and (not spread or isinstance(device_map, bool)):
        raise InputTypeError(
            f"device_map is {device_map!r}: expected 'auto', a device, or a dict of module names "
            "to devices"
        )
    if device_map is not None:
        needed("accelerate", f"device_map={device_map!r}")
    if device is not None:
        check_device(device)


def check_device(device: torch.device | str | None) -> torch.device:
    """The device; ValueError where this machine does not have it. None: the best that is here, a
    GPU by CUDA or the CPU (an Apple GPU has no float64, and has to be asked for)."""
    if device is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        found = torch.device(device)
    except RuntimeError as error:
        raise InputError(f"unknown device {device!r}: expected cpu, cuda, cuda:1, mps") from error
    if found.type == "cuda" and (found.index or 0) >= torch.cuda.device_count():
        raise InputError(
            f"device {device} is not here: torch sees {torch.cuda.device_count()} CUDA devices"
        )
    if found.type == "mps" and not torch.backends.mps.is_available():
        raise InputError("device mps is not here: torch finds no Apple GPU")
    if found.type == "meta":
        raise InputError("device meta holds no numbers to compute with: expected cpu, cuda, mps")
    return found


def _check_environment(cls: type[Adapter], source: str, trusted: bool) -> None:
    facts = cls.facts or FamilyFacts()
    check_transformers(cls)
    if facts.package is not None and not importable(facts.package):
        raise MissingPackageError(
            f"{cls.family} needs its authors' package {facts.package!r}, which cannot be imported: "
            f"{facts.install}; or load the model as they do and use captum_dcam.wrap"
        )
    if facts.remote_code and not trusted:
        raise RemoteCodeError(
            f"{source} brings its own Python code, which would run on this machine: read it, fix "
            "its revision=…, and pass trust_remote_code=True; or load the model yourself and use "
            "captum_dcam.wrap"
        )


def check_transformers(cls: type[Adapter]) -> None:
    """Raise ImportError unless the installed transformers is one that a family runs with."""
    import transformers

    wanted, version = (cls.facts or FamilyFacts()).transformers, transformers.__version__
    if not SpecifierSet(wanted).contains(version, prereleases=True):
        raise MissingPackageError(
            f"{cls.family} runs with transformers {wanted}, and {version} is installed: "
            f"pip install 'transformers{wanted}', in an environment of its own where another model "
            f"needs {version}"
        )


# -- whose a checkpoint is: its config.json, and the family that claims it -------------------------


def read_config(source: str, revision: str | None = None) -> dict[str, Any] | None:
    r"""``config.json`` of a folder or of a name on the hub.

    Returns:
        dict: or None where ``source`` is neither a folder with that file nor like ``owner/name``.

    Raises:
        WeightsError: the file is damaged, or the hub did not give it.
    """
    folder = Path(source)
    path = folder / "config.json"
    if not folder.exists() and source.count("/") == 1 and source[0] not in "./~":
        path = _from_hub(source, revision)
    elif not path.is_file():
        return None
    return read_json(path, WeightsError, WHOLE)


#: what to do where a file of a checkpoint is damaged
WHOLE = "fetch or save the checkpoint again"
#: files of a folder that transformers reads, each an object
_OBJECTS = (
    "config.json",
    "generation_config.json",
    "preprocessor_config.json",
    "processor_config.json",
    "special_tokens_map.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "video_preprocessor_config.json",
)


def check_files(folder: Path) -> None:
    r"""Check a checkpoint's folder before upstream's code reads it, which seldom names the file.

    Raises:
        WeightsError: a file that is no JSON object, weights that are cut or no safetensors, or a
            part of them that is not there; names the file.
    """
    for name in _OBJECTS:
        if (folder / name).is_file():
            read_json(folder / name, WeightsError, WHOLE)
    for path in sorted(folder.glob("*.safetensors.index.json")):
        parts = read_json(path, WeightsError, WHOLE).get("weight_map")
        if not isinstance(parts, dict) or not all(isinstance(p, str) for p in parts.values()):
            raise WeightsError(f"{path} is damaged: it has no weight_map of names; {WHOLE}")
        missing = sorted(p for p in set(parts.values()) if not (folder / p).is_file())
        if missing:
            raise WeightsError(f"{folder} lacks {missing[0]}, which {path.name} names; {WHOLE}")
    for path in sorted(folder.glob("*.safetensors")):
        try:
            with reading(path), safe_open(path, "pt"):
                pass  # the header tells of every tensor where it lies
        except SafetensorError as error:
            raise WeightsError(f"{path} is damaged: {error}; {WHOLE}") from error


def _from_hub(source: str, revision: str | None) -> Path:
    from transformers.utils import cached_file

    try:
        _check_answers(source, revision)
        return Path(cached_file(source, "config.json", revision=revision))
    except (OSError, ValueError) as error:  # ValueError: a name that the hub cannot have
        raise WeightsError(
            f"{source} is no folder here{_beside(source)}, and the hub gave no config.json of it: "
            f"{error}"
        ) from error


def _check_answers(source: str, revision: str | None) -> None:
    """Ask the hub once whether it answers, for what is not in its cache; OSError where it does not.
    Without a network, transformers asks six times, which takes half a minute."""
    from huggingface_hub import get_hf_file_metadata, hf_hub_url, try_to_load_from_cache
    from huggingface_hub.utils import HfHubHTTPError

    if isinstance(try_to_load_from_cache(source, "config.json", revision=revision), str):
        return
    try:
        get_hf_file_metadata(hf_hub_url(source, "config.json", revision=revision), timeout=10)
    except (HfHubHTTPError, ValueError):  # it answers; transformers says best what is wrong
        return
    except Exception as error:  # of requests or of httpx, as its version has it
        raise OSError(f"it cannot be reached ({error})") from error


def _beside(source: str) -> str:
    """A hint at folders that are called nearly so; nothing where there are none."""
    parent = Path(source).parent
    names = [path.name for path in parent.iterdir()] if parent.is_dir() else []
    close = difflib.get_close_matches(Path(source).name, names, n=2)
    listed = " or ".join(repr(str(parent / name)) for name in close)
    return f" (did you mean {listed}?)" if listed else ""


def family_of(
    source: str, config: Mapping[str, Any], known: Mapping[str, type[Adapter]]
) -> str | None:
    r"""The family that claims a configuration: by its ``architectures``, else by ``model_type``.

    A family that declares architectures is not asked about configurations that name others.

    Raises:
        UnknownNameError: several families claim it.
    """
    kinds = set(config.get("architectures") or ())
    kind = config.get("model_type")
    named = [n for n, c in known.items() if kinds & set(c.architectures)]
    typed = [
        n for n, c in known.items() if kind in c.model_types and not (kinds and c.architectures)
    ]
    claimed = [n for n in named or typed if known[n].claims(dict(config))]
    if len(claimed) > 1:
        raise UnknownNameError(
            f"{source} holds {_kind(config)}, which several families know: say which with "
            f"family=…: {', '.join(claimed)}"
        )
    return claimed[0] if claimed else None


# -- one family, or all of them: each is imported when it is asked for -----------------------------


def _import(family: str) -> Exception | None:
    """Import a family of this library; the error where that fails."""
    try:
        found = import_module(f"{GROUP}.{family}")
        if hasattr(found, "__path__"):  # of a folder, which imports nothing by itself
            import_module(f"{found.__name__}.adapter")
    except Exception as error:  # noqa: BLE001  upstream's packages may raise anything
        return error
    return None


def _survey() -> tuple[dict[str, type[Adapter]], dict[str, Exception]]:
    """Every family by name, and the errors of those of this library that cannot be imported."""
    failed = {name: error for name in built_in() if (error := _import(name)) is not None}
    for point in plugins().values():
        load_plugin(point)
    return {n: c for n, c in sorted(ADAPTERS.items()) if n not in failed}, failed


def _left_out(broken: Mapping[str, Exception]) -> str:
    """The end of a message about an unknown model."""
    listed = "; ".join(f"{name} ({said(error)})" for name, error in broken.items())
    return f". Not importable: {listed}" if broken else ""


def find(family: str) -> type[Adapter]:
    r"""The adapter class of a family, which alone is imported.

    Raises:
        UnknownNameError: no such family, with near names; or one that cannot be imported.
        MissingPackageError: one that cannot be imported as a package is missing.
    """
    own, others = built_in(), plugins()
    broken = place = None
    if family in own:
        broken, place = _import(family), f"{GROUP}.{family}"
    elif family not in ADAPTERS and family in others:
        broken, place = load_plugin(others[family]), others[family].value
    if broken is not None:
        ours = family in own and isinstance(broken, ImportError)
        raise (MissingPackageError if ours else UnknownNameError)(
            f"the adapter {family!r} ({place}) cannot be imported: {said(broken)}"
        ) from broken
    if family not in ADAPTERS:
        raise UnknownNameError(
            f"unknown model family {family!r}{near(family, {*own, *ADAPTERS, *others})}"
        )
    return ADAPTERS[family]
