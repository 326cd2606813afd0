r"""The folder layouts of TAM's public evaluation (https://github.com/xmed-lab/TAM).

Two: COCO Caption as ``annotations/instances_minival2014.json``, ``annotations/
captions_val2014.json``, ``image/<id>.jpg`` and ``seg_label/<id>.png`` (ids of twelve digits, grey
levels are category ids); GranDf and OpenPSG as ``anno.json``, a list of ``[image, caption, label
picture, {name: grey level}]`` with paths from that folder.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from captum_dcam.data.coco import ALIASES
from captum_dcam.data.coco import PROMPT as ONE_SENTENCE
from captum_dcam.data.coco_tables import by_id, read_captions, read_table
from captum_dcam.data.common import BaseDataset, ImageId, Ledger, Sample
from captum_dcam.data.files import (
    distinct,
    grey_labels,
    inside,
    read_json,
    select,
    stored_size,
)
from captum_dcam.data.labelled import LabelledSample, label_objects, labels_of
from captum_dcam.data.registry import register_dataset
from captum_dcam.errors import InputError, MissingFileError
from captum_dcam.files import Record

_SENTENCES = "Write a description for this image using around {} sentences:"
#: folder name → prompt, as the public script decides it
PROMPTS = {"grandf": _SENTENCES.format("two"), "openpsg": _SENTENCES.format("three")}


class TamDataset(BaseDataset[Sample]):
    r"""A folder as TAM's ``eval.py`` reads it, in the order of the ids.

    Objects are the names whose grey level occurs in the label picture; ``extra["unseen"]`` lists
    those of an ``anno.json`` entry that do not. An entry with an empty label path has no objects.

    Args:
        root (path): the folder.
        ids, limit, missing: as :class:`~captum_dcam.data.coco.CocoDataset`.
        prompt (str): Default: the public script's, which goes by the folder's name; None where it
            has none.

    Raises:
        FileNotFoundError: neither layout; the message lists what was expected.
        ValueError: a damaged file.
    """

    name = "tam"

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
        self.root = Path(root)
        listed = self.root / "anno.json"
        instances = self.root / "annotations" / "instances_minival2014.json"
        captions = self.root / "annotations" / "captions_val2014.json"
        if listed.is_file():
            self.kind, default = "phrase", self._default()
            rows, digest = _read_list(listed, report)
        elif instances.is_file() and captions.is_file():
            self.kind, default = "category", ONE_SENTENCE
            rows, digest = _read_coco(instances, captions, report)
        else:
            state = {one: "found" if one.is_file() else "missing" for one in (instances, captions)}
            raise MissingFileError(
                f"no folder in TAM's layout at {root}: expected {listed} (missing), or "
                f"{' and '.join(f'{one} ({said})' for one, said in state.items())} beside the "
                f"folders image/ and seg_label/"
            )
        self._rows = {one: rows[one] for one in select(rows, ids, limit, report)}
        self._prompt = default if prompt is None else prompt
        settings = {"annotations": digest, "prompt": self._prompt}
        super().__init__(list(self._rows), report, settings)

    def _default(self) -> str | None:
        name = self.root.resolve().name.lower()
        return next((prompt for part, prompt in PROMPTS.items() if part in name), None)

    def _sample(self, image_id: ImageId) -> Sample:
        row = self._rows[image_id]
        path = self.root / row["image"]
        size = stored_size(path, image_id)
        if not row["label"]:
            return Sample(
                image_id=image_id,
                path=path,
                height=size[0],
                width=size[1],
                captions=row["captions"],
                prompt=self._prompt,
                objects=(),
                extra={"unseen": list(row["names"])},
            )
        label = self.root / row["label"]
        here = set(labels_of(grey_labels, label, image_id, size).ravel().tolist())
        numbers: dict[str, tuple[int, ...]] = {
            name: (level,) for name, level in row["names"].items() if level in here
        }
        unseen = [name for name in row["names"] if name not in numbers]
        return LabelledSample(
            image_id=image_id,
            path=path,
            height=size[0],
            width=size[1],
            captions=row["captions"],
            prompt=self._prompt,
            objects=label_objects(grey_labels, label, image_id, size, numbers, _names),
            extra={"unseen": unseen if self.kind == "phrase" else []},
            label_path=label,
            numbers=numbers,
            _read=grey_labels,
        )


def _names(name: str) -> tuple[str, ...]:
    return (name, *ALIASES.get(name, ()))


def _read_list(source: Path, report: Ledger) -> tuple[dict[Any, Record], str]:
    table, digest = read_json(source, "TAM's list of images")
    if not isinstance(table, list):
        raise InputError(f"{source} is a {type(table).__name__}: expected a list of images")
    faults = [_fault(entry) for entry in table]
    names = [
        Path(entry[0]).stem if fault is None else f"entry {number}"
        for number, (entry, fault) in enumerate(zip(table, faults, strict=True))
    ]
    rows: dict[Any, Record] = {}
    for image_id, entry, fault in zip(distinct(names), table, faults, strict=True):
        rows[image_id] = {}
        if fault is not None:
            report(image_id, f"{source}: image {image_id}: {fault}")
            continue
        image, caption, label, levels = entry
        rows[image_id] = {"image": image, "captions": [caption], "label": label, "names": levels}
    return rows, digest


def _fault(entry: object) -> str | None:
    r"""What is wrong with an entry of ``anno.json``; None: nothing."""
    if not isinstance(entry, list) or len(entry) != 4:
        return f"{str(entry)[:200]}: expected [image, caption, label picture, names]"
    image, caption, label, levels = entry
    if not inside(image) or not (label == "" or inside(label)):
        return f"{image!r} or {label!r} is no path inside the folder"
    if not isinstance(caption, str):
        return f"its caption is {caption!r}: expected a string"
    good = isinstance(levels, dict) and all(type(one) is int for one in levels.values())
    return None if good else f"its names are {str(levels)[:200]}: expected {{name: grey level}}"


def _read_coco(instances: Path, captions: Path, report: Ledger) -> tuple[dict[Any, Record], str]:
    table, digest = read_table(instances, "images", "categories")
    images = by_id(table, "images", (), instances, report)
    categories = by_id(table, "categories", ("name",), instances)
    texts, more = read_captions(captions, set(images), report)
    levels = {row["name"]: row["id"] for row in categories.values()}
    return {
        one: {
            "image": f"image/{one:0>12}.jpg",
            "captions": [row["caption"] for row in texts.get(one, [])],
            "label": f"seg_label/{one:0>12}.png",
            "names": levels,
        }
        for one in images
    }, digest + more


@register_dataset("tam")
def open_tam(
    root: str | Path,
    *,
    ids: str | Path | Iterable[Any] | None = None,
    limit: int | None = None,
    missing: str = "raise",
    prompt: str | None = None,
) -> TamDataset:
    r"""A folder prepared for TAM's public evaluation; see :class:`TamDataset`."""
    return TamDataset(root, ids=ids, limit=limit, missing=missing, prompt=prompt)
