r"""RefCOCO, RefCOCO+ and RefCOCOg: expressions that single out one object of a photograph.

The layout of the public reader (https://github.com/lichengunc/refer): a folder per data set with
``instances.json``, COCO's format, and ``refs(unc).p``, a pickled list of ``{"ref_id", "ann_id",
"image_id", "category_id", "split", "sentences": [{"sent_id", "sent", …}]}``. The images are COCO's
train2014.
"""

from __future__ import annotations

import io
import pickle
from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import Any

from captum_dcam.data.coco import by_id
from captum_dcam.data.common import register_dataset
from captum_dcam.data.files import expect, read_table
from captum_dcam.data.spans import SpansDataset, part
from captum_dcam.errors import InputError
from captum_dcam.files import Record, reading

#: what damaged bytes raise on being unpickled
_DAMAGES = (
    *(pickle.UnpicklingError, EOFError, ValueError, LookupError),
    *(TypeError, AttributeError, OverflowError),
)
SETS = ("refcoco", "refcoco+", "refcocog")


@register_dataset("refcoco")
class RefcocoDataset(SpansDataset):
    r"""Referring expressions, in the order of their ids; the span is the whole expression.

    Its mask is the object's.

    Args:
        root (path): the folder that holds those of the data sets, or the data set's own.
        split (str): ``val``, ``testA``, ``testB``, ``train``, or what the file has.
        which (str): ``refcoco``, ``refcoco+`` or ``refcocog``.
        by (str): whose splits: ``unc``, or for refcocog ``umd`` or ``google``.
        images (path): the images' folder. Default: ``images/mscoco/images/train2014``,
            ``train2014`` or ``coco/train2014`` in ``root``
        ids, limit, missing, prompt: as :class:`~captum_dcam.data.coco.CocoDataset`.
    """

    name = "refcoco"

    def __init__(
        self,
        root: str | Path,
        split: str = "val",
        *,
        which: str = "refcoco",
        by: str = "unc",
        images: str | Path | None = None,
        ids: str | Path | Iterable[Any] | None = None,
        limit: int | None = None,
        missing: str = "raise",
        prompt: str | None = None,
    ) -> None:
        if which not in SETS:
            raise InputError(f"which is {which!r}: expected one of {', '.join(SETS)}")
        root, refs = Path(root), f"refs({by}).p"
        tops = [root / which, root]
        inner = ("images/mscoco/images/train2014", "train2014", "coco/train2014")
        folders = [root / one for one in inner]
        source, instances, folder = expect(
            f"data set {which}",
            root,
            [
                ("the expressions", [top / refs for top in tops]),
                ("the masks", [top / "instances.json" for top in tops]),
                ("the images", folders if images is None else [Path(images)]),
            ],
        )
        listed = [ref for ref in _unpickled(source) if isinstance(ref, dict)]
        chosen = [ref for ref in listed if ref.get("split") == split]
        if not chosen:
            here = ", ".join(sorted({str(ref.get("split")) for ref in listed})) or "none"
            raise InputError(f"{source} has no split {split!r}; it has {here}")
        table, _ = read_table(instances, "images", "annotations")
        pictures = by_id(table, "images", ("file_name", "height", "width"), instances)
        masks = by_id(table, "annotations", ("image_id", "segmentation"), instances)
        entries = [(f"ref {ref.get('ref_id')}", ref) for ref in chosen]
        records = partial(_records, pictures, masks)
        options: dict[str, Any] = {"ids": ids, "limit": limit, "missing": missing}
        super().__init__(entries, records, source, folder, prompt=prompt, **options)


class _Plain(pickle.Unpickler):
    r"""Reads lists, texts and numbers; what would run code is refused."""

    def find_class(self, module: str, name: str) -> Any:
        raise pickle.UnpicklingError(f"it would run {module}.{name}")


def _unpickled(source: Path) -> list[Any]:
    with reading(source):
        data = source.read_bytes()
    try:
        found = _Plain(io.BytesIO(data), encoding="utf-8").load()
    except _DAMAGES as error:
        raise InputError(
            f"{source} is damaged or no plain pickle ({error}): fetch it again"
        ) from error
    if not isinstance(found, list):
        raise InputError(f"{source} is a {type(found).__name__}: expected a list of references")
    return found


def _records(pictures: dict[Any, Record], masks: dict[Any, Record], ref: Any) -> list[Record]:
    mask = masks.get(part(ref, "ann_id", int))
    if mask is None:
        raise InputError(f"annotation {ref['ann_id']} is not in instances.json")
    image = pictures.get(mask["image_id"])
    if image is None:
        raise InputError(f"image {mask['image_id']} is not in instances.json")
    found = []
    for one in part(ref, "sentences", list):
        text = part(one, "sent", str)
        span = {"start": 0, "stop": len(text), "mask": mask["segmentation"]}
        size = {"height": image["height"], "width": image["width"]}
        about = {"id": part(one, "sent_id", int), "image": image["file_name"], **size}
        found.append({**about, "text": text, "spans": [span]})
    return found
