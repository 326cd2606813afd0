r"""The answer that is explained: the model writes it, it is given, or parts of it are."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from captum_dcam import checks
from captum_dcam.errors import InfeasibleStepError, InputError, InputTypeError, TargetError
from captum_dcam.model.adapter import Adapter, Request
from captum_dcam.model.forward import DenoisingForward, holding
from captum_dcam.model.infill import fill, given_by, has_holes, plain
from captum_dcam.model.reveals import Reveals, retrace
from captum_dcam.model.trajectory import SCORES, Score, Trajectory

#: a text, which may have holes, its token ids, or these and the steps that revealed them; None:
#: what the model writes
AnswerLike = str | Sequence[int] | Reveals | None
#: number of logits that :func:`force` holds at once: 2 ** 28 float32 are 1 GiB
LOGITS_AT_ONCE = 2**28


@holding
def force(
    forward: DenoisingForward,
    answer: str | list[int],
    request: Request | None = None,
    *,
    generator: torch.Generator | None = None,
    **settings: Any,
) -> Trajectory:
    r"""Bind a given answer to the forward's request, as if it had been generated.

    An answer with holes (``"a [MASK] circle"``) is filled by the model and bound as what it is, a
    generation, see :func:`captum_dcam.model.infill.fill`. What follows is of a whole answer.

    In step ``t`` the whole answer is visible but for token ``t``, which this step commits. So the
    ``commit`` score reads every token with all others known (autoregressive families: with all
    before it known). Where a family has no mask token but starts from random ones
    (DiffusionGemma), a random token hides it. The ``teacher`` score reads the visible answer, as
    the paper's controlled comparison of wordings does (Table 12).

    Args:
        forward (DenoisingForward): with a bound request of one example (``forward.bind`` or
            ``forward.generate``), whose generation is replaced; or any, with ``request``.
        answer (str or list of int): the text, or its T token ids; ``\\[MASK]`` is the text
            ``[MASK]``.
        request (Request, optional): of one example, so that nothing has to be generated first.
            Default: the bound one
        generator (torch.Generator, optional), **settings: of the decoding that fills holes; refused
            where there are none.

    Returns:
        Trajectory: T states of T tokens; confidence is each token's probability in its state.

    Raises:
        MethodError: the family has no mask token, and is not causal; or cannot fill holes.
        TargetError: the answer is empty.
        InputError: what looks like ``[MASK]`` and is not, settings without a hole.
    """
    adapter, kept, cache = forward.adapter, {}, forward.adapter.cache
    if request is None and forward.bound:
        request = forward.request
        kept, cache = forward.trajectory.kept, forward.trajectory.cache
    if request is None or request.batch != 1:
        raise InputError(
            "force needs a request of one example: forward.generate(request) first, or "
            "force(forward, answer, request)"
        )
    if has_holes(answer):
        return fill(forward, str(answer), request, generator, **settings)
    _undecoded(generator, settings)
    ids = adapter.encode(plain(answer)) if isinstance(answer, str) else list(answer)
    if not ids:
        raise TargetError(f"the answer {answer!r} has no token: give at least one word")
    ids = adapter.whole_answer(ids)
    tokens = torch.tensor([ids], device=adapter.device)
    count = len(ids)
    states = adapter.forced_states(tokens)
    prefix = request.layout.prefix_length
    lengths = (prefix, *[count] * count) if cache == "prefix" else (prefix + count,) * count
    made = Trajectory(
        tokens=tokens,
        states=states,
        final_state=adapter.visible_state(tokens),
        commit_step=torch.arange(count, device=tokens.device)[None],
        confidence=torch.zeros(1, count),
        cache=cache,
        lengths=lengths,
        image_end=request.layout.image_end,
        settings={"forced": True},
        kept={k: v for k, v in kept.items() if k in ("embedded", "stamp")},
    )
    forward.bind(request, made)
    rows = max(1, LOGITS_AT_ONCE // (count * adapter.vocabulary))
    with torch.no_grad():
        for at in torch.arange(count).split(rows):
            logits = forward.replay(torch.zeros_like(at), at)[range(len(at)), at]
            odds = logits.double().softmax(-1).gather(1, tokens[0, at, None].to(logits.device))
            made.confidence[0, at] = odds[:, 0].float().cpu()
    return made


def check_answer(
    answer: Any,
    score: Score,
    generator: torch.Generator | None,
    generation: Mapping[str, Any],
    adapter: Adapter | None = None,
) -> None:
    r"""Raise for a given answer that cannot be explained, or for what excludes one.

    Args:
        answer (str, sequence of int or Reveals): the text, or its ids. None: nothing is checked
        score (str or int): a step's number is refused where all is given and no steps come with it.
        generator (torch.Generator), generation (mapping): of decoding; refused there as well.
        adapter (Adapter, optional): of the family that is to fill holes. Default: not asked yet

    Raises:
        InputError, InputTypeError, TargetError, InfeasibleStepError, MethodError: before any work.
    """
    if answer is None:
        return
    ids = isinstance(answer, Sequence) and all(checks.as_whole(one) is not None for one in answer)
    told = isinstance(answer, Reveals)
    if not isinstance(answer, str) and not ids and not told:
        raise InputTypeError(
            f"answer is {answer!r}: expected a text, or its token ids, or Reveals of these"
        )
    if not answer or (isinstance(answer, str) and not answer.strip()):
        raise TargetError(f"the answer {answer!r} has no token: give at least one word")
    if has_holes(answer):
        if adapter is not None:
            given_by(adapter, answer, generation)
        return
    _undecoded(generator, generation)
    if isinstance(score, int) and not told:
        raise InfeasibleStepError(
            f"score is {score}: the answer is given, not generated, so it has no denoising steps; "
            f"expected one of {SCORES}"
        )


def without_steps(answer: AnswerLike) -> bool:
    """Whether an answer is given whole, and without the steps that revealed it."""
    return answer is not None and not isinstance(answer, Reveals) and not has_holes(answer)


def _undecoded(generator: torch.Generator | None, generation: Mapping[str, Any]) -> None:
    """Raise for settings of a decoding beside an answer without holes."""
    given = [*(["generator"] if generator is not None else []), *generation]
    if given:
        raise InputError(
            f"{', '.join(given)} beside an answer that is given: nothing is decoded, so leave out "
            f"{'it' if len(given) == 1 else 'them'}, or the answer; [MASK] in the answer is what "
            "the model fills"
        )


def bind_answer(
    forward: DenoisingForward,
    request: Request,
    answer: AnswerLike,
    generator: torch.Generator | None,
    generation: Mapping[str, Any],
) -> None:
    """Bind what the model answers to a request of one example, or the answer that is given; the
    generator draws only where something is decoded."""
    if answer is None:
        forward.generate(request, generator=generator, **generation)
    elif isinstance(answer, Reveals):
        retrace(forward, answer, request)
    elif has_holes(answer):
        fill(forward, str(answer), request, generator, **generation)
    else:
        force(forward, answer if isinstance(answer, str) else list(answer), request)
