r"""COCO's format: a reader of photographs, instance masks and captions, and a writer.

pycocotools does the masks. The index is made here: pycocotools prints while it makes its own, and
passes over duplicate and dangling ids.
"""

from __future__ import annotations

import json
import re
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from operator import index as as_index
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np
from PIL import Image

from captum_dcam.data.coco_tables import (
    Mask,
    Row,
    annotation_files,
    by_id,
    by_image,
    check_categories,
    check_paths,
    decode,
    mask_engine,
    need,
    numbered,
    read_captions,
    read_table,
    write_json,
)


class CocoInstance(NamedTuple):
    r"""One annotated object, or one crowd of them (``is_crowd``), with its mask (H, W) bool."""

    annotation_id: int
    category: str
    mask: Mask
    is_crowd: bool


@dataclass(frozen=True, eq=False)
class CocoSample:
    r"""One photograph: what is known of it, and its pixels and masks when asked for.

    Attributes:
        categories (list of str): the names that occur, each once, in the order of the annotations.
        license (str or None): name and address of the image's licence.
        attribution (str or None): the address of the original, at Flickr or COCO.
        extra (dict): what :func:`write_coco` was given as ``extra``; else empty.
    """

    image_id: int
    file_name: str
    path: Path
    height: int
    width: int
    categories: list[str]
    captions: list[str]
    license: str | None
    attribution: str | None
    extra: Row
    _annotations: list[tuple[str, Row]] = field(repr=False)

    def image(self) -> Image.Image:
        r"""The pixels as RGB, not turned by EXIF: COCO's masks fit the pixels as they are stored.

        Raises:
            FileNotFoundError: no such file.
            OSError: a file that cannot be decoded to its end.
            ValueError: another size than the annotations say.
        """
        where = f"image {self.image_id}: {self.path}"
        if not self.path.is_file():
            raise FileNotFoundError(f"{where} is missing: fetch it again")
        try:
            with Image.open(self.path) as stored:
                picture = stored.convert("RGB")
        except (OSError, SyntaxError, ValueError) as error:  # which one depends on the format
            raise OSError(f"{where} is damaged ({error}): fetch it again") from error
        said = (self.width, self.height)
        need(picture.size == said, f"{where} is {picture.size}, annotated as {said} (W, H)")
        return picture

    def instance_masks(self) -> list[CocoInstance]:
        r"""Every instance and crowd, in the order of the annotations; raises as :meth:`masks`."""
        size = (self.height, self.width)
        return [
            CocoInstance(row["id"], name, decode(row, size), bool(row.get("iscrowd", 0)))
            for name, row in self._annotations
        ]

    def masks(self) -> dict[str, Mask]:
        r"""Category → union (H, W) bool of its instances and crowds.

        Raises:
            ValueError: a segmentation that is missing, damaged, or of another size.
        """
        union = {name: np.zeros((self.height, self.width), dtype=bool) for name in self.categories}
        for instance in self.instance_masks():
            union[instance.category] |= instance.mask
        return union


class CocoDataset:
    r"""The :class:`CocoSample` of a split, in the file's order; no picture is opened early.

    Args:
        images_dir (path): the folder that file names count from.
        instances_json (path): COCO's ``instances_*.json``.
        captions_json (path or None): COCO's ``captions_*.json``. Default: no captions.

    Raises:
        ImportError: pycocotools is not installed.
        FileNotFoundError: a folder or file is not there.
        ValueError: not COCO's format, an id used twice, an unknown image or category.
    """

    def __init__(
        self,
        images_dir: str | Path,
        instances_json: str | Path,
        captions_json: str | Path | None = None,
    ) -> None:
        mask_engine()  # better missed now than at the first mask
        self.images_dir, source = Path(images_dir), Path(instances_json)
        if not self.images_dir.is_dir():
            raise FileNotFoundError(f"{self.images_dir} is no folder: expected the images there")
        table = read_table(source, "images", "annotations", "categories")
        images = by_id(table, "images", ("file_name", "height", "width"), source)
        self._images = list(images.values())
        self._categories = by_id(table, "categories", ("name",), source)
        self._annotations = by_image(table, ("image_id", "category_id"), set(images), source)
        self._licenses = {row.get("id"): row for row in table.get("licenses") or []}
        check_paths(self._images, source)
        check_categories(self._categories, self._annotations, source)
        found = None if captions_json is None else Path(captions_json)
        self._captions = {} if found is None else read_captions(found, set(images))

    @classmethod
    def open(cls, root: str | Path, split: str) -> CocoDataset:
        r"""Finds the parts of a split, such as ``"val2017"``, in COCO's usual layout.

        Annotations: ``annotations/instances_<split>.json``, perhaps ``captions_<split>.json``.
        Images: the first of ``<split>/``, ``images/<split>/`` and ``images/`` that is there.

        Raises:
            FileNotFoundError: a part is missing; the message lists what was expected, and where.
        """
        root = Path(root)
        folders = (root / split, root / "images" / split, root / "images")
        images = next((folder for folder in folders if folder.is_dir()), None)
        instances, captions = annotation_files(root, split)
        if images is None or not instances.is_file():
            here = sorted(path.name for path in instances.parent.glob("instances_*.json"))
            raise FileNotFoundError(
                f"no COCO split {split!r} under {root}: expected {instances} "
                f"({'found' if instances.is_file() else 'missing'}) and the images in one of "
                f"{', '.join(map(str, folders))} ({'all missing' if images is None else 'found'}); "
                f"captions, if any, in {captions}. Here: {', '.join(here) or 'no instances at all'}"
            )
        return cls(images, instances, captions if captions.is_file() else None)

    def __len__(self) -> int:
        return len(self._images)

    def __iter__(self) -> Iterator[CocoSample]:
        return (self[i] for i in range(len(self)))

    def __getitem__(self, index: int) -> CocoSample:
        row = self._images[as_index(index)]
        rows = self._annotations.get(row["id"], [])
        found = [(str(self._categories[r["category_id"]]["name"]), r) for r in rows]
        terms = self._licenses.get(row.get("license"))
        return CocoSample(
            **{key: row[key] for key in ("file_name", "height", "width")},
            image_id=row["id"],
            path=self.images_dir / row["file_name"],
            categories=list(dict.fromkeys(name for name, _ in found)),
            captions=[r["caption"] for r in self._captions.get(row["id"], [])],
            license=terms and f"{terms.get('name')} ({terms.get('url')})",
            attribution=row.get("flickr_url") or row.get("coco_url"),
            extra=dict(row.get("extra") or {}),
            _annotations=found,
        )


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
        FileExistsError: the split is there already.
        ValueError: a sample that cannot be written; the message says which, and why.
    """
    plain = re.fullmatch(r"\w[\w.-]*", split) and split not in ("annotations", "images")
    need(bool(plain), f"split is {split!r}: expected a plain name such as 'val2017'")
    root = Path(root).absolute()
    instances, captions = annotation_files(root, split)
    targets = (root / split, captions, instances)  # the reader looks for instances: they come last
    for target in targets:
        if target.exists():
            raise FileExistsError(f"{target} is there already: take another split or remove it")
    nearest = next(folder for folder in (root, *root.parents) if folder.is_dir())
    with tempfile.TemporaryDirectory(prefix=".coco-", dir=nearest) as folder, ExitStack() as undo:
        staged = _stage(Path(folder), split, samples, categories)
        instances.parent.mkdir(parents=True, exist_ok=True)
        for source, target in zip(staged, targets, strict=True):
            source.rename(target)
            undo.callback(target.rename, source)
        undo.pop_all()
    return instances


def _stage(
    folder: Path, split: str, samples: Iterable[SceneLike], categories: Sequence[str] | None
) -> tuple[Path, Path, Path]:
    r"""The whole split in a folder of its own: its images, captions and instances."""
    images: list[Row] = []
    objects: list[Row] = []
    texts: list[Row] = []
    pictures = folder / "images"
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
    captions, instances = folder / "captions", folder / "instances"
    captions.write_text(write_json({**shared, "annotations": numbered(texts)}))
    instances.write_text(
        write_json({**shared, "categories": listed, "annotations": numbered(objects)})
    )
    return pictures, captions, instances


def _write_picture(sample: SceneLike, number: int, folder: Path, where: str) -> Row:
    r"""Saves the pixels and returns the image's entry."""
    picture, name, extra = sample.image, f"{number:012d}.png", getattr(sample, "extra", None)
    need(picture.mode == "RGB", f"{where}: image is {picture.mode}: use image.convert('RGB')")
    # From the pixels alone: Pillow would carry profiles and comments along.
    Image.fromarray(np.asarray(picture)).save(folder / name)
    row: Row = {"id": number, "file_name": name, "height": picture.height, "width": picture.width}
    try:
        return {**row, "extra": json.loads(write_json(extra))} if extra else row
    except (TypeError, ValueError) as error:
        raise ValueError(f"{where}: extra is not plain JSON ({error})") from error


def _encode(item: ObjectLike, size: tuple[int, int], where: str) -> Row:
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
