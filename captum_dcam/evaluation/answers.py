r"""Where the answer of an image comes from: the model writes it, or a given text is forced."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from captum_dcam.denoising import DenoisingForward
from captum_dcam.evaluation.jsonable import Record, filled
from captum_dcam.evaluation.words import SampleLike

#: binds an answer to a forward that a generation is bound to already
Answer = Callable[..., None]


def generated(forward: DenoisingForward, sample: SampleLike) -> None:
    """The model's own answer."""


def caption(forward: DenoisingForward, sample: SampleLike, wording: str | int = 0) -> None:
    r"""A text of the data set in place of the model's answer (teacher forcing, Appendix D).

    The steps are those of the model's own answer: what was visible at a step shows the text's
    token there. Tokens after the text are stop tokens.

    Args:
        forward (DenoisingForward): with the bound generation; rebound to the text.
        sample (SampleLike): its ``captions`` or, by name, its ``extra["captions"]``.
        wording (str or int, optional): which. Default: 0, the first
    """
    text = _text(sample, wording)
    adapter, old = forward.adapter, forward.trajectory
    tokenizer = getattr(adapter.processor, "tokenizer", adapter.processor)
    ids = list(tokenizer(text, add_special_tokens=False)["input_ids"])
    length = old.tokens.shape[1]
    if not 0 < len(ids) <= length:
        raise ValueError(
            f"the text {text!r} has {len(ids)} tokens and the answer {length}: set gen_length to "
            f"at least {len(ids)}"
        )
    stop = min(adapter.stop_ids)
    forced = torch.tensor([ids + [stop] * (length - len(ids))]).to(old.tokens)

    def shown(canvas: Tensor) -> Tensor:
        visible = canvas == old.tokens.to(canvas.device)
        return torch.where(visible, forced.to(canvas), canvas)

    assert forward.request is not None
    forward.bind(
        forward.request,
        replace(
            old,
            tokens=forced,
            states=(shown(old.states[0]), *old.states[1:]),
            final_state=(shown(old.final_state[0]), *old.final_state[1:]),
            confidence=torch.full_like(old.confidence, float("nan")),  # nobody chose these tokens
            kept={},
        ),
    )


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
