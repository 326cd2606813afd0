r"""GranD-f: photographs whose captions' phrases have masks (GLaMM, Rasheed et al., 2024).

Two forms are published (https://github.com/mbzuai-oryx/groundingLMM). Training lists: one entry per
image, ``{"file_name", "caption", "groundings": {phrase: {"token_positives": [start, end],
"rle_masks": [run lengths, …]}}}``. Val and test: a COCO file of captions with ``labels``, and one
of masks, the masks of an image in the order of its labels.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from captum_dcam.data.coco import by_id, by_image
from captum_dcam.data.coco_masks import union
from captum_dcam.data.common import (
    ImageId,
    Ledger,
    ListedDataset,
    ObjectMask,
    Sample,
    register_dataset,
)
from captum_dcam.data.files import (
    expect,
    inside,
    read_entries,
    read_table,
    size_fault,
    stored_size,
)
from captum_dcam.errors import InputError
from captum_dcam.files import Record


class Split(NamedTuple):
    r"""Where the files of a split lie, and what TAM's public evaluation asks of it."""

    annotations: tuple[str, ...]
    images: str
    sentences: str


_HA = "GranDf_HA_images"
_TABLES = "val_test/{}_gcg_coco_caption_gt.json", "val_test/{}_gcg_coco_mask_gt.json"
SPLITS = {
    "ha_train": Split(("train/GranDf_HA_GCG_train.json",), f"{_HA}/train", "two"),
    **{
        name: Split(tuple(table.format(name) for table in _TABLES), f"{_HA}/val_test", "two")
        for name in ("val", "test")
    },
    "openpsg_train": Split(("train/OpenPsgGCG_train.json",), "coco_2017/train2017", "three"),
    "openpsg_val": Split(("train/OpenPsgGCG_val.json",), "coco_2017/train2017", "three"),
}


class GrandfDataset(ListedDataset[Sample]):
    r"""Photographs with a caption and a mask for its phrases, in the order of their ids.

    The objects' names are the phrases as annotated. ``extra`` holds ``spans`` (phrase → (start,
    end) in the caption, where it holds) and ``ungrounded`` (phrases listed without any mask).

    Args:
        annotations (paths): one training list, or the captions and the masks of val or test.
        images_dir (path): the folder that file names count from.
        ids, limit, missing, prompt: as :class:`~captum_dcam.data.coco.CocoDataset`.

    Raises:
        FileNotFoundError: annotations that are not there.
        ValueError: not GranD-f's format.
    """

    name = "grandf"
    kind = "phrase"

    def __init__(
        self,
        annotations: tuple[str | Path, ...],
        images_dir: str | Path,
        *,
        ids: str | Path | Iterable[Any] | None = None,
        limit: int | None = None,
        missing: str = "raise",
        prompt: str | None = None,
    ) -> None:
        report = Ledger(missing)
        sources = [Path(one) for one in annotations]
        if len(sources) not in (1, 2):
            raise InputError(f"{len(sources)} annotation files: expected a list, or two tables")
        read = _read_list if len(sources) == 1 else _read_tables
        rows, digest = read(sources, report)
        self.images_dir = Path(images_dir)
        settings = {"file": sources[0].name, "annotations": digest}
        super().__init__(rows, report, settings, ids=ids, limit=limit, prompt=prompt)

    def _sample(self, image_id: ImageId) -> Sample:
        row = self._rows[image_id]
        path = self.images_dir / row["file_name"]
        height, width = row["size"] or stored_size(path, image_id)
        return Sample(
            image_id=image_id,
            path=path,
            height=height,
            width=width,
            captions=[row["caption"]],
            prompt=self._prompt,
            objects=tuple(
                ObjectMask(phrase, (phrase,), partial(union, masks, (height, width)))
                for phrase, masks in row["phrases"].items()
                if masks
            ),
            extra={
                "spans": dict(row["spans"]),
                "ungrounded": [phrase for phrase, masks in row["phrases"].items() if not masks],
            },
        )


def _read_list(sources: list[Path], report: Ledger) -> tuple[dict[Any, Record], str]:
    r"""A training list: rows by the image's id, or its file's stem where it has none."""
    what = "GranD-f annotations"
    return read_entries(sources[0], what, report, name=_name, fault=_fault, row=_listed_row)


def _name(entry: Any) -> str | None:
    whole = entry if isinstance(entry, dict) else {}
    name = whole.get("file_name")
    if "image_id" in whole:
        return str(whole["image_id"])
    return Path(name).stem if isinstance(name, str) else None


def _fault(entry: Any) -> str | None:
    r"""What is wrong with an entry of a training list; None: nothing."""
    whole = entry if isinstance(entry, dict) else {}
    if not inside(whole.get("file_name")):
        return f"file_name is {whole.get('file_name')!r}: expected a name inside its folder"
    if not isinstance(whole.get("caption"), str) or not isinstance(whole.get("groundings"), dict):
        return f"it lacks a caption or groundings: {str(whole)[:200]}"
    for phrase, one in whole["groundings"].items():
        masks = one.get("rle_masks") if isinstance(one, dict) else None
        if not isinstance(masks, list):
            return f"the grounding of {phrase!r} has no list 'rle_masks': {str(one)[:80]}"
        span = one.get("token_positives") or [0, 0]
        if not isinstance(span, list) or [type(at) for at in span] != [int, int]:
            return f"token_positives of {phrase!r} is {str(span)[:80]}: expected [start, end]"
    return None


def _listed_row(image_id: str, entry: Any) -> Record:
    caption, spans = _unquoted(entry["caption"], entry["groundings"])
    phrases = {
        phrase: [_mask(image_id, phrase, runs) for runs in one["rle_masks"]]
        for phrase, one in entry["groundings"].items()
    }
    return _row(entry, entry["file_name"], caption, phrases, spans)


def _row(
    image: Record,
    file_name: str,
    caption: str,
    phrases: dict[str, list[Record]],
    spans: dict[str, tuple[int, int]],
) -> Record:
    size = (image.get("height"), image.get("width"))
    return {
        "file_name": file_name,
        "size": None if size_fault(size) else size,
        "caption": caption,
        "phrases": phrases,
        "spans": spans,
    }


def _unquoted(raw: str, groundings: Record) -> tuple[str, dict[str, tuple[int, int]]]:
    r"""The caption without blanks and quotes around it, and the spans that hold its phrases.

    ``token_positives`` may count from the stored text or from the stripped one. A phrase keeps the
    span that fits it; a phrase that is not in the text has none.
    """
    caption = raw.strip().strip('"').strip()
    spans = {}
    for phrase, one in groundings.items():
        span = one.get("token_positives") or [0, 0]
        for shift in (0, raw.index(caption)):
            start, end = span[0] - shift, span[1] - shift
            if start >= 0 and caption[start:end].lower() == phrase.lower():
                spans[phrase] = (start, end)
                break
    return caption, spans


def _mask(image_id: Any, phrase: str, runs: object) -> Record:
    r"""Run lengths as COCO's annotation, which the error of a damaged one names."""
    return {"id": repr(phrase), "image_id": image_id, "segmentation": runs}


def _read_tables(sources: list[Path], report: Ledger) -> tuple[dict[Any, Record], str]:
    r"""Val or test: rows by the image's id."""
    texts, digest = read_table(sources[0], "images", "annotations")
    masks, more = read_table(sources[1], "annotations")
    images = by_id(texts, "images", (), sources[0], report)
    fields = ("image_id", "caption", "labels")
    captions = by_image(texts, fields, set(images), sources[0], report)
    shapes = by_image(masks, ("image_id", "segmentation"), set(images), sources[1], report)
    rows: dict[Any, Record] = {}
    for image_id, image in images.items():
        some, parts = captions.get(image_id, []), shapes.get(image_id, [])
        labels = some[0]["labels"] if some else []
        name = image.get("file_name") or f"{image_id}.jpg"
        fault = None
        if len(some) != 1 or not isinstance(some[0]["caption"], str):
            fault = f"it has {len(some)} captions: expected one, a string"
        elif not _texts(labels) or len(labels) != len(parts):
            fault = f"it has {len(parts)} masks and the labels {labels}: expected one each"
        elif not inside(name):
            fault = f"file_name is {name!r}: expected a name inside its folder"
        rows[image_id] = {}
        if fault:
            report(image_id, f"{sources[0]}: image {image_id}: {fault}")
            continue
        phrases: dict[str, list[Record]] = {}
        for label, part in zip(labels, parts, strict=True):
            phrases.setdefault(label, []).append(_mask(image_id, label, part["segmentation"]))
        rows[image_id] = _row(image, name, some[0]["caption"], phrases, {})
    return rows, digest + more


def _texts(labels: object) -> bool:
    return isinstance(labels, list) and all(isinstance(one, str) for one in labels)


@register_dataset("grandf")
def open_grandf(
    root: str | Path,
    split: str = "ha_train",
    *,
    images: str | Path | None = None,
    ids: str | Path | Iterable[Any] | None = None,
    limit: int | None = None,
    missing: str = "raise",
    prompt: str | None = None,
) -> GrandfDataset:
    r"""GranD-f in its published layout: ``GranDf/annotations`` beside ``GranDf_HA_images`` and
    ``coco_2017`` (or with these inside ``GranDf``).

    Args:
        root (path): the folder ``GranDf``, or the one that holds it.
        split (str): ``ha_train`` is the human-annotated set of 1,000 images; ``val``, ``test``;
            ``openpsg_train`` and ``openpsg_val`` are OpenPSG's images with captions.
        images (path): the images' folder, where it is another one.
        prompt (str): Default: TAM's, for two sentences, or three for OpenPSG.
    """
    if split not in SPLITS:
        raise InputError(f"split is {split!r}: expected one of {', '.join(SPLITS)}")
    root, parts = Path(root), SPLITS[split]
    tops = [root / "GranDf", root]
    folders = [top / parts.images for top in (root / "GranDf", root, root.parent)]
    *annotations, found = expect(
        f"GranD-f split {split!r}",
        root,
        [
            *(
                ("annotations", [top / "annotations" / one for top in tops])
                for one in parts.annotations
            ),
            ("the images", [Path(images)] if images is not None else folders),
        ],
    )
    default = f"Write a description for this image using around {parts.sentences} sentences:"
    prompt = default if prompt is None else prompt
    options: dict[str, Any] = {"ids": ids, "limit": limit, "missing": missing, "prompt": prompt}
    return GrandfDataset(tuple(annotations), found, **options)
