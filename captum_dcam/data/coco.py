r"""COCO's format: photographs, instance masks and captions (2014, 2017, and files like them).

pycocotools does the masks. The index is made here: pycocotools prints while it makes its own, and
passes over duplicate and dangling ids. :func:`write_coco` is the way back.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
from PIL import Image

from captum_dcam.data.coco_masks import mask_engine, need, union
from captum_dcam.data.coco_words import categories_in, named_categories
from captum_dcam.data.common import (
    LABELS,
    ImageId,
    Ledger,
    ListedDataset,
    Mask,
    ObjectMask,
    Sample,
    Span,
    register_dataset,
)
from captum_dcam.data.files import (
    Report,
    expect,
    inside,
    known_as,
    read_image,
    read_table,
    size_fault,
)
from captum_dcam.errors import InputError, MissingFileError, OccupiedError
from captum_dcam.files import Record, canonical, new_entries, plain, write_text

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
#: which pixels the masks fit
TURNED = ("stored", "upright")
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
    _upright: bool = field(default=False, repr=False)

    def image(self) -> Image.Image:
        r"""As :meth:`Sample.image`; turned by EXIF where the data set was opened so."""
        assert self.path is not None
        other = TURNED[not self._upright]
        return read_image(
            self.path,
            self.image_id,
            (self.height, self.width),
            upright=self._upright,
            otherwise=f"open the data set with turned={other!r}",
        )

    def judged(self, answer: str) -> tuple[Span, ...]:
        r"""The names of COCO's categories in an answer: true where the category is annotated, or
        where a reference caption names it (CHAIR's protocol)."""
        true = {*self.categories, *categories_in(self.captions)}
        return tuple(
            Span(start, stop, answer[start:stop], LABELS[category not in true], category)
            for start, stop, category in named_categories(answer)
        )

    @property
    def categories(self) -> list[str]:
        r"""The names that occur, each once, in the order of the annotations."""
        return [item.name for item in self.objects]

    def instance_masks(self) -> list[CocoInstance]:
        r"""Every instance and crowd, in the order of the annotations; raises as :meth:`masks`, and
        for each without a pixel."""
        size = (self.height, self.width)
        return [
            CocoInstance(row["id"], name, union([row], size), bool(row.get("iscrowd", 0)))
            for name, row in self._annotations
        ]


def spoken(category: str) -> tuple[str, ...]:
    r"""Ways to say a category, its name first."""
    return (category, *ALIASES.get(category, ()))


class CocoDataset(ListedDataset[CocoSample]):
    r"""The :class:`CocoSample` of a split, in the order of their ids; no image is opened early.

    Args:
        images_dir (path): the folder that file names count from.
        instances_json (path): COCO's ``instances_*.json``.
        captions_json (path or None): COCO's ``captions_*.json``. Default: no captions.
        ids (path or iterable): the images to use, or a file of their ids. Default: all
        limit (int): how many, from the first in the order of their ids. Default: no limit
        missing (str): ``"raise"``, or ``"skip"`` and record, what is missing or damaged.
        prompt (str): what to ask of every image.
        turned (str): ``"stored"``, masks fit the pixels as they are stored, which is COCO's own
            way, or ``"upright"``, masks were drawn on images that were turned as their EXIF data
            say. An image whose annotated size fits only the other way is refused.

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
        turned: str = "stored",
    ) -> None:
        if turned not in TURNED:
            raise InputError(f"turned is {turned!r}: expected one of {', '.join(TURNED)}")
        self._upright = turned == "upright"
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
        rows = {
            one: (row, annotations.get(one, []), captions.get(one, []))
            for one, row in images.items()
        }
        # only where it is chosen: stores of before keep their key
        own = {"turned": turned} if self._upright else {}
        settings = {"file": source.name, "annotations": digest, **own}
        super().__init__(rows, report, settings, ids=ids, limit=limit, prompt=prompt)

    @classmethod
    def open(
        cls,
        root: str | Path,
        split: str = "val2014",
        *,
        ids: str | Path | Iterable[Any] | None = None,
        limit: int | None = None,
        missing: str = "raise",
        prompt: str | None = PROMPT,
        turned: str = "stored",
    ) -> CocoDataset:
        r"""Finds the parts of a split, such as ``"val2017"``, in COCO's usual layout.

        Annotations: ``annotations/instances_<split>.json``, perhaps ``captions_<split>.json``.
        Images: the first of ``<split>/``, ``images/<split>/`` and ``images/`` that is there.
        ``minival2014`` and ``valminusminival2014`` share images and captions with ``val2014``. The
        5,000 images of "minival" are either ``split="minival2014"`` with its own annotation file,
        or ``split="val2014"`` with ``ids`` naming a file of their ids.

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
        options: dict[str, Any] = {"ids": ids, "limit": limit, "missing": missing}
        return cls(images, instances, texts, prompt=prompt, turned=turned, **options)

    def _sample(self, image_id: ImageId) -> CocoSample:
        row, annotations, captions = self._rows[image_id]
        size = (row["height"], row["width"])
        listed = self._categories
        found = [(listed[known_as(a["category_id"], listed)]["name"], a) for a in annotations]
        parts: dict[str, list[Record]] = {}
        for name, one in found:
            parts.setdefault(name, []).append(one)
        kind = row.get("license")
        terms = self._licenses.get(kind) if isinstance(kind, (int, str)) else None
        return CocoSample(
            image_id=image_id,
            path=self.images_dir / row["file_name"],
            file_name=row["file_name"],
            height=size[0],
            width=size[1],
            captions=[one["caption"] for one in captions],
            prompt=self._prompt,
            objects=tuple(
                ObjectMask(name, spoken(name), partial(union, some, size))
                for name, some in parts.items()
            ),
            license=f"{terms.get('name')} ({terms.get('url')})" if terms else None,
            attribution=row.get("flickr_url") or row.get("coco_url"),
            extra=dict(row.get("extra") or {}),
            _annotations=found,
            _upright=self._upright,
        )


open_coco = register_dataset("coco")(CocoDataset.open)


# -- the tables of annotation files ----------------------------------------------------------------


def annotation_files(root: Path, split: str) -> tuple[Path, Path]:
    """The files of a split's masks and captions."""
    folder = root / "annotations"
    return folder / f"instances_{split}.json", folder / f"captions_{split}.json"


#: fields that are ids
_IDS = ("id", "image_id", "category_id")


def refuse(image_id: object, reason: str) -> None:
    r"""Reports a problem by raising it."""
    raise InputError(reason)


def by_id(
    table: Record,
    kind: str,
    fields: Sequence[str],
    source: Path,
    report: Report = refuse,
    known: Collection[Any] = (),
) -> dict[Any, Record]:
    r"""One list of the table by id, complete and without duplicates; the others are reported,
    under the one of the ``known`` images that they belong to."""
    rows: dict[Any, Record] = {}
    image = "id" if kind == "images" else "image_id"
    for row in table[kind]:
        whole = row if isinstance(row, dict) else {}
        lacking = [name for name in ("id", *fields) if not _given(whole, name)]
        owner = whole[image] if _given(whole, image) else None
        owner = owner if (same := known_as(owner, known)) is None else same
        if lacking:
            report(owner, f"{source}: an entry of {kind!r} lacks {lacking}: {str(row)[:200]}")
        elif row["id"] in rows:
            report(owner, f"{source}: id {row['id']} occurs twice in {kind!r}")
        else:
            whole = {n: int(row[n]) for n in _IDS if type(row.get(n)) is float}  # 1.0 is 1
            rows[row["id"]] = {**row, **whole} if whole else row
    return rows


def _given(row: Record, name: str) -> bool:
    r"""Whether an entry has a field, of the type that matters."""
    if name not in row or name not in ("name", *_IDS):
        return name in row
    value = row[name]
    if name == "name":
        return isinstance(value, str)
    return type(value) in (int, str) or (type(value) is float and value.is_integer())


def listed_rows(table: Record, kind: str) -> list[Record]:
    r"""The entries with an id of a list that need not be there, or be whole."""
    rows = table.get(kind)
    listed = rows if isinstance(rows, list) else []
    return [row for row in listed if isinstance(row, dict) and _given(row, "id")]


def by_image(
    table: Record, fields: Sequence[str], known: set[Any], source: Path, report: Report = refuse
) -> dict[Any, list[Record]]:
    r"""The annotations of every image."""
    rows: dict[Any, list[Record]] = {}
    for row in by_id(table, "annotations", fields, source, report, known).values():
        named = row["image_id"]
        image = known_as(named, known)
        if image is not None:
            rows.setdefault(image, []).append(row)
        else:
            report(named, f"{source}: annotation {row['id']} names image {named}, not listed")
    return rows


def read_captions(
    source: Path, known: set[Any], report: Report
) -> tuple[dict[Any, list[Record]], str]:
    r"""The captions of every image; there may be more images than the instances file lists."""
    table, digest = read_table(source, "annotations")
    known = known | {row["id"] for row in listed_rows(table, "images")}
    rows = by_image(table, ("image_id", "caption"), known, source, report)
    for image, row in ((image, row) for image, some in rows.items() for row in some):
        if not isinstance(row["caption"], str):
            what = f"caption {row['id']} is {row['caption']!r}: expected text"
            report(image, f"{source}: {what}")
    return rows, digest


def check_images(images: Iterable[Record], source: Path, report: Report) -> None:
    """Report images whose file or size cannot be."""
    for row in images:
        where = f"{source}: image {row['id']}"
        if not inside(row["file_name"]):
            report(row["id"], f"{where}: {row['file_name']} leads out of the images' folder")
        if wrong := size_fault((row["height"], row["width"])):
            report(row["id"], f"{where}: {wrong}")


def check_categories(
    categories: dict[Any, Record],
    annotations: dict[Any, list[Record]],
    source: Path,
    report: Report,
) -> None:
    """Refuse categories that share a name; report masks of a category that is not listed."""
    names = sorted(row["name"] for row in categories.values())
    need(len(names) == len(set(names)), f"{source}: two categories share a name: {names}")
    for image, row in ((image, row) for image, some in annotations.items() for row in some):
        if known_as(row["category_id"], categories) is None:
            what = f"names category {row['category_id']}, not listed"
            report(image, f"{source}: annotation {row['id']} {what}")


# -- writing ---------------------------------------------------------------------------------------


class ObjectLike(Protocol):
    r"""What :func:`write_coco` asks of an object: a name, and a mask (H, W) bool."""

    @property
    def category(self) -> str: ...
    @property
    def mask(self) -> Mask: ...


class SceneLike(Protocol):
    r"""What :func:`write_coco` asks of an image; an ``extra`` dict of plain JSON is optional."""

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

    Images become PNG files in ``<root>/<split>/``, masks compressed run lengths. Ids count from 1
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
    folder, captions, instances = places
    folder.mkdir()
    for sample in samples:
        number, where = len(images) + 1, f"sample {len(images)}"
        image = _write_image(sample, number, folder, where)
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
    for place, kinds, rows in ((captions, {}, texts), (instances, {"categories": listed}, objects)):
        numbered = [{"id": number, **row} for number, row in enumerate(rows, 1)]
        table = {**shared, **kinds, "annotations": numbered}
        write_text(place, canonical(table, ascii_only=True))


def _write_image(sample: SceneLike, number: int, folder: Path, where: str) -> Record:
    r"""Saves the pixels and returns the image's entry."""
    image, name, extra = sample.image, f"{number:012d}.png", getattr(sample, "extra", None)
    need(image.mode == "RGB", f"{where}: image is {image.mode}: use image.convert('RGB')")
    # From the pixels alone: Pillow would carry profiles and comments along.
    Image.fromarray(np.asarray(image)).save(folder / name)
    row = {"id": number, "file_name": name, "height": image.height, "width": image.width}
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
