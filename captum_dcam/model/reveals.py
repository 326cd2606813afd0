r"""Generations that others ran: which token was written at which step, read and written.

Serving engines and decoders tell of a masked answer its token ids, when each of them was revealed
(MinerU-Diffusion's ``step_map``) and how probable it was then (the log-probabilities of vLLM and
lmdeploy). Where a decoder fills in masks and changes nothing, ids and steps say what stood on the
canvas before every step: a token is masked up to the step that reveals it. So the generation can be
replayed, and explained, without being run again.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from captum_dcam import checks
from captum_dcam.errors import InputError, InputTypeError, MethodError, ReplayError, SavedError
from captum_dcam.files import read_json, write_json
from captum_dcam.model.adapter import Adapter, Request
from captum_dcam.model.forward import DenoisingForward, holding
from captum_dcam.model.trajectory import Trajectory
from captum_dcam.model.verification import difference

#: steps that no answer has
MOST = 100_000
#: keys of a file
KEYS = ("tokens", "steps", "logprobs")


@dataclass(frozen=True)
class Reveals:
    r"""An answer of T tokens, and when each was revealed.

    Args:
        tokens (sequence of int): T ids, all that stood on the canvas: what ends or pads the answer,
            too.
        steps (sequence of int): T steps, from 0: the step whose logits a token was taken from. That
            of a token that is still the mask does not matter. MinerU-Diffusion's ``step_map``
            counts from 1.
        logprobs (sequence of float, optional): T natural logarithms of the tokens' probabilities at
            these steps, by the model's own logits; None for a token whose is not known. They are
            compared with those of the replay. Default: none is known

    Raises:
        InputError, InputTypeError: of different lengths, empty, or no such numbers.

    Examples::

        >>> Reveals([5, 7, 9], [0, 1, 1])
        Reveals(tokens=(5, 7, 9), steps=(0, 1, 1), logprobs=None)
        >>> Reveals([5, 7, 9], [0, 1])
        Traceback (most recent call last):
        captum_dcam.errors.InputError: 2 steps for 3 tokens: expected the step of every token, ...
    """

    tokens: Sequence[int]
    steps: Sequence[int]
    logprobs: Sequence[float | None] | None = None

    def __post_init__(self) -> None:
        tokens, steps = _wholes("tokens", self.tokens), _wholes("steps", self.steps)
        if not tokens:
            raise InputError("the answer has no token: expected the ids of at least one")
        if len(steps) != len(tokens):
            raise InputError(
                f"{len(steps)} steps for {len(tokens)} tokens: expected the step of every token, "
                "those that end or pad the answer too"
            )
        if max(steps) >= MOST:
            raise InputError(f"step {max(steps)}: expected steps below {MOST}")
        object.__setattr__(self, "tokens", tokens)
        object.__setattr__(self, "steps", steps)
        object.__setattr__(self, "logprobs", _logprobs(self.logprobs, len(tokens)))

    @classmethod
    def load(cls, path: str | Path) -> Reveals:
        """Read a JSON file {"tokens": […], "steps": […], "logprobs": […] or absent}.

        Raises:
            SavedError: no such file's content.
        """
        advice = f"expected a JSON object with {', '.join(KEYS[:2])}, and perhaps {KEYS[2]}"
        record = read_json(Path(path), SavedError, advice)
        unknown = sorted(record.keys() - set(KEYS))
        if unknown or not set(KEYS[:2]) <= record.keys():
            raise SavedError(f"{path} has {', '.join(sorted(record)) or 'nothing'}: {advice}")
        return cls(**record)

    def save(self, path: str | Path) -> None:
        """Write such a file."""
        record = {name: value for name in KEYS if (value := getattr(self, name)) is not None}
        write_json(Path(path), record)


def _wholes(name: str, given: Any) -> tuple[int, ...]:
    given = given.tolist() if hasattr(given, "tolist") else given
    fits = isinstance(given, Sequence) and not isinstance(given, str)
    found = [checks.as_whole(one) for one in given] if fits else [None]
    if None in found:
        wrong = given if not fits else given[found.index(None)]
        raise InputTypeError(f"{name} has {wrong!r}: expected a sequence of whole numbers")
    return tuple(one for one in found if one is not None)


def _logprobs(given: Any, count: int) -> tuple[float | None, ...] | None:
    if given is None:
        return None
    given = given.tolist() if hasattr(given, "tolist") else given
    if not isinstance(given, Sequence) or isinstance(given, str) or len(given) != count:
        what = f"{len(given)} of them" if isinstance(given, Sequence) else repr(given)
        raise InputError(f"logprobs: {what}, expected one for each of the {count} tokens, or None")
    for number, one in enumerate(given):
        real = None if one is None else checks.as_real(one)
        if one is not None and (real is None or math.isnan(real) or real > 0):
            raise InputError(
                f"logprobs[{number}] is {one!r}: expected the natural logarithm of a probability, "
                "0 or less, or None"
            )
    return tuple(None if one is None else float(one) for one in given)


# -- written --------------------------------------------------------------------------------------


def reveals_of(adapter: Adapter, trajectory: Trajectory, example: int = 0) -> Reveals:
    r"""What a recorded generation tells of itself in this form.

    Args:
        adapter (Adapter): of its family.
        trajectory (Trajectory): recorded, not of a given answer.
        example (int, optional): of its batch. Default: 0

    Raises:
        InputError: the answer was given.
        MethodError: ids and steps do not tell its canvases: its decoder changes tokens, or its
            steps read more than the canvas (guidance).
    """
    if trajectory.forced:
        raise InputError("the answer was given, not generated: no step revealed its tokens")
    one = trajectory.single(example)
    tokens, steps = one.tokens.cpu(), one.commit_step.cpu()
    told = len(one.states) == 1 and adapter.mask_id is not None
    if told:
        assert adapter.mask_id is not None
        told = torch.equal(one.states[0].cpu(), canvases(tokens, steps, one.steps, adapter.mask_id))
    if not told:
        raise MethodError(
            f"this generation of {adapter.family} is not told by ids and steps: its decoder writes "
            "over tokens, or its steps read more than a canvas; save the explanation, which holds "
            "its states"
        )
    sure = [p if p > 0 else None for p in one.confidence[0].double().tolist()]
    logs = [None if p is None else math.log(p) for p in sure]
    return Reveals(tokens[0].tolist(), steps[0].tolist(), logs)


def canvases(tokens: torch.Tensor, steps: torch.Tensor, count: int, mask_id: int) -> torch.Tensor:
    """(S, B, T) ids before each of ``count`` steps, of tokens and steps (B, T)."""
    number = torch.arange(count, device=tokens.device)[:, None, None]
    return tokens.masked_fill(steps >= number, mask_id)


# -- read -----------------------------------------------------------------------------------------


@holding
def retrace(forward: DenoisingForward, reveals: Reveals, request: Request) -> Trajectory:
    r"""Bind a generation that was run elsewhere to a request of one example.

    The model must be the one that wrote it, the request that which it was asked, and the answer
    decoded without guidance. The log-probabilities, where they are known, check it.

    Args:
        forward (DenoisingForward): of the model.
        reveals (Reveals): the answer.
        request (Request): of one example, from ``forward.adapter.prepare``.

    Returns:
        Trajectory: of as many steps; confidence is each token's probability in the replay.

    Raises:
        InputError: ids outside the vocabulary, or steps that the family's decoder cannot take.
        MethodError: a family whose decoder changes tokens that it has written.
        ReplayError: the replay's probabilities are others than ``logprobs``.

    Examples::

        >>> from captum_dcam.data.scenes import make_scene
        >>> adapter = captum_dcam.load("mini")
        >>> request = adapter.prepare([[make_scene(0, 3).image]], ["describe the image ."])
        >>> written = reveals_of(adapter, DenoisingForward(adapter).generate(request, gen_length=2))
        >>> forward = DenoisingForward(adapter)
        >>> retrace(forward, written, request).steps
        2
    """
    adapter = forward.adapter
    if request.batch != 1:
        raise InputError(
            f"the request has {request.batch} examples: an answer with its steps is of one; bind "
            "request.single(example)"
        )
    outside = next((i for i in reveals.tokens if not 0 <= i < adapter.vocabulary), None)
    if outside is not None:
        raise InputError(
            f"token id {outside} is none of {adapter.family}'s, 0 to {adapter.vocabulary - 1}: "
            "the answer is another model's"
        )
    tokens = torch.tensor([reveals.tokens], device=adapter.device)
    steps = torch.tensor([reveals.steps], device=adapter.device)
    made = Trajectory(
        tokens=tokens,
        confidence=torch.zeros(tokens.shape),
        cache=adapter.cache,
        image_end=request.layout.image_end,
        settings={"revealed": True},
        **adapter.retraced(request, tokens, steps),
    )
    forward.bind(request, made)
    with torch.no_grad():
        for step in range(made.steps):
            _filled(forward, step, reveals.logprobs)
    return made


def _filled(forward: DenoisingForward, step: int, logprobs: Sequence[float | None] | None) -> None:
    """Fill in the probabilities of what a step has revealed, and compare them."""
    made, adapter = forward.trajectory, forward.adapter
    at = ((made.commit_step[0] == step) & (made.tokens[0] != adapter.mask_id)).nonzero()[:, 0]
    if not len(at):
        return
    zero = torch.tensor([0])
    logits = forward.replay(zero, zero + step)
    state = made.state_at(zero, zero + step)
    found = adapter.confidence_of(logits, made.tokens.to(logits.device), *state).float().cpu()
    made.confidence[0, at.cpu()] = found[0, at.cpu()]
    if logprobs is None:
        return
    told = torch.tensor([[0.0 if p is None else math.exp(p) for p in logprobs]])
    known = torch.tensor([[p is not None for p in logprobs]])
    worst = difference(adapter, replace(made, confidence=told * known), step, logits)
    if worst is not None and worst.far:
        (text,) = adapter.token_texts([int(made.tokens[0, worst.position])])
        raise ReplayError(
            f"step {step} of the answer, computed again, is another: {text.strip()!r} at position "
            f"{worst.position} had probability {worst.recorded:.4g} by its logprob and has "
            f"{worst.replayed:.4g}; expected the same model, image, prompt and cache, an answer "
            "with all its tokens, steps from 0, and probabilities before temperature, top_k and "
            "top_p; or leave out logprobs"
        )
