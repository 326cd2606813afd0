r"""HalLoc: answers with invented words put into them, each marked with what is wrong.

Park, Kim and Kim, CVPR 2025 (https://github.com/dbsltm/cvpr25_halloc). A JSON list of
``{"id", "image_id", "prompt": "<image> …", "hallucinated_text", "tokenized_text", "annotations"}``;
``annotations`` has a list for each kind, and an entry of a list has for each of its parts
``{"name", "char_index": "start:stop", "token_index"}``. The images are Visual Genome's and COCO's.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import Any

from captum_dcam.data.common import LABELS, ImageId, Span, register_dataset
from captum_dcam.data.files import expect, read_json
from captum_dcam.data.spans import SpanSample, SpansDataset, part
from captum_dcam.errors import InputError
from captum_dcam.files import Record, reading
from captum_dcam.model.tagging import NOUN_TAGS, tag

#: what is wrong with a span
KINDS = ("object", "attribute", "relationship", "scene", "other")
_FOLDERS = ("VG_100K", "VG_100K_2")
#: of the words that no span holds, those that say something of the image
_CONTENT = NOUN_TAGS | {"JJ", "VB", "VBG", "VBN", "VBZ", "CD"}


class HallocSample(SpanSample):
    r"""A text with its invented spans."""

    def judged(self, answer: str) -> tuple[Span, ...]:
        r"""As :class:`SpanSample`, and the nouns, adjectives, verbs and numbers that no span holds,
        each true: they were not altered."""
        invented = super().judged(answer)
        words = list(re.finditer(r"[\w'-]+", answer))
        tags = tag([word[0] for word in words])
        true = [
            Span(word.start(), word.end(), word[0], LABELS[0])
            for word, own in zip(words, tags, strict=True)
            if own in _CONTENT
            and all(word.end() <= s.start or s.stop <= word.start() for s in invented)
        ]
        return (*invented, *true)


@register_dataset("halloc")
class HallocDataset(SpansDataset):
    r"""Texts with their invented spans, in the order of their ids; there are no masks.

    Every span is ``"invented"``, its ``kind`` one of :data:`KINDS`; what no span holds was not
    altered. An attribute's spans are its object and the attribute, a relationship's its two objects
    and what is said of them.

    Args:
        root (path): the folder with the annotations, or with ``data`` that holds them.
        split (str): ``train``, ``val`` or ``test``: the name of the file, without its ending.
        annotations (path): another file.
        images (path): a folder with images, of Visual Genome or of COCO. Default: ``VG_100K`` and
            ``VG_100K_2`` in ``root``
        ids, limit, missing: as :class:`~captum_dcam.data.coco.CocoDataset`.
        prompt (str): not used: every text has its own.
    """

    name = "halloc"

    def __init__(
        self,
        root: str | Path,
        split: str = "test",
        *,
        annotations: str | Path | None = None,
        images: str | Path | None = None,
        ids: str | Path | Iterable[Any] | None = None,
        limit: int | None = None,
        missing: str = "raise",
        prompt: str | None = None,
    ) -> None:
        root, name = Path(root), f"{split}.json"
        folders = [root / one for one in _FOLDERS] if images is None else [Path(images).resolve()]
        source, first = expect(
            f"HalLoc split {split!r}",
            root,
            [
                (
                    "the annotations",
                    [root / name, root / "data" / name]
                    if annotations is None
                    else [Path(annotations)],
                ),
                ("the images", folders),
            ],
        )
        table, _ = read_json(source, "HalLoc annotations")
        if not isinstance(table, list):
            raise InputError(f"{source} is a {type(table).__name__}: expected a list of texts")
        with reading(root):
            known = {
                path.name: f"{folder.name}/{path.name}"
                for folder in folders
                if folder.is_dir()
                for path in folder.iterdir()
            }
        entries = [(f"entry {number}", entry) for number, entry in enumerate(table)]
        records = partial(_records, known, first.name)
        options: dict[str, Any] = {"ids": ids, "limit": limit, "missing": missing}
        super().__init__(entries, records, source, first.parent, prompt=prompt, **options)

    def _sample(self, image_id: ImageId) -> HallocSample:
        return HallocSample(**vars(super()._sample(image_id)))


def _records(known: dict[str, str], folder: str, entry: Any) -> list[Record]:
    text = part(entry, "hallucinated_text", str)
    spans = []
    for kind in part(entry, "annotations", dict):
        if kind not in KINDS:
            raise InputError(f"annotations of {kind!r}: expected {', '.join(KINDS)}")
        for one in part(entry["annotations"], kind, list):
            spans += _spans(one, kind)
    return [
        {
            "id": entry.get("id"),
            "image": _image(entry.get("image_id"), known, folder),
            "prompt": part(entry, "prompt", str).replace("<image>", "").strip(),
            "text": text,
            "spans": spans,
        }
    ]


def _spans(one: object, kind: str) -> list[Record]:
    r"""The parts of one annotation."""
    parts = [row for row in one.values() if isinstance(row, dict)] if isinstance(one, dict) else []
    if not parts:
        raise InputError(f"{str(one)[:80]} of {kind!r} has no part with name and char_index")
    spans = []
    for row in parts:
        found = re.fullmatch(r"([0-9]{1,9}):([0-9]{1,9})", part(row, "char_index", str))
        if found is None:
            raise InputError(f"char_index is {row['char_index']!r}: expected 'start:stop'")
        place = {"start": int(found[1]), "stop": int(found[2]), "text": part(row, "name", str)}
        spans.append({**place, "label": "invented", "kind": kind})
    return spans


def _image(image_id: object, known: dict[str, str], folder: str) -> str:
    r"""The file of an image: its id as it stands, or as Visual Genome or COCO name it."""
    if type(image_id) not in (int, str):
        raise InputError(f"image_id is {image_id!r}: expected a whole number or text")
    names = [str(image_id), f"{image_id}.jpg", f"{image_id:0>12}.jpg"]
    names += [f"COCO_{split}_{names[2]}" for split in ("train2014", "val2014")]
    return next((known[name] for name in names if name in known), f"{folder}/{names[1]}")
