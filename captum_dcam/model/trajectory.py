r"""The record of a generation: what a denoising model saw and committed, step by step."""

from __future__ import annotations

from collections.abc import Sequence, Set
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from captum_dcam import checks
from captum_dcam.errors import (
    InfeasibleStepError,
    InputError,
    MethodError,
    TargetError,
    UnknownNameError,
    WrongTypeError,
    near,
)

#: names of the states that a token's logit is read at; see :meth:`Trajectory.step_of`
SCORES = ("commit", "final", "teacher")
#: one of these names, or the number of a denoising step
Score = str | int
#: in place of a commit step of a token that was given
NO_STEP = -1
#: what the calls of a generation reuse: the prefix's keys and values, or nothing
CACHES = ("prefix", "none")
#: the same as files spell it, under the key "regime"
STORED_CACHES = {"prefix": "prefix", "none": "full"}


def stored_cache(stored: str) -> str:
    """The cache that a file's "regime" names."""
    for cache, spelling in STORED_CACHES.items():
        if stored == spelling:
            return cache
    raise UnknownNameError(f"unknown regime {stored!r}{near(stored, STORED_CACHES.values())}")


def check_score(score: Any, steps: int | None = None, what: str = "score") -> Score:
    r"""What says at which state logits are read: a name of :data:`SCORES`, or a step's number.

    Args:
        score: as the caller gave it; numpy's integers are taken too.
        steps (int, optional): S, of the generation that it is for. Default: not known yet
        what (str, optional): its name in errors. Default: ``"score"``

    Raises:
        InputError: another name, with the nearest.
        WrongTypeError: neither a name nor a whole number.
        InfeasibleStepError: a step that is below 0, or not in the generation.
    """
    if isinstance(score, str) and score in SCORES:
        return score
    expected = f"expected one of {SCORES}, or the number of a denoising step, from 0"
    if isinstance(score, str):
        hint = near(score, SCORES).partition("?")  # what is known was said
        raise InputError(f"{what} is {score!r}: {expected}{hint[0] + hint[1] if hint[1] else ''}")
    number = checks.as_whole(score)
    if number is None:
        raise WrongTypeError(f"{what} is {score!r}: {expected}")
    if steps is None and number < 0:
        raise InfeasibleStepError(f"{what} is {number}: {expected}")
    if steps is not None and not 0 <= number < steps:
        raise InfeasibleStepError(
            f"{what} is {number}: this generation has {steps} steps, expected one from 0 to "
            f"{steps - 1}, or one of {SCORES}"
        )
    return number


@dataclass(frozen=True)
class Call:
    """One forward pass of the transformer in a generation: its hooked length, and whether it holds
    the image.

    ``start`` is the position of the hooked sequence's first token. Behind a cached prefix it is not
    0, and then even a sequence that is longer than the image does not hold it.
    """

    name: str
    length: int
    image_end: int
    start: int = 0

    @property
    def valid(self) -> bool:
        """The paper's criterion (Table 4): the hooked sequence holds the whole image span."""
        return self.start == 0 and self.length >= self.image_end


@dataclass(frozen=True)
class Given:
    r"""Tokens of an answer that are given, and stay; the model fills the others.

    Args:
        tokens (Tensor): (B, T) int64; what stands elsewhere does not count.
        at (Tensor): (B, T) bool, where they stand.
    """

    tokens: Tensor
    at: Tensor

    def canvas(self, mask_id: int) -> Tensor:
        """(B, T): the mask where nothing is given."""
        return self.tokens.where(self.at, mask_id)

    def longer(self, length: int, filler: int) -> Given:
        """The same with a given filler behind it, up to a length."""
        more = length - self.tokens.shape[1]
        return Given(pad(self.tokens, (0, more), value=filler), pad(self.at, (0, more), value=True))


@dataclass(frozen=True, kw_only=True)
class Trajectory:
    r"""A recorded generation.

    Args:
        tokens (Tensor): (B, T) int64, the answer.
        states (tuple of Tensor): each (S, B, …), what the model was given before every step besides
            the request; the first is the canvas (S, B, T).
        final_state (tuple of Tensor): each (B, …): the same with the whole answer visible.
        commit_step (Tensor): (B, T) int64, the step whose logits fixed the token for good.
        confidence (Tensor): (B, T) float, the token's probability at that step, as the adapter's
            ``confidence_of`` gives it.
        cache (str): ``prefix`` (image and prompt computed once) or ``none`` (at every step).
        image_end (int): one past the last image position.
        settings (dict): of the generation, as far as they matter to its result.
        lengths (tuple of int): length of the hooked sequence at every call, prefill included.
        own_calls (bool): a replay calls the blocks in another way than the generation did. Then the
            adapter gives ``lengths``, and no outputs are kept. Default: False
        kept (dict): outputs of blocks kept for replay, by call; never saved.
        read_at (Tensor, optional): (S, B, T) bool, the tokens whose logits a step computes.
            Default: every step those of all tokens
        unsettled (Tensor, optional): (B, T) bool, tokens that a decoder which edits still changed
            at the last step that could: none kept them, so ``commit`` is refused. Default: none
        given (Tensor, optional): (B, T) bool, the tokens of an answer with holes that were given:
            no step committed them, so their ``commit_step`` and ``confidence`` are 0 and mean
            nothing. Default: none was
        seed (int, optional): of the generator that sampled decoding draws from; a result keeps it
            among its settings. Default: none was given
    """

    tokens: Tensor
    states: tuple[Tensor, ...]
    final_state: tuple[Tensor, ...]
    commit_step: Tensor
    confidence: Tensor
    cache: str
    image_end: int
    settings: dict[str, Any]
    lengths: tuple[int, ...] = ()
    own_calls: bool = False
    kept: dict[str, Any] = field(default_factory=dict, repr=False, compare=False)
    read_at: Tensor | None = None
    unsettled: Tensor | None = None
    given: Tensor | None = None
    seed: int | None = None

    def __post_init__(self) -> None:
        if self.cache not in CACHES:
            raise InputError(f"cache is {self.cache!r}: expected one of {CACHES}")

    @property
    def steps(self) -> int:
        """S, the number of denoising steps."""
        return self.states[0].shape[0]

    @property
    def forced(self) -> bool:
        """Whether the answer was given: its states hide one token each, and are no steps."""
        return bool(self.settings.get("forced"))

    @property
    def calls(self) -> tuple[Call, ...]:
        """Every forward pass of the transformer; with a prefix cache the first is the prefill."""
        names = [f"t = {s}" for s in range(self.steps)]
        if self.cache == "prefix":
            names.insert(0, "prefix")
        prefix = self.lengths[0] if self.cache == "prefix" else 0
        return tuple(
            Call(name, length, self.image_end, prefix if i else 0)
            for i, (name, length) in enumerate(zip(names, self.lengths, strict=True))
        )

    @property
    def feasible(self) -> tuple[int, ...]:
        """Indices of the calls whose states hold the image span."""
        return tuple(i for i, call in enumerate(self.calls) if call.valid)

    @property
    def valid_ratio(self) -> float:
        """Feasible calls over all calls: 1/(S+1) with a cached prefix, 1 without (Table 4)."""
        return len(self.feasible) / len(self.calls)

    def check_call(self, call: int) -> None:
        """Raise InfeasibleStepError unless the call's states hold the image span."""
        calls = self.calls
        where = _listed(self.feasible)
        if not 0 <= call < len(calls):
            raise InfeasibleStepError(
                f"step {call} is not in this generation of {len(calls)} calls (0 to "
                f"{len(calls) - 1}): choose a feasible one, here {where}"
            )
        if not calls[call].valid:
            start = calls[call].start
            raise InfeasibleStepError(
                f"image span ends at {self.image_end} but the hooked sequence has "
                f"{calls[call].length} tokens{f' from position {start}' if start else ''} (step "
                f"{call}): choose a feasible step, here {where}"
            )

    @property
    def final_step(self) -> Tensor:
        """(B, T) int64 on the CPU, the last step that computes each token's logits."""
        if self.read_at is None:
            return torch.full(self.tokens.shape, self.steps - 1)
        return self.steps - 1 - self.read_at.cpu().flip(0).int().argmax(0)

    def check_score(self, score: Any) -> Score:
        """The score, which this generation must have, see :func:`check_score`."""
        found = check_score(score, self.steps)
        if isinstance(found, int) and self.forced:
            raise InfeasibleStepError(
                f"score is {found}: the answer was given, not generated, so it has no denoising "
                f"steps; expected one of {SCORES}"
            )
        return found

    def gave(self, example: int, position: int) -> bool:
        """Whether a token of an answer with holes was given."""
        return self.given is not None and bool(self.given[example, position])

    def commits(self, example: int, positions: Sequence[int]) -> tuple[int, ...]:
        """The step that committed each token; :data:`NO_STEP` where it was given."""
        steps = self.commit_step[example].tolist()
        return tuple(NO_STEP if self.gave(example, p) else steps[p] for p in positions)

    def settled(self, example: int, positions: Sequence[int]) -> bool:
        """Whether none of these tokens was still changed by the last step that could."""
        if self.unsettled is None:
            return True
        return not bool(self.unsettled[example, list(positions)].any())

    def _committed(self, example: int, position: int) -> bool:
        """Whether a step wrote the token: its probability was noted, or its commit step changed the
        canvas there (a probability may round to 0)."""
        if self.forced or bool(self.confidence[example, position]):
            return True
        step = int(self.commit_step[example, position])
        before = int(self.states[0][step, example, position])
        return before != int(self.tokens[example, position])

    def reads(self, example: int, positions: Sequence[int], score: Score) -> bool:
        """Whether the state of a score has the logits of all these tokens: a step may not; what
        was given, and what never settled, have no commit."""
        if score == "commit":
            whole = self.settled(example, positions)
            return whole and not any(self.gave(example, p) for p in positions)
        if not isinstance(score, int) or self.read_at is None:
            return True
        return bool(self.read_at[score, example, list(positions)].all())

    def step_of(self, example: int, position: int, score: Score) -> int:
        r"""The step whose logits are read for a token; ``steps`` stands for the visible answer.

        ``commit``: the step that changed the token last; where none is edited, it was masked until
        then. ``final``: the
        last step (Eq. 2 read literally), or the last of the token's own canvas. ``teacher``: the
        whole answer is visible, as in the reference code. A number: that step.

        Raises:
            InfeasibleStepError: a step that does not compute the token's logits (of another canvas;
                of a causal model, before the token's turn); ``commit`` of a token that was given,
                or that never settled.
            TargetError: the commit of a token that no step has committed.
        """
        if score == "commit":
            if self.gave(example, position):
                raise InfeasibleStepError(
                    f"token {position} of the answer was given, so no step committed it: choose a "
                    "state that it is read at, score='final', 'teacher' or a step's number; or "
                    "explain the filled text as a given answer, each word with all others visible"
                )
            if not self.settled(example, [position]):
                last = int(self.commit_step[example, position])
                raise InfeasibleStepError(
                    f"token {position} of the answer never settled: step {last}, the last that "
                    "edited it, changed it once more, so that no step has committed it; expected "
                    f"score={last} (that step), 'final' or 'teacher', a word that settled, or a "
                    "generation of more steps"
                )
            if not self._committed(example, position):
                raise TargetError(
                    f"token {position} of the answer never settled: no step has committed it, so "
                    "it has no commit to be read at; give the generation more steps, or choose "
                    "another word, a step that computes it, or one of ('final', 'teacher')"
                )
            return int(self.commit_step[example, position])
        if score == "final":
            return int(self.final_step[example, position])
        if score == "teacher":
            return self.steps
        step = int(self.check_score(score))
        if self.read_at is not None and not self.reads(example, [position], step):
            known = self.read_at[:, example, position].nonzero()[:, 0].tolist()
            raise InfeasibleStepError(
                f"step {step} computes no logits of token {position} of the answer: choose one of "
                f"the steps that do, {_listed(known)}, or one of {SCORES}"
            )
        return step

    def state_at(self, examples: Tensor, steps: Tensor) -> tuple[Tensor, ...]:
        """States (R, …) of examples (R,) at steps (R,); step ``steps`` is the visible answer."""
        found = []
        at, rows = steps.cpu(), examples.cpu()  # they index tensors of any device
        visible = at == self.steps
        for state, final in zip(self.states, self.final_state, strict=True):
            one = state[at.masked_fill(visible, 0), rows]
            one[visible] = final[rows[visible]]
            found.append(one)
        return tuple(found)

    def rows(self, examples: Sequence[int]) -> Trajectory:
        """The records of examples, each as often as it is named, without what was kept for
        replay."""

        def pick(values: Tensor, axis: int = 0) -> Tensor:
            return values.index_select(axis, torch.tensor(examples, device=values.device))

        return replace(
            self,
            tokens=pick(self.tokens),
            states=tuple(pick(s, 1) for s in self.states),
            final_state=tuple(map(pick, self.final_state)),
            commit_step=pick(self.commit_step),
            confidence=pick(self.confidence),
            kept={},
            read_at=None if self.read_at is None else pick(self.read_at, 1),
            unsettled=None if self.unsettled is None else pick(self.unsettled),
            given=None if self.given is None else pick(self.given),
        )

    def single(self, example: int) -> Trajectory:
        """The record of one example (B = 1), without what was kept for replay."""
        one = slice(example, example + 1)
        return replace(
            self,
            tokens=self.tokens[one],
            states=tuple(s[:, one] for s in self.states),
            final_state=tuple(s[one] for s in self.final_state),
            commit_step=self.commit_step[one],
            confidence=self.confidence[one],
            kept={},
            read_at=None if self.read_at is None else self.read_at[:, one],
            unsettled=None if self.unsettled is None else self.unsettled[one],
            given=None if self.given is None else self.given[one],
        )


def marked(made: Trajectory, given: Given, family: str, stops: Set[int]) -> Trajectory:
    r"""A generation with its given tokens marked, and what the family has put behind them.

    Raises:
        InputError: the answer ended before all given tokens.
        MethodError: a decoder that has written over a given token.
    """
    length, asked = made.tokens.shape[1], given.tokens.shape[1]
    given = Given(*(x.to(made.tokens.device) for x in (given.tokens, given.at)))
    own = Given(given.tokens[:, :length], given.at[:, :length]).longer(length, 0)
    at, short = own.at, min(length, asked)
    lost = at[:, :short] & (made.tokens[:, :short] != own.tokens[:, :short])
    over = made.tokens[:, :short][lost].tolist()
    if bool(given.at[:, length:].any()) or (over and set(over) <= stops):
        first = length if not over else int(lost.any(0).nonzero()[0])
        raise InputError(
            f"the model ended the answer in front of token {first} of {asked}, which is given: "
            f"{family} writes nothing behind an end; leave fewer masks in front of it, or try "
            "another seed"
        )
    if over:
        raise MethodError(
            f"the decoder of {family} has written over given tokens: its code is not the one that "
            "its adapter knows; give a whole answer instead"
        )
    return replace(
        made,
        given=at,
        commit_step=made.commit_step.masked_fill(at.to(made.commit_step.device), 0),
        confidence=made.confidence.masked_fill(at.to(made.confidence.device), 0),
    )


def _listed(steps: Sequence[int]) -> str:
    """The first few numbers."""
    return ", ".join(map(str, steps[:8])) + (", …" if len(steps) > 8 else "")
