"""Other packages and one's own modules: whether one is there, and imports when first used."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable, Collection, Mapping
from importlib import import_module
from typing import Any


def importable(package: str) -> bool:
    """Whether a top-level package is there; it is not imported."""
    if package in sys.modules:
        return sys.modules[package] is not None
    return importlib.util.find_spec(package) is not None


def lazily(package: str, homes: Mapping[str, Collection[str]]) -> Callable[[str], Any]:
    """The ``__getattr__`` of a package (PEP 562) whose names are imported when first used.

    Args:
        package (str): its ``__name__``.
        homes (mapping): module in it → names that this module defines.
    """

    def get(name: str) -> Any:
        for home, names in homes.items():
            if name in names:
                value = getattr(import_module(f"{package}.{home}"), name)
                setattr(sys.modules[package], name, value)
                return value
        raise AttributeError(f"module {package!r} has no attribute {name!r}")

    return get
