r"""COCO's format: photographs, instance masks and captions (2014, 2017, and files like them).

pycocotools does the masks. The index is made here: pycocotools prints while it makes its own, and
passes over duplicate and dangling ids. :func:`write_coco` is the way back.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from captum_dcam.data.coco_tables import (
    Mask,
    annotation_files,
    by_id,
    by_image,
    check_categories,
    check_images,
    decode,
    listed_rows,
    mask_engine,
    read_captions,
    read_table,
)
from captum_dcam.data.coco_writer import ObjectLike, SceneLike, write_coco
from captum_dcam.data.common import BaseDataset, ImageId, Ledger, ObjectMask, Sample
from captum_dcam.data.files import expect, select
from captum_dcam.data.registry import register_dataset
from captum_dcam.errors import MissingFileError
from captum_dcam.files import Record

__all__ = [
    "CocoDataset",
    "CocoInstance",
    "CocoSample",
    "ObjectLike",
    "SceneLike",
    "open_coco",
    "write_coco",
]

#: TAM's public evaluation asks so of COCO Caption
PROMPT = "Write a one-sentence caption for this image:"
#: categories that people call otherwise; TAM's evaluation goes by these two
ALIASES = {"sports ball": ("ball",), "wine glass": ("glass",)}
#: splits of COCO 2014's val whose images and captions are val's
_PARENTS = {"minival2014": "val2014", "valminusminival2014": "val2014"}


class CocoInstance(NamedTuple):
    r"""One annotated object, or one crowd of them (``is_crowd``), with its mask (H, W) bool."""

    annotation_id: int
    category: str
    mask: Mask
    is_crowd: bool


@dataclass(frozen=True, eq=False, kw_only=True)
class CocoSample(Sample):
    r"""One photograph; its objects are categories: unions of their instances and crowds.

    Attributes:
        license (str or None): name and address of the image's licence.
        attribution (str or None): the address of the original, at Flickr or COCO.
        extra (dict): what :func:`write_coco` was given as ``extra``; else empty.
    """

    file_name: str
    license: str | None
    attribution: str | None
    _annotations: list[tuple[str, Record]] = field(repr=False)

    @property
    def categories(self) -> list[str]:
        r"""The names that occur, each once, in the order of the annotations."""
        return [item.name for item in self.objects]

    def instance_masks(self) -> list[CocoInstance]:
        r"""Every instance and crowd, in the order of the annotations; raises as :meth:`masks`."""
        size = (self.height, self.width)
        return [
            CocoInstance(row["id"], name, decode(row, size), bool(row.get("iscrowd", 0)))
            for name, row in self._annotations
        ]


def union(rows: list[Record], size: tuple[int, int]) -> Mask:
    r"""All pixels (H, W) of some annotations."""
    whole = np.zeros(size, dtype=bool)
    for row in rows:
        whole |= decode(row, size)
    return whole


class CocoDataset(BaseDataset[CocoSample]):
    r"""The :class:`CocoSample` of a split, in the order of their ids; no picture is opened early.

    Args:
        images_dir (path): the folder that file names count from.
        instances_json (path): COCO's ``instances_*.json``.
        captions_json (path or None): COCO's ``captions_*.json``. Default: no captions.
        ids (path or iterable): the images to use, or a file of their ids. Default: all
        limit (int): only the first so many, in the order of their ids. Default: no limit
        missing (str): ``"raise"`` what is missing or damaged, or ``"skip"`` and record it.
        prompt (str): what to ask of every image.

    Raises:
        ImportError: pycocotools is not installed.
        FileNotFoundError: a folder or file is not there.
        ValueError: not COCO's format, an id used twice, an unknown image or category.
    """

    name = "coco"
    kind = "category"

    def __init__(
        self,
        images_dir: str | Path,
        instances_json: str | Path,
        captions_json: str | Path | None = None,
        *,
        ids: str | Path | Iterable[Any] | None = None,
        limit: int | None = None,
        missing: str = "raise",
        prompt: str | None = PROMPT,
    ) -> None:
        mask_engine()  # better missed now than at the first mask
        report = Ledger(missing)
        self.images_dir, source = Path(images_dir), Path(instances_json)
        if not self.images_dir.is_dir():
            raise MissingFileError(f"{self.images_dir} is no folder: expected the images there")
        table, digest = read_table(source, "images", "annotations", "categories")
        images = by_id(table, "images", ("file_name", "height", "width"), source, report)
        check_images(images.values(), source, report)
        self._categories = by_id(table, "categories", ("name",), source)
        fields = ("image_id", "category_id")
        annotations = by_image(table, fields, set(images), source, report)
        self._licenses = {row["id"]: row for row in listed_rows(table, "licenses")}
        check_categories(self._categories, annotations, source, report)
        captions: dict[Any, list[Record]] = {}
        if captions_json is not None:
            captions, more = read_captions(Path(captions_json), set(images), report)
            digest += more
        chosen = select(images, ids, limit, report)
        # Only what was selected stays in memory.
        self._images = {one: images[one] for one in chosen}
        self._annotations = {one: annotations.get(one, []) for one in chosen}
        self._captions = {one: captions.get(one, []) for one in chosen}
        self._prompt = prompt
        super().__init__(
            chosen, report, {"file": source.name, "annotations": digest, "prompt": prompt}
        )

    @classmethod
    def open(cls, root: str | Path, split: str, **options: Any) -> CocoDataset:
        r"""Finds the parts of a split, such as ``"val2017"``, in COCO's usual layout.

        Annotations: ``annotations/instances_<split>.json``, perhaps ``captions_<split>.json``.
        Images: the first of ``<split>/``, ``images/<split>/`` and ``images/`` that is there.
        ``minival2014`` and ``valminusminival2014`` share images and captions with ``val2014``.

        Raises:
            FileNotFoundError: a part is missing; the message lists what was expected, and where.
        """
        root = Path(root)
        splits = [split, *([_PARENTS[split]] if split in _PARENTS else [])]
        folders = [folder / one for one in splits for folder in (root, root / "images")]
        instances = annotation_files(root, split)[0]
        captions = [annotation_files(root, one)[1] for one in splits]
        here = sorted(path.name for path in instances.parent.glob("instances_*.json"))
        _, images = expect(
            f"COCO split {split!r}",
            root,
            [("annotations", [instances]), ("the images", [*folders, root / "images"])],
            f"; captions, if any, in {' or '.join(map(str, captions))}. "
            f"Here: {', '.join(here) or 'no instances at all'}",
        )
        texts = next((path for path in captions if path.is_file()), None)
        return cls(images, instances, texts, **options)

    def _sample(self, image_id: ImageId) -> CocoSample:
        row = self._images[image_id]
        size = (row["height"], row["width"])
        rows: dict[str, list[Record]] = {}
        found = []
        for one in self._annotations[image_id]:
            name = self._categories[one["category_id"]]["name"]
            rows.setdefault(name, []).append(one)
            found.append((name, one))
        kind = row.get("license")
        terms = self._licenses.get(kind) if isinstance(kind, (int, str)) else None
        return CocoSample(
            image_id=image_id,
            path=self.images_dir / row["file_name"],
            file_name=row["file_name"],
            height=size[0],
            width=size[1],
            captions=[r["caption"] for r in self._captions[image_id]],
            prompt=self._prompt,
            objects=tuple(
                ObjectMask(name, (name, *ALIASES.get(name, ())), partial(union, some, size))
                for name, some in rows.items()
            ),
            license=f"{terms.get('name')} ({terms.get('url')})" if terms else None,
            attribution=row.get("flickr_url") or row.get("coco_url"),
            extra=dict(row.get("extra") or {}),
            _annotations=found,
        )


@register_dataset("coco")
def open_coco(
    root: str | Path,
    split: str = "val2014",
    *,
    ids: str | Path | Iterable[Any] | None = None,
    limit: int | None = None,
    missing: str = "raise",
    prompt: str | None = PROMPT,
) -> CocoDataset:
    r"""COCO 2014 or 2017 in its official layout; see :meth:`CocoDataset.open` for files.

    The 5,000 images of "minival" are either ``split="minival2014"`` with its own annotation file,
    or ``split="val2014"`` with ``ids`` naming a file of their ids.
    """
    return CocoDataset.open(root, split, ids=ids, limit=limit, missing=missing, prompt=prompt)
