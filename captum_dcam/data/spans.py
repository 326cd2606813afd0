r"""Texts whose spans are labelled: where they lie in the image, and whether they are true.

One JSON object per line of ``spans.jsonl``, in UTF-8::

    {"image": "images/7.jpg", "text": "A red dog sleeps .", "spans": [
      {"start": 0, "stop": 9, "boxes": [[12, 30, 96, 80]]},
      {"start": 2, "stop": 5, "label": "invented", "kind": "attribute"}]}

``spans`` count characters of ``text``, or, where a line has none, of its ``prompt``. Each may have
the ``text`` that it must hold; a ``label``, ``"true"`` or ``"invented"``; a ``kind``, any word; and
``boxes`` [left, top, right, bottom] or a ``mask`` as COCO's ``segmentation``, in pixels of the
image as it is stored. A line may also have ``id``, ``prompt``, ``height`` and ``width``. The
readers of published data sets (:mod:`~captum_dcam.data.flickr30k`, :mod:`~captum_dcam.data.halloc`,
:mod:`~captum_dcam.data.refcoco`, :mod:`~captum_dcam.data.repope`) make such lines of their entries;
:func:`write_spans` writes them to a file.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import numpy as np

from captum_dcam.data.coco_masks import union
from captum_dcam.data.common import (
    LABELS,
    ImageId,
    Ledger,
    ListedDataset,
    Mask,
    ObjectMask,
    Sample,
    Setting,
    Span,
    register_dataset,
)
from captum_dcam.data.files import expect, inside, read_lines, size_fault, stored_size
from captum_dcam.errors import InputError
from captum_dcam.files import Record, canonical, digest, write_text

FILE = "spans.jsonl"
_KEYS = ("id", "image", "height", "width", "prompt", "text", "spans")
_SPAN_KEYS = ("start", "stop", "text", "label", "kind", "boxes", "mask")
_TYPES: dict[type, str] = {str: "text", int: "a whole number", list: "a list", dict: "an object"}
_ARTICLES = ("a ", "an ", "the ")

T = TypeVar("T")
#: where an entry of a source stands, and what it holds
Entry = tuple[str, Any]


@dataclass(frozen=True, eq=False, kw_only=True)
class SpanSample(Sample):
    r"""An image, a text and the spans of the text; its objects are the spans that lie somewhere,
    those of one wording (case aside) together.

    Attributes:
        text (str): what the spans count from: the only one of ``captions``, or, without any, the
            prompt.
        spans (tuple of Span): as the data set orders them; they may overlap.
    """

    text: str
    spans: tuple[Span, ...]

    def judged(self, answer: str) -> tuple[Span, ...]:
        r"""The labelled spans of an answer that is the sample's own text, which the model was
        given; or, where the spans count from the prompt, a question of yes or no, the answer's
        first "yes" or "no": true if it is what the label of the asked span says."""
        labelled = tuple(span for span in self.spans if span.label is not None)
        if not labelled:
            raise InputError(
                f"image {self.image_id}: no span has a label, true or invented: nothing says "
                "whether its words are so"
            )
        if self.captions:
            start = answer.find(self.text)
            if start < 0:
                raise InputError(
                    f"image {self.image_id}: its spans are of {self.text[:60]!r}, and the answer "
                    f"is {answer[:60]!r}: force the sample's text (answer: caption 0)"
                )
            return tuple(
                replace(span, start=span.start + start, stop=span.stop + start, read=None)
                for span in labelled
            )
        said = re.search(r"\b(yes|no)\b", answer, re.IGNORECASE)
        if said is None:
            return ()
        right = (said[0].lower() == "yes") == (labelled[0].label == LABELS[0])
        return (Span(said.start(), said.end(), said[0], LABELS[not right], "answer"),)


class SpansDataset(ListedDataset[SpanSample]):
    r"""Texts with labelled spans, in the order of their ids.

    An image may have several texts, each a sample of its own. What resamples or splits by id does
    not keep these together; their ``path`` does.

    Args:
        entries (iterable): (where it stands, what it holds) for each entry of the source.
        records (callable): one entry → its lines, as the module says; InputError for a fault.
        source (path): what the entries were read from, for messages.
        images_dir (path): the folder that ``image`` counts from.
        ids, limit, missing: as :class:`~captum_dcam.data.coco.CocoDataset`; the id of a line
            without one is where it stands.
        prompt (str): what to ask where a line says nothing.

    Raises:
        ValueError: a fault of an entry; names the source and where it stands.
    """

    name: ClassVar[str] = "spans"
    kind = "phrase"

    def __init__(
        self,
        entries: Iterable[Entry],
        records: Callable[[Any], Iterable[Record]],
        source: Path,
        images_dir: Path,
        *,
        ids: str | Path | Iterable[Any] | None = None,
        limit: int | None = None,
        missing: str = "raise",
        prompt: str | None = None,
    ) -> None:
        report = Ledger(missing)
        self.images_dir = images_dir
        rows: dict[Any, Record] = {}
        content = ""
        for where, entry in entries:
            try:
                for record in records(entry):
                    check_record(record)
                    image_id = record.get("id", where)
                    if image_id in rows:
                        raise InputError(f"the id {image_id!r} occurs twice")
                    content = digest(content + canonical(record, ascii_only=True))
                    rows[image_id] = record
            except InputError as error:
                rows.setdefault(where, {})
                report(where, f"{source}, {where}: {error}")
        settings: dict[str, Setting] = {"annotations": content[:16]}
        super().__init__(rows, report, settings, ids=ids, limit=limit, prompt=prompt)

    def line(self, image_id: ImageId) -> Record:
        r"""What the data set says of a sample, as a line of the format above."""
        return {**self._rows[image_id], "id": image_id}

    def _sample(self, image_id: ImageId) -> SpanSample:
        row = self._rows[image_id]
        path = self.images_dir / row["image"]
        given = row.get("height") is not None
        size = (row["height"], row["width"]) if given else stored_size(path, image_id)
        prompt = row.get("prompt", self._prompt)
        text = row.get("text", prompt)
        spans = tuple(_span(text, one, size, image_id) for one in row["spans"])
        placed: dict[str, list[Span]] = {}
        for span in spans:
            if span.read is not None:
                placed.setdefault(span.text.lower(), []).append(span)
        return SpanSample(
            image_id=image_id,
            path=path,
            height=size[0],
            width=size[1],
            captions=[text] if "text" in row else [],
            prompt=prompt,
            objects=tuple(
                ObjectMask(same[0].text, spoken(same[0].text), partial(_together, same))
                for same in placed.values()
            ),
            text=text,
            spans=spans,
        )


def write_spans(path: str | Path, data: SpansDataset) -> None:
    r"""Write the lines of a data set, all of them or nothing; what ``missing="skip"`` leaves out is
    left out here as well.

    Args:
        path (path): of the file, ``spans.jsonl``.
        data (SpansDataset): its images stay where they are: open the file with ``images=`` their
            folder, ``data.images_dir``.

    Raises:
        ValueError: a sample with a fault.
        OSError: a missing image whose size is not known, or the file cannot be written.
    """
    lines = [canonical(data.line(sample.image_id)) for sample in data]
    write_text(Path(path), "".join(line + "\n" for line in lines))


def spoken(phrase: str) -> tuple[str, ...]:
    r"""Ways to say a phrase: itself, and without its article."""
    bare = next((phrase[len(a) :] for a in _ARTICLES if phrase.lower().startswith(a)), "")
    return (phrase, bare) if bare.strip() else (phrase,)


# -- one line --------------------------------------------------------------------------------------


def part(entry: object, key: str, kind: type[T]) -> T:
    r"""What an entry has under a key; InputError for another type."""
    if not isinstance(entry, dict):
        raise InputError(f"it is {str(entry)[:80]!r}: expected an object with {key!r}")
    found = entry.get(key)
    if type(found) is not kind:  # a bool is no whole number
        raise InputError(f"{key} is {str(found)[:80]!r}: expected {_TYPES[kind]}")
    return found


def check_record(record: object) -> None:
    r"""InputError for what is wrong with a line, before any image is opened."""
    image = part(record, "image", str)
    assert isinstance(record, dict)
    _known(record, _KEYS, "a line")
    if not inside(image):
        raise InputError(f"image is {image!r}: expected a path inside the folder of the images")
    if type(record.get("id", 0)) not in (int, str):
        raise InputError(f"id is {record['id']!r}: expected a whole number or text")
    size = (record.get("height"), record.get("width"))
    if size != (None, None) and (fault := size_fault(size)):
        raise InputError(fault)
    for key in ("prompt", "text"):
        if key in record:
            part(record, key, str)
    text = record.get("text", record.get("prompt"))
    if text is None:
        raise InputError("it has neither text nor prompt: expected what the spans count from")
    for span in part(record, "spans", list):
        _check_span(span, text)


def _check_span(span: object, text: str) -> None:
    start, stop = part(span, "start", int), part(span, "stop", int)
    assert isinstance(span, dict)
    _known(span, _SPAN_KEYS, "a span")
    if not 0 <= start < stop <= len(text):
        raise InputError(
            f"the span {start} to {stop} is outside of its text, which has {len(text)} characters: "
            f"expected 0 ≤ start < stop ≤ {len(text)}"
        )
    if "text" in span and part(span, "text", str).lower() != text[start:stop].lower():
        raise InputError(
            f"the span {start} to {stop} is {text[start:stop]!r}, not {span['text']!r}: does it "
            f"count from another text?"
        )
    label = span.get("label")
    if label is not None and label not in LABELS:
        raise InputError(
            f"the label of {text[start:stop]!r} is {label!r}: expected {' or '.join(LABELS)}, or "
            f"none where it is not known"
        )
    if span.get("kind") is not None:
        part(span, "kind", str)
    if "boxes" in span and "mask" in span:
        raise InputError(f"{text[start:stop]!r} has boxes and a mask: give one of them")
    for box in part(span, "boxes", list) if "boxes" in span else ():
        _check_box(box)


def _check_box(box: object) -> None:
    edges: list[Any] = box if isinstance(box, list) and len(box) == 4 else [None]
    if not all(type(edge) in (int, float) and abs(edge) < math.inf for edge in edges):
        raise InputError(f"the box {str(box)[:80]} is not [left, top, right, bottom] in pixels")
    if edges[0] >= edges[2] or edges[1] >= edges[3]:
        raise InputError(
            f"the box {box} is empty: expected [left, top, right, bottom]; COCO's own boxes are "
            f"[left, top, width, height]"
        )


def _known(found: Record, keys: tuple[str, ...], what: str) -> None:
    if unknown := sorted(set(found) - set(keys)):
        raise InputError(f"{what} has no {unknown[0]!r}; it may have {', '.join(keys)}")


# -- where a span lies -----------------------------------------------------------------------------


def _span(text: str, row: Record, size: tuple[int, int], image_id: ImageId) -> Span:
    start, stop = row["start"], row["stop"]
    said = text[start:stop]
    read: Callable[[], Mask] | None = None
    if row.get("boxes"):
        for box in row["boxes"]:
            if min(box) < 0 or box[2] > size[1] or box[3] > size[0]:
                raise InputError(
                    f"image {image_id}: the box {box} of {said!r} is outside of the image of "
                    f"{size[1]}×{size[0]} px: does it belong to another size of the image?"
                )
        read = partial(_boxed, row["boxes"], size, f"image {image_id}: the boxes of {said!r}")
    elif "mask" in row:
        coco = {"id": repr(said), "image_id": image_id, "segmentation": row["mask"]}
        read = partial(union, [coco], size)
    return Span(start, stop, said, row.get("label"), row.get("kind"), read)


def _boxed(boxes: list[list[float]], size: tuple[int, int], what: str) -> Mask:
    r"""The pixels (H, W) whose centres lie in some of the boxes."""
    whole = np.zeros(size, dtype=bool)
    for box in boxes:
        left, top, right, bottom = (math.ceil(edge - 0.5) for edge in box)
        whole[top:bottom, left:right] = True
    if not whole.any():
        raise InputError(f"{what} hold no pixel: {boxes}")
    return whole


def _together(spans: list[Span]) -> Mask:
    masks = [span.read() for span in spans if span.read is not None]
    found: Mask = np.logical_or.reduce(masks)
    return found


@register_dataset("spans")
def open_spans(
    root: str | Path,
    *,
    file: str = FILE,
    images: str | Path | None = None,
    ids: str | Path | Iterable[Any] | None = None,
    limit: int | None = None,
    missing: str = "raise",
    prompt: str | None = None,
) -> SpansDataset:
    r"""A file of lines as :mod:`captum_dcam.data.spans` describes them.

    Args:
        root (path): the folder that holds the file.
        file (str): its name. Default: ``spans.jsonl``
        images (path): the folder that ``image`` counts from. Default: ``root``
        ids, limit, missing, prompt: as :class:`SpansDataset`.
    """
    root = Path(root)
    (source,) = expect("texts with spans", root, [("the lines", [root / file])])
    options: dict[str, Any] = {"ids": ids, "limit": limit, "missing": missing, "prompt": prompt}
    folder = root if images is None else Path(images)
    return SpansDataset(read_lines(source), lambda line: [line], source, folder, **options)
