r"""What an explanation says of itself is read here, from the passes that its maps take."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from captum_dcam import maps
from captum_dcam.methods import AttributionTask
from captum_dcam.methods.text_relevance import GradientText
from captum_dcam.model.budget import rows_at_once
from captum_dcam.model.forward import DenoisingForward, holding, single
from captum_dcam.model.gradients import TargetGradients
from captum_dcam.model.words import Target, answer_token_texts
from captum_dcam.presets import Preset
from captum_dcam.refine import Affinity, Compose
from captum_dcam.results.trust import LATER, Candidate, Trust
from captum_dcam.truth.localising import UNCALIBRATED, features, fitted, localises
from captum_dcam.truth.signs import sign_check

#: how many candidates are kept of every token
CANDIDATES = 3
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
            _Later(self, tuple(m.cpu() for m in refined)),
        )


class _Later:
    """Computes parts of a trust on the generation that was explained."""

    def __init__(self, read: TrustReader, refined: tuple[Tensor, ...]) -> None:
        one = single(read.forward, read.example)
        # what the generation kept for replay is large, and an explanation may live long
        self._forward = one.again(trajectory=one.trajectory.single(0))
        self._targets, self._reading = read.targets, read.reading
        self._maps = refined

    def __call__(self, name: str) -> Any:
        return self.of(self._forward, name)

    def of(self, forward: DenoisingForward, name: str) -> Any:
        """A part, computed on a forward that is bound to the example alone."""
        reading, targets = self._reading, self._targets
        if name == "signs":
            drawn = torch.Generator().manual_seed(SEED)
            return sign_check(forward, targets, self._maps, drawn, score=reading.score)
        if name == "text":
            task = AttributionTask(forward, targets, reading.score)
            found = GradientText(task)
            maps.word_maps(forward, targets, [0] * len(targets), reading, rows=found.add)
            return found.found().normalised()
        return word_probabilities(forward, targets)


def completed(trust: Trust, forward: DenoisingForward, example: int = 0) -> Trust:
    """All parts, computed while what the generation kept is there."""
    one = single(forward, example)
    for name in LATER:
        if name not in trust.parts:
            assert isinstance(trust.later, _Later)
            trust.parts[name] = trust.later.of(one, name)
    return trust


@holding
def word_probabilities(
    forward: DenoisingForward, targets: Sequence[Target], example: int = 0
) -> Tensor:
    r"""Probability of words at every denoising step of a bound generation.

    Args:
        forward (DenoisingForward): with a bound generation.
        targets (sequence of Target): N words.
        example (int, optional): of the batch. Default: 0

    Returns:
        Tensor: (S, N) float32, of a word's least sure token; NaN where a step does not compute all
        tokens of it, and everywhere of a given answer, which has no steps.
    """
    out = torch.full((forward.trajectory.steps, len(targets)), torch.nan)

    def add(step: int, numbers: Sequence[int], logits: Tensor) -> None:
        for n in numbers:
            out[step, n] = maps.odds_of(forward, targets[n], example, step, logits)

    if not forward.trajectory.forced:
        by_step(forward, targets, add, example)
    return out


def by_step(
    forward: DenoisingForward,
    targets: Sequence[Target],
    add: Callable[[int, Sequence[int], Tensor], None],
    example: int = 0,
) -> None:
    r"""Replay every denoising step that computes one of the words, in chunks, without gradients.

    Args:
        forward (DenoisingForward): with a bound generation.
        targets (sequence of Target): N words.
        add (callable): told of a step, the numbers of the words that it computes, and its logits
            (T, V).
        example (int, optional): of the batch. Default: 0
    """
    trajectory = forward.trajectory
    read = maps.words_read(forward, targets, example)
    wanted = [s for s in range(trajectory.steps) if read[s]]
    size, prefix = rows_at_once(forward), trajectory.cache == "prefix"
    with torch.no_grad():
        memory = forward.prefill() if prefix and wanted else None  # one for all steps
        for start in range(0, len(wanted), size):
            steps = wanted[start : start + size]
            rows, at = torch.full((len(steps),), example), torch.tensor(steps)
            if prefix:
                here = rows.to(forward.request.pixels.device)
                logits = forward.step(forward.adapter.select(memory, here), rows, at)
            else:
                logits = forward.replay(rows, at)
            for step, row in zip(steps, logits, strict=True):
                add(step, read[step], row)
