r"""GranD-f: photographs whose captions' phrases have masks (GLaMM, Rasheed et al., 2024).

Two forms are published (https://github.com/mbzuai-oryx/groundingLMM). Training lists: one entry an
image, ``{"file_name", "caption", "groundings": {phrase: {"token_positives": [start, end],
"rle_masks": [run lengths, …]}}}``. Val and test: a COCO file of captions with ``labels``, and one
of masks, the masks of an image in the order of its labels.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from captum_dcam.data.coco import union
from captum_dcam.data.coco_tables import by_id, by_image, read_table
from captum_dcam.data.common import BaseDataset, ImageId, Ledger, ObjectMask, Sample
from captum_dcam.data.files import distinct, expect, inside, read_json, select, stored_size
from captum_dcam.data.registry import register_dataset
from captum_dcam.errors import InputError
from captum_dcam.files import Record


class Split(NamedTuple):
    r"""Where the files of a split lie, and what TAM's public evaluation asks of it."""

    annotations: tuple[str, ...]
    images: str
    sentences: str


_HA = "GranDf_HA_images"
SPLITS = {
    "ha_train": Split(("train/GranDf_HA_GCG_train.json",), f"{_HA}/train", "two"),
    "val": Split(
        ("val_test/val_gcg_coco_caption_gt.json", "val_test/val_gcg_coco_mask_gt.json"),
        f"{_HA}/val_test",
        "two",
    ),
    "test": Split(
        ("val_test/test_gcg_coco_caption_gt.json", "val_test/test_gcg_coco_mask_gt.json"),
        f"{_HA}/val_test",
        "two",
    ),
    "openpsg_train": Split(("train/OpenPsgGCG_train.json",), "coco_2017/train2017", "three"),
    "openpsg_val": Split(("train/OpenPsgGCG_val.json",), "coco_2017/train2017", "three"),
}


class GrandfDataset(BaseDataset[Sample]):
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
        self._rows = {one: rows[one] for one in select(rows, ids, limit, report)}
        self.images_dir = Path(images_dir)
        self._prompt = prompt
        super().__init__(
            list(self._rows),
            report,
            {"file": sources[0].name, "annotations": digest, "prompt": prompt},
        )

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
    source = sources[0]
    table, digest = read_json(source, "GranD-f annotations")
    if not isinstance(table, list):
        raise InputError(f"{source} is a {type(table).__name__}: expected a list of images")
    good: list[tuple[str, Record]] = []
    for number, entry in enumerate(table):
        whole = entry if isinstance(entry, dict) else {}
        name = whole.get("file_name")
        fault = _fault(whole)
        stem = Path(name).stem if isinstance(name, str) else f"entry {number}"
        good.append((str(whole.get("image_id", stem)), {"fault": fault, **whole}))
    rows: dict[Any, Record] = {}
    for image_id, (_, entry) in zip(distinct(one for one, _ in good), good, strict=True):
        fault = entry["fault"]
        rows[image_id] = entry if fault else _row(image_id, entry)
        if fault:
            report(image_id, f"{source}: image {image_id}: {fault}")
    return rows, digest


def _fault(entry: Record) -> str | None:
    r"""What is wrong with an entry of a training list; None: nothing."""
    if not inside(entry.get("file_name")):
        return f"file_name is {entry.get('file_name')!r}: expected a name inside its folder"
    if not isinstance(entry.get("caption"), str) or not isinstance(entry.get("groundings"), dict):
        return f"it lacks a caption or groundings: {str(entry)[:200]}"
    for phrase, one in entry["groundings"].items():
        masks = one.get("rle_masks") if isinstance(one, dict) else None
        if not isinstance(masks, list):
            return f"the grounding of {phrase!r} has no list 'rle_masks': {str(one)[:80]}"
        span = one.get("token_positives") or [0, 0]
        if not isinstance(span, list) or [type(at) for at in span] != [int, int]:
            return f"token_positives of {phrase!r} is {str(span)[:80]}: expected [start, end]"
    return None


def _row(image_id: str, entry: Record) -> Record:
    size = (entry.get("height"), entry.get("width"))
    caption, spans = _unquoted(entry["caption"], entry["groundings"])
    return {
        "file_name": entry["file_name"],
        "size": size if all(isinstance(side, int) for side in size) else None,
        "caption": caption,
        "phrases": {
            phrase: [_mask(image_id, phrase, runs) for runs in one["rle_masks"]]
            for phrase, one in entry["groundings"].items()
        },
        "spans": spans,
    }


def _unquoted(raw: str, groundings: Record) -> tuple[str, dict[str, tuple[int, int]]]:
    r"""The caption without blanks and quotes around it, and the spans that hold its phrases.

    Readers of these files count ``token_positives`` from the stored text or from the stripped one;
    a span is kept by whichever fits its phrase, and a phrase that is not in the text has none.
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
        rows[image_id] = {"fault": fault}
        if fault:
            report(image_id, f"{sources[0]}: image {image_id}: {fault}")
            continue
        phrases: dict[str, list[Record]] = {}
        for label, part in zip(labels, parts, strict=True):
            phrases.setdefault(label, []).append(_mask(image_id, label, part["segmentation"]))
        size = (image.get("height"), image.get("width"))
        rows[image_id] = {
            "file_name": name,
            "size": size if all(isinstance(side, int) for side in size) else None,
            "caption": some[0]["caption"],
            "phrases": phrases,
            "spans": {},
        }
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
    *annotations, pictures = expect(
        f"GranD-f split {split!r}",
        root,
        [
            *(
                ("annotations", [t / "annotations" / one for t in tops])
                for one in parts.annotations
            ),
            ("the images", [Path(images)] if images is not None else folders),
        ],
    )
    default = f"Write a description for this image using around {parts.sentences} sentences:"
    return GrandfDataset(
        tuple(annotations),
        pictures,
        ids=ids,
        limit=limit,
        missing=missing,
        prompt=default if prompt is None else prompt,
    )
