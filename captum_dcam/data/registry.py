r"""Data sets by name: ``dataset("coco", root, split="val2014", limit=100)``."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from captum_dcam.data.common import Dataset, Sample
from captum_dcam.errors import InputError, SettingError, UnknownNameError, near

#: name → the function that opens it
DATASETS: dict[str, Callable[..., Dataset[Sample]]] = {}
F = TypeVar("F", bound=Callable[..., Dataset[Sample]])


def register_dataset(name: str) -> Callable[[F], F]:
    r"""Decorator: enter the function that opens a data set; refuses to overwrite another."""

    def enter(opener: F) -> F:
        owner: Any = DATASETS.get(name, opener)
        mine: Any = opener
        if (owner.__module__, owner.__qualname__) != (mine.__module__, mine.__qualname__):
            raise InputError(
                f"data set {name!r} belongs to {owner.__module__}.{owner.__qualname__} already: "
                "choose another name"
            )
        DATASETS[name] = opener
        return opener

    return enter


def dataset(name: str, root: str | Path | None = None, **options: Any) -> Dataset[Sample]:
    r"""Open a data set.

    Args:
        name (str): one of :func:`dataset_names`.
        root (path): the folder with its files; ``scenes`` has none.
        **options: those of the function registered under the name. All take ``prompt``; all that
            have files take ``ids``, ``limit`` and ``missing``.

    Raises:
        UnknownNameError: no such name, with near ones.
        SettingError: an option it does not have, with those it has; a root too many or too few.
        FileNotFoundError: files are missing; the message lists what is expected where.
    """
    if name not in DATASETS:
        raise UnknownNameError(f"unknown data set {name!r}{near(name, DATASETS)}")
    opener = DATASETS[name]
    known = dict(inspect.signature(opener).parameters)
    rooted = known.pop("root", None) is not None
    unknown = sorted(options.keys() - known.keys())
    if unknown:
        raise SettingError(
            f"data set {name!r} has no option {', '.join(map(repr, unknown))}; it has "
            f"{', '.join(known)}"
        )
    if rooted and root is None:
        raise SettingError(f"data set {name!r} needs root: the folder that holds its files")
    if not rooted and root is not None:
        raise SettingError(f"data set {name!r} takes no root: it has no files; root is {root!r}")
    return opener(root, **options) if rooted else opener(**options)


def dataset_names() -> tuple[str, ...]:
    r"""All registered names, sorted."""
    return tuple(sorted(DATASETS))
