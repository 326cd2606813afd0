"""Packages that may be missing, and imports when a name is first used.

The core needs the packages that ``pip install captum-dcam`` brings. What only some users need comes
with an extra, is imported by :func:`needed` where it is used, and is named in the one error that
tells how to install it.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable, Collection, Mapping
from importlib import import_module
from types import ModuleType
from typing import Any

from captum_dcam.errors import MissingPackageError

#: module → the extra of this library that brings it
EXTRAS = {
    "accelerate": "large",
    "pycocotools": "data",
    "pytorch_grad_cam": "grad-cam",
    "skimage": "eval",
    "sklearn": "eval",
    "tabulate": "eval",
}
#: module → what else its users must know
ADVICE = {
    "pytorch_grad_cam": "it needs torchvision, and torch and torchvision must come from the same "
    "source (a CPU-only torch beside a CUDA torchvision does not load)"
}


def needed(module: str, purpose: str) -> ModuleType:
    r"""Import a module of a package that an extra brings.

    Args:
        module (str): ``"pycocotools.mask"``; its package is a key of :data:`EXTRAS`.
        purpose (str): what needs it, for the message: ``"the data set coco"``.

    Raises:
        MissingPackageError: it is not installed, or does not load; says how to install it.
    """
    package = module.partition(".")[0]
    try:
        return import_module(module)
    except (ImportError, RuntimeError, OSError) as error:  # torchvision raises all of them
        advice = f"; {ADVICE[package]}" if package in ADVICE else ""
        raise MissingPackageError(
            f"{purpose} needs the package {package}, which cannot be imported ({error}): "
            f"pip install 'captum-dcam[{EXTRAS[package]}]'{advice}"
        ) from error


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
