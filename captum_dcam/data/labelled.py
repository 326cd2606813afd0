r"""Samples whose masks share one label picture: every pixel holds the number of its object."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from captum_dcam.data.common import ImageId, Mask, ObjectMask, Sample
from captum_dcam.errors import InputError

ReadLabels = Callable[[Path, object], NDArray[np.int64]]


def labels_of(
    read: ReadLabels, path: Path, image_id: ImageId, size: tuple[int, int]
) -> NDArray[np.int64]:
    r"""The label picture (H, W), checked against the size of its image."""
    labels = read(path, image_id)
    if labels.shape != size:
        raise InputError(f"image {image_id}: {path} is {labels.shape}, the picture {size} (H, W)")
    return labels


def pick(labels: NDArray[np.int64], numbers: tuple[int, ...], name: str, where: str) -> Mask:
    r"""The pixels that hold one of these numbers; all of them must occur."""
    lacking = sorted(set(numbers) - set(np.unique(labels).tolist()))
    if lacking:
        raise InputError(f"{where} has no pixel of label {lacking}, which is {name!r}")
    return np.isin(labels, numbers)


def read_mask(
    read: ReadLabels,
    path: Path,
    image_id: ImageId,
    size: tuple[int, int],
    numbers: tuple[int, ...],
    name: str,
) -> Mask:
    r"""One object's mask alone."""
    labels = labels_of(read, path, image_id, size)
    return pick(labels, numbers, name, f"image {image_id}: {path}")


@dataclass(frozen=True, eq=False, kw_only=True)
class LabelledSample(Sample):
    r"""A sample with a label picture.

    Attributes:
        label_path (Path): of the label picture.
        numbers (dict): name → the numbers that mark it.
    """

    label_path: Path
    numbers: dict[str, tuple[int, ...]]
    _read: ReadLabels = field(repr=False)

    def masks(self) -> dict[str, Mask]:
        r"""As :meth:`Sample.masks`; the label picture is decoded once."""
        if not self.objects:
            return {}
        size = (self.height, self.width)
        labels = labels_of(self._read, self.label_path, self.image_id, size)
        where = f"image {self.image_id}: {self.label_path}"
        return {name: pick(labels, some, name, where) for name, some in self.numbers.items()}


def label_objects(
    read: ReadLabels,
    path: Path,
    image_id: ImageId,
    size: tuple[int, int],
    numbers: Mapping[str, tuple[int, ...]],
    names: Callable[[str], tuple[str, ...]],
) -> tuple[ObjectMask, ...]:
    r"""The objects of a label picture, in the order of ``numbers``."""
    return tuple(
        ObjectMask(name, names(name), partial(read_mask, read, path, image_id, size, some, name))
        for name, some in numbers.items()
    )
