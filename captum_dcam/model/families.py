r"""Where model families are, and what ``captum-dcam models`` lists of them; imports no torch.

Each is a folder or a file of ``captum_dcam.adapters``. Another package that brings a family says so
in its ``pyproject.toml``, under the family's name; importing the module registers its class::

    [project.entry-points."captum_dcam.adapters"]
    my_family = "my_package.adapter"
"""

from __future__ import annotations

import functools
import sys
import warnings
from importlib import import_module
from importlib.metadata import EntryPoint, entry_points
from pkgutil import iter_modules
from typing import Any

from captum_dcam.model.facts import FAMILIES, Checkpoint, FamilyFacts, ModelFamily
from captum_dcam.packages import importable
from captum_dcam.registry import Registry

#: the package of the families, and the group of other packages' entry points
GROUP = "captum_dcam.adapters"
#: the adapters that were imported so far, by family; :mod:`captum_dcam.model.hub` finds the others
ADAPTERS: Registry[type[Any]] = Registry("model family")


def built_in() -> tuple[str, ...]:
    """Names of the families of this library; none is imported."""
    found = iter_modules(import_module(GROUP).__path__)
    return tuple(module.name for module in found if module.name != "common")


#: entry points that were loaded already, or could not be: (name, value) → the error, if any
_seen: dict[tuple[str, str], Exception | None] = {}


def plugins() -> dict[str, EntryPoint]:
    """Entry points of the group by name; nothing is imported."""
    return dict(_installed(tuple(sys.path)))


@functools.cache
def _installed(_path: tuple[str, ...]) -> dict[str, EntryPoint]:
    """Reading the metadata of all packages takes milliseconds, and every ``wrap`` asks."""
    return {point.name: point for point in entry_points(group=GROUP)}


def load_plugin(point: EntryPoint) -> Exception | None:
    """Import what an entry point names, once; the error where that fails, after a warning."""
    key = (point.name, point.value)
    if key not in _seen:
        _seen[key] = None
        try:
            point.load()
        except Exception as error:  # noqa: BLE001  another package's import may raise anything
            _seen[key] = error
            package = point.dist.name if point.dist is not None else "an unknown package"
            warnings.warn(
                f"the adapter {point.name!r} of {package} ({point.value}) cannot be imported and "
                f"is left out: {said(error)}",
                stacklevel=3,
            )
    return _seen[key]


def said(error: BaseException) -> str:
    """An error in one line, for messages about others; what transformers hides is said beside it:
    torch and torchvision of two builds, with which none of its models can be imported."""
    text, inner = f"{type(error).__name__}: {error}", error
    while (inner := inner.__cause__ or inner.__context__) is not None:  # type: ignore[assignment]
        if "operator torchvision::" in str(inner):
            return (
                f"{text} ({inner}: torch and torchvision are of two builds; install both from one "
                "place, or uninstall torchvision, which is not needed)"
            )
    return text


# -- what captum-dcam models lists -----------------------------------------------------------------


#: which calls of a generation hold the image, by what is cached
FEASIBLE = {"prefix": "the prefill (1 of S + 1 calls)", "none": "every step (S of S calls)"}


def list_models() -> list[dict[str, Any]]:
    r"""One record per family, JSON-able; no model is loaded.

    Returns:
        list of dict: ``family``, ``class``, ``caches``, ``feasible`` (cache → calls),
        ``checkpoints`` (name and depths of each), ``transformers``, ``package``, ``install``,
        ``installed``, ``remote_code``, ``decodings`` (name → settings), ``notes``, ``error``, and
        the first checkpoint's ``blocks``, ``deepest_usable_block`` and ``recommended_block`` (None
        where none is known).
        A family that cannot be imported has no caches, and the reason as ``error`` and note.
    """
    known = [_declared(name) for name in built_in()]
    for point in plugins().values():
        load_plugin(point)
    others = [_record(n, c, _path(c)) for n, c in ADAPTERS.items() if n not in built_in()]
    return sorted(known + others, key=lambda record: record["family"])


def _declared(name: str) -> dict[str, Any]:
    """The record of a family of this library: of a folder its ``facts`` alone are imported."""
    try:
        place = import_module(f"{GROUP}.{name}")
        if not hasattr(place, "__path__"):
            return _record(name, ADAPTERS[name], _path(ADAPTERS[name]))
        import_module(f"{place.__name__}.facts")
    except Exception as error:  # noqa: BLE001  a family of one file may import anything
        return _missing(name, said(error))
    return _record(name, FAMILIES[name], f"{place.__name__}.{place.__all__[0]}")


def _path(cls: type) -> str:
    return f"{cls.__module__}.{cls.__qualname__}"


def _record(name: str, cls: type[ModelFamily], place: str) -> dict[str, Any]:
    facts = cls.facts or FamilyFacts()
    checkpoints = [_depths(c) for c in facts.checkpoints]
    first = checkpoints[0] if checkpoints else dict.fromkeys(("name", *_DEPTHS))
    return {
        "family": name,
        "class": place,
        "caches": list(cls.caches),
        "feasible": {r: facts.feasible or FEASIBLE[r] for r in cls.caches},
        "default_checkpoint": first["name"],
        **{key: first[key] for key in _DEPTHS},
        "checkpoints": checkpoints,
        "batches": cls.batches,
        "several_images": cls.several_images,
        "video": bool(cls.takes_video),
        "transformers": facts.transformers,
        "package": facts.package,
        "install": facts.install,
        "installed": facts.package is None or importable(facts.package),
        "remote_code": facts.remote_code,
        "decodings": {n: dict(own) for n, own in facts.decodings.items()},
        "notes": list(facts.notes),
        "error": None,
    }


def _missing(name: str, error: str) -> dict[str, Any]:
    """The record of a family that cannot be imported: as of a family of which nothing is known."""

    class Unknown(ModelFamily):
        caches, batches, several_images = (), False, False
        facts = FamilyFacts(transformers="", notes=(f"cannot be imported: {error}",))

    return {**_record(name, Unknown, f"{GROUP}.{name}"), "installed": False, "error": error}


_DEPTHS = ("blocks", "deepest_usable_block", "recommended_block")


def _depths(checkpoint: Checkpoint) -> dict[str, Any]:
    depths = (checkpoint.blocks, checkpoint.deepest_block, checkpoint.recommended_block)
    return {"name": checkpoint.name, **dict(zip(_DEPTHS, depths, strict=True))}
