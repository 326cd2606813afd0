r"""Your own images: a folder of them, a folder of masks, and perhaps two-column tables.

::

    images/dog.jpg
    masks/dog__brown_dog.png     the image's stem, two underscores, the name (_ is a blank)
    masks/dog__ball__2.png       a number after it: one more part of "ball"
    captions.csv                 optional, with the header image,caption; an image may recur
    masks.csv                    optional, with the header image,mask,name or image,mask: for masks
                                 named otherwise; the name is the third column or the mask's stem

Masks are PNG files of the image's size as it is seen (upright), non-zero where the object is.
Files whose names begin with a dot are passed over.
"""

from __future__ import annotations

import csv
import re
from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from captum_dcam.data.common import (
    BaseDataset,
    ImageId,
    Ledger,
    ListedDataset,
    Mask,
    ObjectMask,
    Sample,
    register_dataset,
)
from captum_dcam.data.files import expect, grey_labels, inside, read_image, stored_size
from captum_dcam.errors import InputError
from captum_dcam.files import digest, reading
from captum_dcam.model.images import hidden, images_in


class Part(NamedTuple):
    r"""One mask file, and the name of what it shows."""

    path: Path
    name: str


@dataclass(frozen=True, eq=False, kw_only=True)
class FolderSample(Sample):
    r"""An image of the user's own, turned upright as its EXIF data say."""

    def image(self) -> Image.Image:
        assert self.path is not None
        return read_image(self.path, self.image_id, upright=True)


def read_parts(paths: tuple[Path, ...], image_id: ImageId, size: tuple[int, int]) -> Mask:
    r"""The union (H, W) of mask files, each checked."""
    whole = np.zeros(size, dtype=bool)
    for path in paths:
        mask = grey_labels(path, image_id) != 0
        if mask.shape != size:
            raise InputError(
                f"image {image_id}: {path} is {mask.shape}, the upright image {size} (H, W)"
            )
        if not mask.any():
            raise InputError(f"image {image_id}: {path} is empty: leave out what is not seen")
        whole |= mask
    return whole


@register_dataset("folder")
class FolderDataset(ListedDataset[FolderSample]):
    r"""Images and masks in plain files, in the order of the images' stems, which are the ids.

    Args:
        root (path): the folder that holds ``images/`` and ``masks/``.
        ids, limit, missing, prompt: as :class:`~captum_dcam.data.coco.CocoDataset`.

    Raises:
        FileNotFoundError: a folder is missing, or ``images/`` has no images.
        ValueError: a mask or a line that belongs to no image, two images with one stem.
    """

    name = "folder"
    kind = "free"

    def __init__(
        self,
        root: str | Path,
        *,
        ids: str | Path | Iterable[Any] | None = None,
        limit: int | None = None,
        missing: str = "raise",
        prompt: str | None = None,
    ) -> None:
        report = Ledger(missing)
        root = Path(root)
        table, texts = root / "masks.csv", root / "captions.csv"
        expected = [("images", [root / "images"]), ("masks", [root / "masks", table])]
        images, _ = expect("folder of images and masks", root, expected)
        self._paths: dict[Any, Path] = {}
        for path in images_in(images):
            if path.stem in self._paths:
                other = self._paths[path.stem].name
                report(path.stem, f"image {path.stem}: {other} and {path.name} share a stem")
            self._paths.setdefault(path.stem, path)
        parts = self._table(table, report) if table.is_file() else self._named(root, report)
        captions: dict[Any, list[str]] = {}
        if texts.is_file():
            for image_id, row, _ in self._lines(texts, "caption", report):
                captions.setdefault(image_id, []).append(row["caption"])
        rows = {
            one: (path, parts.get(one, []), captions.get(one, []))
            for one, path in self._paths.items()
        }
        settings = {"annotations": _digest(parts, captions)}
        super().__init__(rows, report, settings, ids=ids, limit=limit, prompt=prompt)

    def _named(self, root: Path, report: Ledger) -> dict[Any, list[Part]]:
        r"""Masks by their own names."""
        found: dict[Any, list[Part]] = {}
        for path in sorted(p for p in (root / "masks").glob("*.png") if not hidden(p)):
            stems = [path.stem[: cut.start()] for cut in re.finditer("__", path.stem)]
            owner = next((stem for stem in reversed(stems) if stem in self._paths), "")
            name = re.sub(r"__\d+$", "", path.stem[len(owner) + 2 :]).replace("_", " ").strip()
            if owner and name:
                found.setdefault(owner, []).append(Part(path, name))
            else:
                report(
                    path.stem,
                    f"{path} belongs to no image: expected <image's stem>__<name>.png with an "
                    f"image of that stem in {root / 'images'}",
                )
        return found

    def _table(self, source: Path, report: Ledger) -> dict[Any, list[Part]]:
        r"""Masks by a table."""
        found: dict[Any, list[Part]] = {}
        for image_id, row, where in self._lines(source, "mask", report):
            if not inside(row["mask"]):
                report(image_id, f"{where}: {row['mask']!r} is no path inside {source.parent}")
                continue
            path = source.parent / row["mask"]
            name = (row.get("name") or path.stem.replace("_", " ")).strip()
            found.setdefault(image_id, []).append(Part(path, name))
        return found

    def _lines(
        self, source: Path, column: str, report: Ledger
    ) -> list[tuple[str, dict[str, str], str]]:
        r"""(image id, row, place) of a table with the columns ``image`` and ``column``."""
        out = []
        try:
            with reading(source), source.open(encoding="utf-8-sig", newline="") as file:
                reader = csv.DictReader(file)
                header = reader.fieldnames or []
                if not {"image", column} <= set(header):
                    raise InputError(f"the header is {list(header)}: expected image,{column}")
                for row in reader:
                    where = f"{source}, line {reader.line_num}"
                    image = row["image"] or ""
                    known = [one for one in (image, Path(image).stem) if one in self._paths]
                    if known and row[column]:
                        out.append((known[0], row, where))
                    else:
                        what = f"no {column}" if known else "no image of that name"
                        report(known[0] if known else image, f"{where}: image {image!r}: {what}")
        except (UnicodeDecodeError, csv.Error) as error:
            raise InputError(f"{source} is damaged or no CSV in UTF-8 ({error})") from error
        return out

    def _sample(self, image_id: ImageId) -> FolderSample:
        path, parts, captions = self._rows[image_id]
        size = stored_size(path, image_id, upright=True)
        named: dict[str, tuple[Path, ...]] = {}
        for part in parts:
            named[part.name] = (*named.get(part.name, ()), part.path)
        return FolderSample(
            image_id=image_id,
            path=path,
            height=size[0],
            width=size[1],
            captions=list(captions),
            prompt=self._prompt,
            objects=tuple(
                ObjectMask(name, (name,), partial(read_parts, paths, image_id, size))
                for name, paths in named.items()
            ),
        )


class ImageFolder(BaseDataset[FolderSample]):
    r"""Images without masks: those of one folder, in the order of their names, which are the ids.

    Args:
        folder (path): with the images.

    Raises:
        FileNotFoundError: no folder, or no images in it.
    """

    name = "images"
    kind = "free"

    def __init__(self, folder: str | Path) -> None:
        self._paths = {path.name: path for path in images_in(Path(folder))}
        super().__init__(list(self._paths), Ledger("raise"), {})

    def _sample(self, image_id: ImageId) -> FolderSample:
        path = self._paths[str(image_id)]
        height, width = stored_size(path, image_id, upright=True)
        return FolderSample(
            image_id=image_id,
            path=path,
            height=height,
            width=width,
            captions=[],
            prompt=None,
            objects=(),
        )


def _digest(parts: dict[Any, list[Part]], captions: dict[Any, list[str]]) -> str:
    r"""A short hash of which masks there are (by name and size), and of the captions."""
    masks = [
        (one, part.path.name, part.name, part.path.stat().st_size if part.path.exists() else 0)
        for one, some in sorted(parts.items())
        for part in some
    ]
    return digest(repr((masks, sorted(captions.items()))))[:16]
