r"""The index over many answers: a card per case, sorted by a score, the worst one click away."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from PIL import Image
from torch import Tensor

from captum_dcam.viewer.explorer import INDEX, page_of
from captum_dcam.viewer.packed import image_source, packed_mask

#: format and version of the document
FORMAT, VERSION = "captum-dcam index", 1
#: longer side of a card's picture in pixels, and of many cards' pictures
LARGE, SMALL, MANY = 224, 144, 100


@dataclass(frozen=True, eq=False)
class Case:
    r"""One answer of an index.

    Args:
        name (str): of the image.
        image (PIL.Image.Image, optional): Default: none is shown
        prompt (str, optional), answer (str, optional): the question, and what was answered.
        error (str, optional): why there is no answer.
        words (tuple of dict, optional): ``text``, ``commit`` (step) and ``probability``.
        scores (dict, optional): method → score → a value per word, None where there is none.
        masks (dict, optional): name → (H, W) bool.
        link (str, optional): address of a page of its own.
        command (str, optional): the line that makes that page.
    """

    name: str
    image: Image.Image | None = None
    prompt: str | None = None
    answer: str | None = None
    error: str | None = None
    words: tuple[Mapping[str, Any], ...] = ()
    scores: Mapping[str, Mapping[str, Sequence[float | None]]] = field(default_factory=dict)
    masks: Mapping[str, Tensor] = field(default_factory=dict)
    link: str | None = None
    command: str | None = None


def index_page(
    title: str,
    cases: Sequence[Case],
    *,
    how: str,
    facts: Mapping[str, str] | None = None,
    warnings: Sequence[str] = (),
    first: str | None = None,
    methods: Sequence[str] = (),
) -> str:
    r"""The page of an index, as HTML.

    Args:
        title (str): what they are cases of.
        cases (sequence of Case): in the order of the data.
        how (str): what a reader can do here.
        facts (dict, optional): shown at its foot.
        warnings (sequence of str, optional): what a reader must know first.
        first (str, optional): the score that cases are sorted by at first. Default: the first one
        methods (sequence of str, optional): their order. Default: as they come
    """
    found = dict.fromkeys(m for case in cases for m in case.scores)
    names = list(dict.fromkeys(s for c in cases for own in c.scores.values() for s in own))
    if first in names:
        names.insert(0, names.pop(names.index(first)))
    side = LARGE if len(cases) <= MANY else SMALL
    document = {
        "format": FORMAT,
        "version": VERSION,
        "title": title,
        "how": how,
        "warnings": list(warnings),
        "facts": [[name, str(value)] for name, value in (facts or {}).items()],
        "methods": [*(m for m in methods if m in found), *(m for m in found if m not in methods)],
        "scores": names,
        "cases": [_case(case, side) for case in cases],
    }
    return page_of(document, INDEX)


def _case(case: Case, side: int) -> dict[str, Any]:
    picture = None if case.image is None else image_source(case.image, side=side)
    return {
        "name": case.name,
        "picture": picture,
        "prompt": case.prompt,
        "answer": case.answer,
        "error": case.error,
        "words": [dict(word) for word in case.words],
        "scores": {m: {k: list(v) for k, v in own.items()} for m, own in case.scores.items()},
        "masks": [{"name": n, **packed_mask(m, side)} for n, m in case.masks.items()],
        "link": case.link,
        "command": case.command,
    }
