r"""Where the answer of an image comes from: the model writes it, or a given text is forced."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from captum_dcam.denoising import DenoisingForward
from captum_dcam.evaluation.jsonable import Record, filled
from captum_dcam.evaluation.words import SampleLike
from captum_dcam.forced import force

#: binds an answer to a forward that a generation is bound to already
Answer = Callable[..., None]


def generated(forward: DenoisingForward, sample: SampleLike) -> None:
    """The model's own answer."""


def caption(forward: DenoisingForward, sample: SampleLike, wording: str | int = 0) -> None:
    r"""A text of the data set in place of the model's answer, see :func:`captum_dcam.forced.force`.

    Args:
        forward (DenoisingForward): with the bound generation, which is replaced.
        sample (SampleLike): its ``captions`` or, by name, its ``extra["captions"]``.
        wording (str or int, optional): which. Default: 0, the first
    """
    force(forward, _text(sample, wording))


def _text(sample: Any, wording: str | int) -> str:
    if isinstance(wording, str):
        known = sample.extra.get("captions", {})
    else:
        known = dict(enumerate(sample.captions))
    if wording not in known:
        listed = ", ".join(map(repr, known)) or "none"
        raise ValueError(f"the sample has no caption {wording!r}; it has {listed}")
    return str(known[wording])


#: name → function of a forward with a bound generation, a sample, and settings
ANSWERS: dict[str, Answer] = {"generated": generated, "caption": caption}


def answer_record(value: str | Mapping[str, Any]) -> Record:
    """An answer's name and all its settings; errors name what is known."""
    return filled("answer", ANSWERS, value, given=2)
