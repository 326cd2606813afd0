r"""What an explanation says of itself is read here, from the passes that its maps take."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from captum_dcam import maps
from captum_dcam.methods import AttributionTask
from captum_dcam.methods.text_relevance import GradientText
from captum_dcam.model.forward import DenoisingForward, single
from captum_dcam.model.gradients import TargetGradients
from captum_dcam.model.words import Target, answer_token_texts
from captum_dcam.presets import Preset
from captum_dcam.refine import Affinity, Compose
from captum_dcam.results.trust import LATER, Candidate, Trust
from captum_dcam.truth.grounding import judged
from captum_dcam.truth.localising import UNCALIBRATED, features, fitted, localises
from captum_dcam.truth.scores import scores_of, with_maps
from captum_dcam.truth.signs import sign_check
from captum_dcam.truth.steps import CANDIDATES, StepRecord

#: of the random image tokens that the sign check removes for comparison
SEED = 0


class TrustReader:
    r"""Reads what the passes of an explanation show anyway.

    Args:
        forward (DenoisingForward): bound; ``example`` is explained.
        targets (sequence of Target): N words.
        reading (Reading): how their maps are read.
        example (int, optional): of the batch. Default: 0
        text (bool, optional): take the relevance of text from the same passes. Default: False
    """

    def __init__(
        self,
        forward: DenoisingForward,
        targets: Sequence[Target],
        reading: maps.Reading,
        example: int = 0,
        text: bool = False,
    ) -> None:
        self.forward, self.targets, self.reading = forward, tuple(targets), reading
        self.example = example
        self._candidates: dict[tuple[int, int], tuple[Candidate, ...]] = {}
        one = single(forward, example)
        task = AttributionTask(one, self.targets, reading.score)
        self._text = GradientText(task) if text else None

    def seen(self, number: int, step: int, logits: Tensor) -> None:
        """Take the logits (T, V) that a word is read from at a step."""
        trajectory, reading = self.forward.trajectory, self.reading
        for position in self.targets[number].positions:
            own = trajectory.step_of(self.example, position, reading.score)
            if reading.step is not None and trajectory.cache == "none":
                own = reading.step
            if own == step:
                odds, ids = logits[position].double().softmax(-1).topk(CANDIDATES)
                texts = answer_token_texts(self.forward.adapter, ids.tolist())
                every = zip(ids.tolist(), texts, odds.tolist(), strict=True)
                self._candidates[number, position] = tuple(Candidate(*c) for c in every)

    @property
    def rows(self) -> Callable[[TargetGradients], None] | None:
        """Takes rows of gradients; None where the relevance of text is not wanted."""
        return None if self._text is None else self._text.add

    def found(
        self,
        signed: Sequence[Tensor],
        refined: Sequence[Tensor],
        chosen: Preset,
        refine: Compose,
        steps: Tensor | None = None,
    ) -> Trust:
        """What all passes together showed of maps before and after ``refine``; ``steps``: the
        probabilities of every step, where they are known."""
        forward = self.forward
        fit = fitted(
            forward.adapter.family,
            forward.layer,
            forward.adapter.recommended_block,
            self.reading,
            chosen,
        )
        parts: dict[str, Any] = {} if steps is None else {"probabilities": steps}
        parts |= {} if self._text is None else {"text": self._text.found().normalised()}
        step = self.reading.step
        contexts = maps.contexts_of(forward, example=self.example, step=step)
        spread = refined if tuple(refine) == (Affinity(),) else None
        return Trust(
            localises(features(signed, contexts, spread), fit),
            fit is not None,
            UNCALIBRATED if fit is None else fit.fitted_on,
            # a token that word and foil share is read nowhere
            tuple(
                tuple(self._candidates.get((n, p), ()) for p in t.positions)
                for n, t in enumerate(self.targets)
            ),
            forward.adapter.warning(forward.request.images[self.example]),
            parts,
            _Later(self, tuple(m.cpu() for m in refined), chosen),
        )


class _Later:
    """Computes parts of a trust on the generation that was explained."""

    def __init__(self, read: TrustReader, refined: tuple[Tensor, ...], chosen: Preset) -> None:
        one = single(read.forward, read.example)
        # what the generation kept for replay is large, and an explanation may live long
        self._forward = one.again(trajectory=one.trajectory.single(0))
        self._targets, self._reading, self._chosen = read.targets, read.reading, chosen
        self._maps = refined
        self._known: dict[str, Any] = {}

    def __call__(self, name: str) -> Any:
        return self.of(self._forward, name)

    def of(self, forward: DenoisingForward, name: str) -> Any:
        """A part, computed once on a forward that is bound to the example alone."""
        if name not in self._known:
            with forward.held():
                self._known[name] = self._computed(forward, name)
        return self._known[name]

    def forget(self) -> None:
        """Keep no part: with them goes the forward that they were computed on."""
        self._known.clear()

    def _computed(self, forward: DenoisingForward, name: str) -> Any:
        reading, targets = self._reading, self._targets
        if name == "signs":
            drawn = torch.Generator().manual_seed(SEED)
            return sign_check(forward, targets, self._maps, drawn, score=reading.score)
        if name == "text":
            task = AttributionTask(forward, targets, reading.score)
            found = GradientText(task)
            maps.word_maps(forward, targets, [0] * len(targets), reading, rows=found.add)
            return found.found().normalised()
        if name == "steps":
            return StepRecord(forward, targets)
        steps: StepRecord = self.of(forward, "steps")
        if name == "probabilities":
            return steps.probabilities
        signs = self.of(forward, "signs")
        scores = with_maps(scores_of(steps), signs[:, 0], targets, self._maps)
        return judged(scores, forward, targets, self._chosen)


def completed(trust: Trust, forward: DenoisingForward, example: int = 0) -> Trust:
    """All parts, computed while what the generation kept is there."""
    one, later = single(forward, example), trust.later
    assert isinstance(later, _Later)
    for name in LATER:
        if name not in trust.parts:
            trust.parts[name] = later.of(one, name)
    later.forget()
    return trust
