r"""Data sets by name: ``dataset("coco", root, split="val2014", limit=100)``."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from captum_dcam.data.common import Dataset, Sample
from captum_dcam.errors import SettingError
from captum_dcam.registry import Registry

#: name → the function that opens it
DATASETS: Registry[Callable[..., Dataset[Sample]]] = Registry("data set")
register_dataset = DATASETS.register
dataset_names = DATASETS.names


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
    DATASETS.check(name, options)
    rooted = "root" in DATASETS.settings(name)
    if rooted and root is None:
        raise SettingError(f"data set {name!r} needs root: the folder that holds its files")
    if not rooted and root is not None:
        raise SettingError(f"data set {name!r} takes no root: it has no files; root is {root!r}")
    opened: Dataset[Sample] = DATASETS.get(name, **({"root": root} if rooted else {}), **options)
    return opened
