r"""Where the answer of an image comes from: the model writes it, or a given text is forced."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from captum_dcam.errors import InputError
from captum_dcam.files import Record, plain
from captum_dcam.model.adapter import Request
from captum_dcam.model.answers import force
from captum_dcam.model.forward import DenoisingForward
from captum_dcam.registry import Registry

if TYPE_CHECKING:
    from captum_dcam.data import Sample

#: name → function of a forward, what is asked, and settings, that binds an answer
ANSWERS: Registry[Callable[..., None]] = Registry("answer", given=2)


@dataclass(frozen=True)
class Asked:
    """What an answer is made from: the request, the sample, and how the model would decode."""

    request: Request
    sample: Sample
    generation: Record
    generator: torch.Generator


@ANSWERS.register("generated")
def generated(forward: DenoisingForward, asked: Asked) -> None:
    """The model's own answer."""
    forward.generate(asked.request, generator=asked.generator, **asked.generation)


@ANSWERS.register("caption")
def caption(forward: DenoisingForward, asked: Asked, wording: str | int = 0) -> None:
    r"""A text of the data set in place of the model's answer: see
    :func:`captum_dcam.model.answers.force`.

    Args:
        forward (DenoisingForward): what the answer is bound to.
        asked (Asked): the sample's ``captions`` or, by name, its ``extra["captions"]`` are taken;
            nothing is decoded.
        wording (str or int, optional): which. Default: 0, the first
    """
    sample: Any = asked.sample
    by_name = isinstance(wording, str)
    known = sample.extra.get("captions", {}) if by_name else dict(enumerate(sample.captions))
    if wording not in known:
        listed = ", ".join(map(repr, known)) or "none"
        raise InputError(f"the sample has no caption {wording!r}; it has {listed}")
    # as ids: what looks like a mark in a data set's text is text
    force(forward, forward.adapter.encode(str(known[wording])), asked.request)


@ANSWERS.register("own_text")
def own_text(forward: DenoisingForward, asked: Asked) -> None:
    """The text that a sample's labels are of, in place of the model's answer; where they are of the
    question, the model's own answer."""
    if asked.sample.captions:
        caption(forward, asked)
    else:
        generated(forward, asked)


def answer_record(value: str | Mapping[str, Any]) -> Record:
    """An answer's name and all its settings; errors name what is known."""
    return plain(ANSWERS.record(value))
