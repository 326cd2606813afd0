r"""The folder layouts of TAM's public evaluation (https://github.com/xmed-lab/TAM).

Two: COCO Caption as ``annotations/instances_minival2014.json``, ``annotations/
captions_val2014.json``, ``image/<id>.jpg`` and ``seg_label/<id>.png`` (ids of twelve digits, grey
levels are category ids); GranDf and OpenPSG as ``anno.json``, a list of ``[image, caption, label
image, {name: grey level}]`` with paths from that folder.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from captum_dcam.data.coco import PROMPT as ONE_SENTENCE
from captum_dcam.data.coco import by_id, read_captions, spoken
from captum_dcam.data.common import (
    ImageId,
    LabelImage,
    LabelledSample,
    Ledger,
    ListedDataset,
    Sample,
    register_dataset,
)
from captum_dcam.data.files import grey_labels, inside, read_entries, read_table, stored_size
from captum_dcam.errors import MissingFileError
from captum_dcam.files import Record

_SENTENCES = "Write a description for this image using around {} sentences:"
#: folder name → prompt, as the public script decides it
PROMPTS = {"grandf": _SENTENCES.format("two"), "openpsg": _SENTENCES.format("three")}


@register_dataset("tam")
class TamDataset(ListedDataset[Sample]):
    r"""A folder as TAM's ``eval.py`` reads it, in the order of the ids.

    Objects are the names whose grey level occurs in the label image; ``extra["unseen"]`` lists
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
            folder = self.root.resolve().name.lower()
            self.kind = "phrase"
            default = next((text for part, text in PROMPTS.items() if part in folder), None)
            rows, digest = read_entries(
                listed, "TAM's list of images", report, name=_name, fault=_fault, row=_row
            )
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
        prompt = default if prompt is None else prompt
        super().__init__(rows, report, {"annotations": digest}, ids=ids, limit=limit, prompt=prompt)

    def _sample(self, image_id: ImageId) -> Sample:
        row = self._rows[image_id]
        path = self.root / row["image"]
        size = stored_size(path, image_id)
        about: dict[str, Any] = {
            "image_id": image_id,
            "path": path,
            "height": size[0],
            "width": size[1],
            "captions": row["captions"],
            "prompt": self._prompt,
        }
        if not row["label"]:
            return Sample(**about, objects=(), extra={"unseen": list(row["names"])})
        labels = LabelImage(self.root / row["label"], image_id, size, grey_labels)
        here = set(labels.numbers().ravel().tolist())
        numbers: dict[str, tuple[int, ...]] = {
            name: (level,) for name, level in row["names"].items() if level in here
        }
        unseen = [name for name in row["names"] if name not in numbers]
        return LabelledSample(
            **about,
            objects=labels.objects(numbers, spoken),
            extra={"unseen": unseen if self.kind == "phrase" else []},
            labels=labels,
            numbers=numbers,
        )


def _name(entry: Any) -> str | None:
    return Path(entry[0]).stem if _fault(entry) is None else None


def _row(_id: str, entry: Any) -> Record:
    image, caption, label, levels = entry
    return {"image": image, "captions": [caption], "label": label, "names": levels}


def _fault(entry: object) -> str | None:
    r"""What is wrong with an entry of ``anno.json``; None: nothing."""
    if not isinstance(entry, list) or len(entry) != 4:
        return f"{str(entry)[:200]}: expected [image, caption, label image, names]"
    image, caption, label, levels = entry
    if not inside(image) or not (label == "" or inside(label)):
        return f"{image!r} or {label!r} is no path inside the folder"
    if not isinstance(caption, str):
        return f"its caption is {caption!r}: expected a string"
    if not isinstance(levels, dict) or any(type(one) is not int for one in levels.values()):
        return f"its names are {str(levels)[:200]}: expected {{name: grey level}}"
    return None


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
