r"""Flickr30k Entities: captions whose phrases have boxes (Plummer et al., 2015).

The layout of https://github.com/BryanPlummer/flickr30k_entities: ``Sentences/<image>.txt`` has a
caption per line, ``[/EN#3/clothing green shirts]`` being a phrase with the number of what it names;
``Annotations/<image>.xml`` has boxes by these numbers, counted from 1 with both ends inside;
``test.txt`` and its like list the images of a split.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from captum_dcam.data.coco import PROMPT
from captum_dcam.data.common import register_dataset
from captum_dcam.data.files import expect
from captum_dcam.data.spans import SpansDataset
from captum_dcam.errors import FileError, InputError
from captum_dcam.files import Record, reading

SPLITS = ("test", "val", "train")
_PHRASE = re.compile(r"\[/EN#(\d+)/(\S+)\s+([^\]]*?)\s*\]")


@register_dataset("flickr30k")
class Flickr30kDataset(SpansDataset):
    r"""Captions, in the order of their ids: the image's, and the caption's number from 1.

    Spans are phrases, their ``kind`` what the data set calls them (``people``, ``clothing``;
    ``bodyparts/people`` where it has two). What is the whole scene, or is not seen, has no box.
    Captions that ``UNRELATED_CAPTIONS`` lists, where this file is there, are left out.

    Args:
        root (path): the folder with ``Annotations``, ``Sentences`` and the lists of the splits.
        split (str): ``test``, ``val`` or ``train``.
        images (path): the images' folder. Default: ``flickr30k-images``, ``flickr30k_images`` or
            ``images`` in ``root``
        ids, limit, missing: as :class:`~captum_dcam.data.coco.CocoDataset`.
        prompt (str): what to ask of every image. Default: as of COCO's
    """

    name = "flickr30k"

    def __init__(
        self,
        root: str | Path,
        split: str = "test",
        *,
        images: str | Path | None = None,
        ids: str | Path | Iterable[Any] | None = None,
        limit: int | None = None,
        missing: str = "raise",
        prompt: str = PROMPT,
    ) -> None:
        if split not in SPLITS:
            raise InputError(f"split is {split!r}: expected one of {', '.join(SPLITS)}")
        root = Path(root)
        folders = [root / one for one in ("flickr30k-images", "flickr30k_images", "images")]
        source, sentences, boxes, folder = expect(
            f"Flickr30k Entities split {split!r}",
            root,
            [
                ("the split", [root / f"{split}.txt"]),
                ("the captions", [root / "Sentences"]),
                ("the boxes", [root / "Annotations"]),
                ("the images", folders if images is None else [Path(images)]),
            ],
        )
        unrelated = root / "UNRELATED_CAPTIONS"
        lines = _lines(unrelated) if unrelated.is_file() else []
        left_out = {"#".join(line.split()) for line in lines}
        entries = [(f"image {one}", one) for one in dict.fromkeys(_lines(source)) if one]
        records = partial(_records, sentences, boxes, left_out)
        options: dict[str, Any] = {"ids": ids, "limit": limit, "missing": missing}
        super().__init__(entries, records, source, folder, prompt=prompt, **options)


def _lines(path: Path) -> list[str]:
    try:
        with reading(path):
            return [line.strip() for line in path.read_text(encoding="utf-8").split("\n")]
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is damaged or no text in UTF-8 ({error})") from error


def _records(sentences: Path, annotations: Path, left_out: set[str], image: str) -> list[Record]:
    r"""The captions of an image."""
    try:
        captions = [line for line in _lines(sentences / f"{image}.txt") if line]
        size, boxes = _read_boxes(annotations / f"{image}.xml")
    except FileError as error:
        raise InputError(str(error)) from error
    found = []
    for number, line in enumerate(captions, 1):
        text, spans = _parse(line, boxes)
        if f"{image}#{number}" not in left_out:
            about = {"id": f"{image}#{number}", "image": f"{image}.jpg", **size}
            found.append({**about, "text": text, "spans": spans})
    return found


def _parse(line: str, boxes: dict[str, list[list[int]]]) -> tuple[str, list[Record]]:
    r"""A caption without its brackets, and the spans that they were."""
    text, spans, at = "", [], 0
    for found in _PHRASE.finditer(line):
        text += line[at : found.start()]
        number, kind, phrase = found.groups()
        span: Record = {"start": len(text), "stop": len(text) + len(phrase), "kind": kind}
        spans.append({**span, "boxes": boxes[number]} if number in boxes else span)
        text += phrase
        at = found.end()
    text += line[at:]
    if "/EN#" in text:
        raise InputError(f"the caption {line!r} has a bracket that is not closed, or no phrase")
    return text, spans


def _read_boxes(path: Path) -> tuple[Record, dict[str, list[list[int]]]]:
    r"""The size of an image, and the boxes of each number."""
    boxes: dict[str, list[list[int]]] = {}
    try:
        with reading(path):
            tree = ElementTree.fromstring(path.read_bytes())
        size = {side: _number(tree, f"size/{side}") for side in ("height", "width")}
        for item in tree.findall("object"):
            box = item.find("bndbox")
            if box is not None:
                left, top = (max(_number(box, edge) - 1, 0) for edge in ("xmin", "ymin"))
                edges = [left, top, _number(box, "xmax"), _number(box, "ymax")]
                for name in item.findall("name"):
                    boxes.setdefault(name.text or "", []).append(edges)
    except ElementTree.ParseError as error:
        raise InputError(f"{path} is damaged or no XML ({error}): fetch it again") from error
    except ValueError as error:
        raise InputError(f"{path}: {error}") from error
    return size, boxes


def _number(tree: ElementTree.Element, name: str) -> int:
    text = tree.findtext(name)
    if text is None or not text.strip().isdecimal():
        raise InputError(f"{name} is {text!r}: expected a whole number of pixels")
    return int(text)
