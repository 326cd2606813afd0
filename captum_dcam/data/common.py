r"""What every data set gives: samples with an image, texts and named masks, read when asked for.

Nothing that was read is kept: memory stays flat over thousands of images. What is missing or
damaged is an error that names its image, or is recorded and left out: never silent.
:func:`dataset` opens one by name: ``dataset("coco", root, split="val2014", limit=100)``.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from operator import index as as_index
from pathlib import Path
from typing import Any, ClassVar, Generic, NamedTuple, Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from captum_dcam.data.files import read_image, select
from captum_dcam.errors import InputError, SettingError, UnknownNameError
from captum_dcam.files import digest
from captum_dcam.registry import Registry

Mask = NDArray[np.bool_]
ImageId = int | str
Setting = str | int | float | bool | None
#: what a span's label says of what the image shows
LABELS = ("true", "invented")
#: what to do about something missing or damaged
MISSING = ("raise", "skip")


class DataProblem(NamedTuple):
    r"""Why an image was left out, or an annotation of an image that is not listed (with its id)."""

    image_id: ImageId | None
    reason: str


@dataclass(frozen=True, eq=False)
class ObjectMask:
    r"""Everything in an image that goes by one name.

    Args:
        name (str): as the data set has it.
        names (tuple of str): ways to say it in a text, ``name`` first.
        read (callable): the mask (H, W) bool, decoded anew at every call.
    """

    name: str
    names: tuple[str, ...]
    read: Callable[[], Mask] = field(repr=False)

    def mask(self) -> Mask:
        r"""(H, W) bool; raises OSError or ValueError when it is missing or damaged."""
        return self.read()


@dataclass(frozen=True, eq=False)
class Span:
    r"""A part of a text.

    Args:
        start, stop (int): its characters, ``text[start:stop]``.
        text (str): what they are.
        label (str or None): ``"true"``, ``"invented"``, or None: the data set does not say.
        kind (str or None): the data set's word for what it is, or for what is wrong with it.
        read (callable or None): where it lies, (H, W) bool, decoded anew at every call; None: the
            data set does not say.
    """

    start: int
    stop: int
    text: str
    label: str | None = None
    kind: str | None = None
    read: Callable[[], Mask] | None = field(default=None, repr=False)


@dataclass(frozen=True, eq=False, kw_only=True)
class Sample:
    r"""One image: what is known of it, and its pixels and masks when asked for.

    Attributes:
        image_id (int or str): unique in its data set.
        path (Path or None): of the image; None: made, not stored.
        height, width (int): of the image and of every mask, in pixels.
        captions (list of str): reference texts; may be empty.
        prompt (str or None): what to ask the model.
        objects (tuple of ObjectMask): each name once.
        extra (dict): what else the data set says.
    """

    image_id: ImageId
    path: Path | None
    height: int
    width: int
    captions: list[str]
    prompt: str | None
    objects: tuple[ObjectMask, ...] = field(repr=False)
    extra: dict[str, Any] = field(default_factory=dict)

    def image(self) -> Image.Image:
        r"""The pixels as RGB, not turned by EXIF: masks fit the pixels as they are stored.

        Raises:
            FileNotFoundError: no such file.
            OSError: a file that cannot be decoded to its end.
            ValueError: another size than the annotations say.
        """
        if self.path is None:
            raise NotImplementedError(f"image {self.image_id} has no file: override image()")
        return read_image(self.path, self.image_id, (self.height, self.width))

    def masks(self) -> dict[str, Mask]:
        r"""Name → mask (H, W) bool, all decoded now.

        Raises:
            OSError, ValueError: one that is missing, damaged, or of another size.
        """
        return {item.name: item.mask() for item in self.objects}

    def judged(self, answer: str) -> tuple[Span, ...]:
        r"""The parts of an answer of which the data set knows whether they are so, labelled.

        Raises:
            InputError: the data set says nothing of it.
        """
        raise InputError(
            f"image {self.image_id}: its data set does not say which words are true: use degraded, "
            "coco, repope or halloc, or spans with labels"
        )

    def check(self) -> None:
        r"""Decodes everything once and keeps nothing; raises as :meth:`image` and :meth:`masks`."""
        self.image()
        for name, mask in self.masks().items():
            if mask.shape != (self.height, self.width) or mask.dtype != bool:
                raise InputError(
                    f"image {self.image_id}: the mask of {name!r} is {mask.dtype} {mask.shape}, "
                    f"the image {self.height, self.width} (H, W)"
                )


@dataclass(frozen=True)
class LabelImage:
    r"""An image in which every pixel holds the number of its object.

    Args:
        path (Path): of its file.
        image_id (int or str): of the image that it labels.
        size (tuple of int): (H, W) of that image.
        read (callable): the numbers (H, W) of the file.
    """

    path: Path
    image_id: ImageId
    size: tuple[int, int]
    read: Callable[[Path, object], NDArray[np.int64]]

    def numbers(self) -> NDArray[np.int64]:
        r"""The numbers (H, W), checked against the size of the image."""
        numbers = self.read(self.path, self.image_id)
        if numbers.shape != self.size:
            raise InputError(
                f"image {self.image_id}: {self.path} is {numbers.shape}, the image {self.size} "
                f"(H, W)"
            )
        return numbers

    def mask(
        self, name: str, marks: tuple[int, ...], numbers: NDArray[np.int64] | None = None
    ) -> Mask:
        r"""The pixels of one object, whose ``marks`` must all occur. Default: decoded anew"""
        numbers = self.numbers() if numbers is None else numbers
        if lacking := sorted(set(marks) - set(np.unique(numbers).tolist())):
            raise InputError(
                f"image {self.image_id}: {self.path} has no pixel of label {lacking}, which is "
                f"{name!r}"
            )
        return np.isin(numbers, marks)

    def objects(
        self, numbers: Mapping[str, tuple[int, ...]], names: Callable[[str], tuple[str, ...]]
    ) -> tuple[ObjectMask, ...]:
        r"""The objects of a sample, in the order of ``numbers``."""
        return tuple(
            ObjectMask(name, names(name), partial(self.mask, name, marks))
            for name, marks in numbers.items()
        )


@dataclass(frozen=True, eq=False, kw_only=True)
class LabelledSample(Sample):
    r"""A sample whose masks share one label image.

    Attributes:
        labels (LabelImage): the label image.
        numbers (dict): name → the numbers that mark it.
    """

    labels: LabelImage
    numbers: dict[str, tuple[int, ...]]

    def masks(self) -> dict[str, Mask]:
        r"""As :meth:`Sample.masks`; the label image is decoded once."""
        labels = self.labels.numbers() if self.numbers else None
        return {name: self.labels.mask(name, some, labels) for name, some in self.numbers.items()}


S = TypeVar("S", bound=Sample)
SampleT = TypeVar("SampleT", bound=Sample, covariant=True)


class Dataset(Protocol[SampleT]):
    r"""What an evaluation asks of a data set; :class:`BaseDataset` does most of it."""

    name: ClassVar[str]
    kind: str

    @property
    def ids(self) -> tuple[ImageId, ...]: ...
    @property
    def settings(self) -> tuple[tuple[str, Setting], ...]: ...
    @property
    def problems(self) -> tuple[DataProblem, ...]: ...
    def __len__(self) -> int: ...
    def __iter__(self) -> Iterator[SampleT]: ...
    def sample(self, image_id: ImageId) -> SampleT: ...
    def samples(self, ids: Iterable[ImageId] | None = None) -> Iterator[SampleT]: ...
    def describe(self) -> dict[str, Any]: ...


class Ledger:
    r"""Takes problems: raises them, or records each of them once.

    Args:
        missing (str): ``"raise"`` or ``"skip"``.
    """

    def __init__(self, missing: str) -> None:
        if missing not in MISSING:
            raise InputError(f"missing is {missing!r}: expected one of {', '.join(MISSING)}")
        self.skips = missing == "skip"
        self._found: dict[DataProblem, None] = {}
        self._first: dict[ImageId, str] = {}

    def __call__(self, image_id: ImageId | None, reason: str) -> None:
        if not self.skips:
            raise InputError(reason)
        self._found.setdefault(DataProblem(image_id, reason))
        if image_id is not None:
            self._first.setdefault(image_id, reason)

    @property
    def problems(self) -> tuple[DataProblem, ...]:
        return tuple(self._found)

    def reason(self, image_id: ImageId) -> str | None:
        r"""The first problem of an image."""
        return self._first.get(image_id)


class BaseDataset(ABC, Generic[S]):
    r"""A data set with its images in the order of their ids.

    ``len`` and ``ids`` count what is listed. With ``missing="skip"`` iteration leaves out what is
    missing or damaged, and ``problems`` says what that was. An image with one damaged mask is left
    out as a whole: half of its ground truth would give wrong scores.

    Attributes:
        name (str): in the registry.
        ids (tuple): of the images, in their order.
        kind (str): what names are: ``"category"`` of a fixed list, ``"phrase"`` of the caption, or
            ``"free"``, the user's own.
        settings (tuple of pairs): what a sample's content depends on, wherever the files lie and
            whichever ids are selected: JSON-able, hashable, a key for stored results.
    """

    name: ClassVar[str] = ""
    kind: str = "category"

    def __init__(
        self, ids: Sequence[ImageId], ledger: Ledger, settings: Mapping[str, Setting]
    ) -> None:
        self.ids = tuple(ids)
        self.settings = tuple(sorted(settings.items()))
        self._known = frozenset(ids)
        self._ledger = ledger

    @property
    def problems(self) -> tuple[DataProblem, ...]:
        r"""What has been left out up to now, and why; empty with ``missing="raise"``."""
        return self._ledger.problems

    def describe(self) -> dict[str, Any]:
        r"""A JSON-able record: name, settings, and how many and which images are selected."""
        listed = digest("\n".join(map(repr, self.ids)))[:16]
        return {"name": self.name, **dict(self.settings), "images": len(self), "ids": listed}

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> S:
        return self.sample(self.ids[as_index(index)])

    def __iter__(self) -> Iterator[S]:
        return self.samples()

    def sample(self, image_id: ImageId) -> S:
        r"""One sample by its id; its image and masks are not read yet.

        Raises:
            UnknownNameError: no such id.
            OSError, ValueError: its annotation is missing or damaged, whatever ``missing`` is.
        """
        if image_id not in self._known:
            ends = f"{self.ids[0]!r} to {self.ids[-1]!r}" if self.ids else "none"
            raise UnknownNameError(f"no image {image_id!r} among the {len(self)} ids ({ends})")
        reason = self._ledger.reason(image_id)
        if reason is not None:
            raise InputError(reason)
        return self._sample(image_id)

    def samples(self, ids: Iterable[ImageId] | None = None) -> Iterator[S]:
        r"""Samples in the order of ``ids``, a shard of this data set's own; default: all.

        With ``missing="skip"`` every sample is read completely before it is given.
        """
        for image_id in self.ids if ids is None else ids:
            try:
                sample = self.sample(image_id)
                if self._ledger.skips:
                    sample.check()
            except (OSError, ValueError) as error:
                if not self._ledger.skips:
                    raise
                if self._ledger.reason(image_id) is None:
                    self._ledger(image_id, str(error))
                continue
            yield sample

    @abstractmethod
    def _sample(self, image_id: ImageId) -> S: ...


class ListedDataset(BaseDataset[S]):
    r"""A data set whose files list its images; the rows of those selected stay in memory.

    Args:
        rows (mapping): id → what the files say of an image.
        ledger (Ledger): has the problems found up to now.
        settings (mapping): as :class:`BaseDataset`, without the prompt.
        ids, limit, prompt: as :class:`~captum_dcam.data.coco.CocoDataset`.
    """

    def __init__(
        self,
        rows: Mapping[Any, Any],
        ledger: Ledger,
        settings: Mapping[str, Setting],
        *,
        ids: str | Path | Iterable[Any] | None,
        limit: int | None,
        prompt: str | None,
    ) -> None:
        self._rows = {one: rows[one] for one in select(rows, ids, limit, ledger)}
        self._prompt = prompt
        super().__init__(list(self._rows), ledger, {**settings, "prompt": prompt})


#: name → the class, or the function, that opens it
DATASETS: Registry[Callable[..., Dataset[Sample]]] = Registry("data set")
register_dataset = DATASETS.register
dataset_names = DATASETS.names


def dataset(name: str, root: str | Path | None = None, **options: Any) -> Dataset[Sample]:
    r"""Open a data set.

    Args:
        name (str): one of :func:`dataset_names`.
        root (path): the folder with its files; ``scenes`` has none.
        **options: those of what is registered under the name. All take ``prompt``; all that
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
