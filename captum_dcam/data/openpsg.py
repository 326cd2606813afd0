r"""OpenPSG: panoptic masks of COCO photographs, and the relations between them.

One JSON file lists the images, their segments and the class names; the masks are COCO's panoptic
PNG files, in which a segment's id is R + 256 G + 65536 B (https://github.com/Jingkang50/OpenPSG).
It has no captions. TAM's OpenPSG table uses the captioned version of these images that comes with
GranD-f: that is ``dataset("grandf", root, split="openpsg_val")``.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from captum_dcam.data.common import (
    ImageId,
    LabelImage,
    LabelledSample,
    Ledger,
    ListedDataset,
    register_dataset,
)
from captum_dcam.data.files import expect, inside, known_as, panoptic_labels, read_table, size_fault
from captum_dcam.errors import InputError
from captum_dcam.files import Record

#: TAM's public evaluation asks so of OpenPSG
PROMPT = "Write a description for this image using around three sentences:"
SPLITS = ("test", "train", "all")
FILES = ("psg.json", "psg_val_test.json", "psg_train_val.json")
_LISTS = ("data", "thing_classes", "stuff_classes", "predicate_classes")
_FIELDS = ("image_id", "file_name", "height", "width", "pan_seg_file_name", "segments_info")


def spoken(category: str) -> tuple[str, ...]:
    r"""Ways to say a panoptic class: ``tree-merged`` is "tree", ``wall-brick`` "brick wall"."""
    parts = [part for part in category.split("-") if part not in ("merged", "other", "stuff")]
    said = [" ".join(reversed(parts)), " ".join(parts), parts[0]] if parts else []
    return tuple(dict.fromkeys((category, *said)))


class OpenPsgDataset(ListedDataset[LabelledSample]):
    r"""Photographs with panoptic masks, things and stuff, in the order of their ids.

    Objects are categories: unions of their segments. ``extra`` holds ``segments`` (id, category,
    ``isthing``) and ``relations`` as (subject, predicate, object) with the segments' places in that
    list for subject and object.

    Args:
        annotations (path): ``psg.json`` or a file like it.
        images_dir (path): the folder that ``file_name`` counts from: ``coco/``.
        panoptic_dir (path): the folder that ``pan_seg_file_name`` counts from.
        split (str): ``test`` and ``train`` go by the file's ``test_image_ids``.
        ids, limit, missing, prompt: as :class:`~captum_dcam.data.coco.CocoDataset`.

    Raises:
        FileNotFoundError: the annotations are not there.
        ValueError: not OpenPSG's format.
    """

    name = "openpsg"
    kind = "category"

    def __init__(
        self,
        annotations: str | Path,
        images_dir: str | Path,
        panoptic_dir: str | Path,
        *,
        split: str = "test",
        ids: str | Path | Iterable[Any] | None = None,
        limit: int | None = None,
        missing: str = "raise",
        prompt: str | None = PROMPT,
    ) -> None:
        if split not in SPLITS:
            raise InputError(f"split is {split!r}: expected one of {', '.join(SPLITS)}")
        report = Ledger(missing)
        source = Path(annotations)
        lists = (*_LISTS, *(("test_image_ids",) if split != "all" else ()))
        table, digest = read_table(
            source, *lists, what="OpenPSG annotations", kind="OpenPSG's psg.json"
        )
        names = [one for kind in _LISTS[1:] for one in table[kind] if not isinstance(one, str)]
        if names:
            raise InputError(f"{source}: class names {names[:5]}: expected strings")
        self._classes = [*table["thing_classes"], *table["stuff_classes"]]
        self._predicates = table["predicate_classes"]
        rows: dict[Any, Record] = {}
        for row in table["data"]:
            fault = self._fault(row)
            image_id = row.get("image_id") if isinstance(row, dict) else None
            known = image_id if isinstance(image_id, (int, str)) else None
            if fault or known in rows:
                report(known, f"{source}: image {image_id}: {fault or 'its id occurs twice'}")
            if known is not None:
                rows.setdefault(known, row)
        if split != "all":
            test = {known_as(one, rows) for one in table["test_image_ids"]}
            rows = {one: row for one, row in rows.items() if (one in test) == (split == "test")}
        self.images_dir, self.panoptic_dir = Path(images_dir), Path(panoptic_dir)
        settings = {"file": source.name, "annotations": digest, "split": split}
        super().__init__(rows, report, settings, ids=ids, limit=limit, prompt=prompt)

    def _fault(self, row: object) -> str | None:
        r"""What is wrong with one entry of ``data``; None: nothing."""
        whole = row if isinstance(row, dict) else {}
        lacking = [one for one in _FIELDS if one not in whole]
        if lacking:
            return f"an entry of 'data' lacks {lacking}: {str(row)[:200]}"
        if not isinstance(whole["image_id"], (int, str)):
            return "its id is neither a number nor a string"
        if not all(inside(whole[one]) for one in ("file_name", "pan_seg_file_name")):
            return f"{whole['file_name']} or {whole['pan_seg_file_name']} leads out of its folder"
        if wrong := size_fault((whole["height"], whole["width"])):
            return wrong
        segments, relations = whole["segments_info"], whole.get("relations") or []
        if not isinstance(segments, list) or not isinstance(relations, list):
            return "segments_info or relations is no list"
        for one in segments:
            good = isinstance(one, dict) and type(one.get("id")) is int
            if not good or not _counts(one.get("category_id"), self._classes):
                return f"segment {one} has no id, or a category that is not listed"
        for one in relations:
            lists = (segments, segments, self._predicates)
            if not isinstance(one, list) or len(one) != 3 or not all(map(_counts, one, lists)):
                what = f"{len(segments)} segments or {len(self._predicates)} predicates"
                return f"relation {one} points out of the {what}"
        return None

    def _sample(self, image_id: ImageId) -> LabelledSample:
        row = self._rows[image_id]
        size = (row["height"], row["width"])
        segments = [
            {
                "id": one["id"],
                "category": self._classes[one["category_id"]],
                "isthing": bool(one.get("isthing", 0)),
            }
            for one in row["segments_info"]
        ]
        numbers: dict[str, tuple[int, ...]] = {}
        for one in segments:
            numbers[one["category"]] = (*numbers.get(one["category"], ()), one["id"])
        relations = row.get("relations") or []
        path = self.panoptic_dir / row["pan_seg_file_name"]
        labels = LabelImage(path, image_id, size, panoptic_labels)
        return LabelledSample(
            image_id=image_id,
            path=self.images_dir / row["file_name"],
            height=size[0],
            width=size[1],
            captions=[],
            prompt=self._prompt,
            objects=labels.objects(numbers, spoken),
            extra={
                "segments": segments,
                "relations": [(a, self._predicates[how], b) for a, b, how in relations],
            },
            labels=labels,
            numbers=numbers,
        )


def _counts(place: object, listed: list[Any]) -> bool:
    r"""Whether a number is a place in a list."""
    return type(place) is int and 0 <= place < len(listed)


@register_dataset("openpsg")
def open_openpsg(
    root: str | Path,
    split: str = "test",
    *,
    annotations: str | Path | None = None,
    ids: str | Path | Iterable[Any] | None = None,
    limit: int | None = None,
    missing: str = "raise",
    prompt: str | None = PROMPT,
) -> OpenPsgDataset:
    r"""OpenPSG in its usual layout: ``psg/psg.json`` beside ``coco/``, whose folders are
    ``train2017``, ``val2017``, ``panoptic_train2017`` and ``panoptic_val2017`` (the latter two also
    under ``coco/annotations``, where COCO's own archive puts them).

    Args:
        annotations (path): another file than the first of ``psg.json``, ``psg_val_test.json`` and
            ``psg_train_val.json``.
    """
    root = Path(root)
    listed = [folder / name for name in FILES for folder in (root / "psg", root)]
    coco = [root / "coco", root]
    panoptic = [
        folder / f"panoptic_{part}2017"
        for part in ("train", "val")
        for top in coco
        for folder in (top, top / "annotations")
    ]
    found = expect(
        "OpenPSG data set",
        root,
        [
            ("the annotations", [Path(annotations)] if annotations is not None else listed),
            ("the images", [top / f"{part}2017" for part in ("train", "val") for top in coco]),
            ("the panoptic images", panoptic),
        ],
    )
    source, images, masks = found[0], found[1].parent, found[2].parent
    options: dict[str, Any] = {"ids": ids, "limit": limit, "missing": missing, "prompt": prompt}
    return OpenPsgDataset(source, images, masks, split=split, **options)
