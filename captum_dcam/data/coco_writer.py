r"""Writes COCO's format: pictures, masks and captions as one split, all of it or nothing."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Protocol

import numpy as np
from PIL import Image

from captum_dcam.data.coco_tables import (
    Mask,
    annotation_files,
    mask_engine,
    need,
    numbered,
)
from captum_dcam.errors import InputError, OccupiedError
from captum_dcam.files import Record, canonical, new_entries, plain, write_text


class ObjectLike(Protocol):
    r"""What :func:`write_coco` asks of an object: a name, and a mask (H, W) bool."""

    @property
    def category(self) -> str: ...
    @property
    def mask(self) -> Mask: ...


class SceneLike(Protocol):
    r"""What :func:`write_coco` asks of a picture; an ``extra`` dict of plain JSON is optional."""

    @property
    def image(self) -> Image.Image: ...
    @property
    def objects(self) -> Sequence[ObjectLike]: ...
    @property
    def captions(self) -> Sequence[str] | Mapping[str, str]: ...


def write_coco(
    root: str | Path,
    split: str,
    samples: Iterable[SceneLike],
    categories: Sequence[str] | None = None,
) -> Path:
    r"""Writes a split that :meth:`CocoDataset.open` and pycocotools read: all of it, or nothing.

    Pictures become PNG files in ``<root>/<split>/``, masks compressed run lengths. Ids count from 1
    in the order given; equal input gives equal bytes.

    Args:
        root (path): made if need be; other splits in it stay as they are.
        split (str): a plain name.
        samples (iterable of SceneLike): consumed once; a mapping of captions gives its values.
        categories (sequence of str or None): the names, in the order of their ids: give the same to
            every split. Default: the names that occur, sorted.

    Returns:
        Path: the instances file.

    Raises:
        OccupiedError: the split is there already.
        FileError: it cannot be written; nothing of it is left.
        ValueError: a sample that cannot be written; the message says which, and why.
    """
    good = re.fullmatch(r"\w[\w.-]*", split) and split not in ("annotations", "images")
    need(bool(good), f"split is {split!r}: expected a plain name such as 'val2017'")
    root = Path(root).absolute()
    instances, captions = annotation_files(root, split)
    targets = (root / split, captions, instances)  # the reader looks for instances: they come last
    for target in targets:
        if target.exists():
            raise OccupiedError(f"{target} is there already: take another split or remove it")
    with new_entries(targets) as places:
        _stage(places, split, samples, categories)
    return instances


def _stage(
    places: Sequence[Path],
    split: str,
    samples: Iterable[SceneLike],
    categories: Sequence[str] | None,
) -> None:
    r"""The whole split: the folder of its images, its captions, its instances."""
    images: list[Record] = []
    objects: list[Record] = []
    texts: list[Record] = []
    pictures, captions, instances = places
    pictures.mkdir()
    for sample in samples:
        number, where = len(images) + 1, f"sample {len(images)}"
        image = _write_picture(sample, number, pictures, where)
        images.append(image)
        size = (image["height"], image["width"])
        objects += [{"image_id": number, **_encode(o, size, where)} for o in sample.objects]
        texts += [{"image_id": number, "caption": text} for text in _texts(sample, where)]
    need(bool(images), f"split {split!r} has no samples: nothing to write")
    names = sorted({row["category"] for row in objects}) if categories is None else list(categories)
    ids = {name: number for number, name in enumerate(names, 1)}
    need(len(ids) == len(names), f"categories {names} name one twice")
    for row in objects:
        name = row.pop("category")
        need(name in ids, f"sample {row['image_id'] - 1} shows {name!r}: not among {names}")
        row["category_id"] = ids[name]
    listed = [{"id": ids[name], "name": name, "supercategory": name} for name in names]
    shared = {"info": {"description": split}, "licenses": [], "images": images}
    tables = (
        (captions, {**shared, "annotations": numbered(texts)}),
        (instances, {**shared, "categories": listed, "annotations": numbered(objects)}),
    )
    for place, table in tables:
        write_text(place, canonical(table, ascii_only=True))


def _write_picture(sample: SceneLike, number: int, folder: Path, where: str) -> Record:
    r"""Saves the pixels and returns the image's entry."""
    picture, name, extra = sample.image, f"{number:012d}.png", getattr(sample, "extra", None)
    need(picture.mode == "RGB", f"{where}: image is {picture.mode}: use image.convert('RGB')")
    # From the pixels alone: Pillow would carry profiles and comments along.
    Image.fromarray(np.asarray(picture)).save(folder / name)
    row: Record = {
        "id": number,
        "file_name": name,
        "height": picture.height,
        "width": picture.width,
    }
    try:
        return {**row, "extra": plain(extra)} if extra else row
    except (TypeError, ValueError) as error:
        raise InputError(f"{where}: extra is not plain JSON ({error})") from error


def _encode(item: ObjectLike, size: tuple[int, int], where: str) -> Record:
    r"""The annotation of one object, but for its ids."""
    engine, mask = mask_engine(), np.asarray(item.mask)
    need(
        mask.dtype == bool and mask.shape == size and bool(mask.any()),
        f"{where}: the mask of {item.category!r} is {mask.dtype} {mask.shape} and "
        f"{'not ' if mask.any() else ''}empty: expected bool {size} with a pixel at least; leave "
        f"out an object that cannot be seen",
    )
    runs = engine.encode(np.asfortranarray(mask, dtype=np.uint8))
    return {
        "category": item.category,
        "segmentation": {"size": list(size), "counts": runs["counts"].decode("ascii")},
        "area": int(engine.area(runs)),
        "bbox": [float(edge) for edge in engine.toBbox(runs)],
        "iscrowd": 0,
    }


def _texts(sample: SceneLike, where: str) -> list[str]:
    r"""The captions as a list; a lone string would be taken letter by letter."""
    given = sample.captions
    texts = list(given.values() if isinstance(given, Mapping) else given)
    good = not isinstance(given, str) and all(isinstance(text, str) for text in texts)
    need(good, f"{where}: captions are {given!r}: expected a list of strings")
    return texts
