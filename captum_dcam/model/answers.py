r"""The answer that is explained: the model writes it, or it is given."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from captum_dcam import checks
from captum_dcam.errors import InfeasibleStepError, InputError, InputTypeError, TargetError
from captum_dcam.model.adapter import Request
from captum_dcam.model.forward import DenoisingForward, force
from captum_dcam.model.trajectory import SCORES, Score

#: a text, or its token ids; None: what the model writes
AnswerLike = str | Sequence[int] | None


def check_answer(
    answer: Any, score: Score, generator: torch.Generator | None, generation: Mapping[str, Any]
) -> None:
    r"""Raise for a given answer that cannot be explained, or for what excludes one.

    Args:
        answer (str or sequence of int): the text, or its ids. None: nothing is checked
        score (str or int): a step's number is refused, because a given answer has no steps.
        generator (torch.Generator), generation (mapping): of decoding; refused as well.

    Raises:
        InputError, InputTypeError, TargetError, InfeasibleStepError: before any work.
    """
    if answer is None:
        return
    ids = isinstance(answer, Sequence) and all(checks.as_whole(one) is not None for one in answer)
    if not isinstance(answer, str) and not ids:
        raise InputTypeError(f"answer is {answer!r}: expected a text, or its token ids")
    if not answer or (isinstance(answer, str) and not answer.strip()):
        raise TargetError(f"the answer {answer!r} has no token: give at least one word")
    given = [*(["generator"] if generator is not None else []), *generation]
    if given:
        raise InputError(
            f"{', '.join(given)} beside an answer that is given: nothing is decoded, so leave out "
            f"{'it' if len(given) == 1 else 'them'}, or the answer"
        )
    if isinstance(score, int):
        raise InfeasibleStepError(
            f"score is {score}: the answer is given, not generated, so it has no denoising steps; "
            f"expected one of {SCORES}"
        )


def bind_answer(
    forward: DenoisingForward,
    request: Request,
    answer: AnswerLike,
    generator: torch.Generator | None,
    generation: Mapping[str, Any],
) -> None:
    """Bind what the model answers to a request of one example, or the answer that is given."""
    if answer is None:
        forward.generate(request, generator=generator, **generation)
    else:
        force(forward, answer if isinstance(answer, str) else list(answer), request)
