r"""RePOPE: is there such an object in the image? POPE's questions with corrected answers.

Neuhaus and Hein, 2025 (https://github.com/YanNeu/RePOPE). One JSON object per line, as in POPE's
own files: ``{"question_id": 1, "image": "COCO_val2014_….jpg", "text": "Is there a car in the
image?", "label": "no"}``; the images are COCO's val2014.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from captum_dcam.data.common import register_dataset
from captum_dcam.data.files import expect, read_lines
from captum_dcam.data.spans import SpansDataset, part
from captum_dcam.errors import InputError
from captum_dcam.files import Record

SPLITS = ("random", "popular", "adversarial")
_QUESTION = re.compile(r"\s*is there (?:an?|the) (.+) in the image", re.IGNORECASE)
_LABELS = {"yes": "true", "no": "invented"}


@register_dataset("repope")
class RepopeDataset(SpansDataset):
    r"""Questions about objects, in the order of their ids; the span is the object's name.

    It is ``"true"`` where the right answer is yes and ``"invented"`` where it is no, and counts
    from the question, which is the prompt. There are no masks.

    Args:
        root (path): the repository's folder, or another one with its ``annotations``.
        split (str): ``random``, ``popular`` or ``adversarial``.
        annotations (path): another file of this format, such as one of POPE's.
        images (path): the images' folder. Default: ``val2014`` in ``root`` or in its ``coco``
        ids, limit, missing: as :class:`~captum_dcam.data.coco.CocoDataset`.
        prompt (str): not used: every question is a prompt.
    """

    name = "repope"

    def __init__(
        self,
        root: str | Path,
        split: str = "random",
        *,
        annotations: str | Path | None = None,
        images: str | Path | None = None,
        ids: str | Path | Iterable[Any] | None = None,
        limit: int | None = None,
        missing: str = "raise",
        prompt: str | None = None,
    ) -> None:
        if split not in SPLITS:
            raise InputError(f"split is {split!r}: expected one of {', '.join(SPLITS)}")
        root, name = Path(root), f"coco_repope_{split}.json"
        files = [root / "annotations" / name, root / name]
        folders = [root / "val2014", root / "coco" / "val2014"]
        source, folder = expect(
            f"RePOPE split {split!r}",
            root,
            [
                ("the questions", files if annotations is None else [Path(annotations)]),
                ("the images", folders if images is None else [Path(images)]),
            ],
        )
        options: dict[str, Any] = {"ids": ids, "limit": limit, "missing": missing}
        super().__init__(read_lines(source), _records, source, folder, prompt=prompt, **options)


def _records(entry: Any) -> list[Record]:
    question, label = part(entry, "text", str), part(entry, "label", str)
    found = _QUESTION.match(question)
    if found is None:
        raise InputError(f"the question is {question!r}: expected 'Is there a … in the image?'")
    if label not in _LABELS:
        raise InputError(f"label is {label!r}: expected yes or no")
    span = {"start": found.start(1), "stop": found.end(1), "label": _LABELS[label]}
    return [
        {
            "id": part(entry, "question_id", int),
            "image": part(entry, "image", str),
            "prompt": question,
            "spans": [{**span, "kind": "object"}],
        }
    ]
