r"""Is the word true? What a generation knows of its own words: scores, no verdict.

A map shows where a word comes from, not whether it is so. On noisy pictures and false premises the
probability at the commit step told true words from invented ones, and properties of maps did not;
entropies of later steps are those of visible words, which nothing trained.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

from captum_dcam.errors import InfeasibleStepError, MethodError
from captum_dcam.methods.edited import pixel_fill, read, with_pixels
from captum_dcam.model.forward import DenoisingForward, holding, single
from captum_dcam.model.words import Target, answer_token_texts, least_sure, words_of
from captum_dcam.truth.trust import by_step


@dataclass(frozen=True, eq=False)
class WordScores:
    r"""Scores of N words of one answer. High speaks for the word, but where it says otherwise.

    Args:
        words (tuple of str): their text.
        probability (Tensor): (N,) at the step that committed it, of its least sure token.
        margin (Tensor): (N,) by how much that token was more probable than the runner-up.
        runner_up (tuple of str): text of that runner-up.
        entropy (Tensor): (N,) in nats at the commit step, mean over its tokens; low speaks for it.
        mean_entropy (Tensor): (N,) mean over the steps up to the commit; low speaks for it.
        all_entropy (Tensor): (N,) mean over all steps: the published signal, for comparison.
        commit_step (Tensor): (N,) int64, of its last token.
        flips (Tensor): (N,) int64, how often the likeliest token of its places changed up to the
            commit; few speak for it.
        grey, blurred (Tensor): (N,) fall of its log-probability with a picture of one colour, and
            with a blurred one: was the picture used? NaN in families whose pixels cannot be edited.
        position (Tensor): (N,) int64, of its first token in the answer.
        repetition (Tensor): (N,) int64, how often the word stands in the answer before.
    """

    words: tuple[str, ...]
    probability: Tensor
    margin: Tensor
    runner_up: tuple[str, ...]
    entropy: Tensor
    mean_entropy: Tensor
    all_entropy: Tensor
    commit_step: Tensor
    flips: Tensor
    grey: Tensor
    blurred: Tensor
    position: Tensor
    repetition: Tensor

    def records(self) -> list[dict[str, Any]]:
        """One flat record per word."""
        columns = {f.name: getattr(self, f.name) for f in fields(self)}
        rows = {n: v.tolist() if isinstance(v, Tensor) else list(v) for n, v in columns.items()}
        return [dict(zip(rows, row, strict=True)) for row in zip(*rows.values(), strict=True)]


@holding
def word_scores(
    forward: DenoisingForward, targets: Sequence[Target], example: int = 0
) -> WordScores:
    r"""Score words of a bound generation by what its own steps say.

    Costs one replay of the steps, and two passes with other pictures.

    Args:
        forward (DenoisingForward): with a bound generation; no given answer, which has no steps.
        targets (sequence of Target): N words, see :func:`captum_dcam.model.words.resolve`.
        example (int, optional): of the batch. Default: 0

    Returns:
        WordScores: of the words, in order.

    Raises:
        InfeasibleStepError: the answer was given.

    Examples::

        >>> from captum_dcam.data.scenes import make_scene
        >>> from captum_dcam.model.words import words_of
        >>> adapter = captum_dcam.load("mini")
        >>> forward = DenoisingForward(adapter)
        >>> request = adapter.prepare([[make_scene(0, 3).image]], ["describe the image ."])
        >>> tokens = forward.generate(request, gen_length=8).tokens[0].tolist()
        >>> found = word_scores(forward, words_of(adapter, tokens))
        >>> found.words[:3], bool((found.probability[:3] > 0.5).all())
        (('a', 'purple', 'ring'), True)
    """
    one = single(forward, example)
    if one.trajectory.forced:
        raise InfeasibleStepError(
            "scores of an answer that was given, not generated: no step of it decided anything; "
            "generate it, or ask explain(answer=…).trust"
        )
    record = _Record(one, targets)
    by_step(one, record.tokens, record.add)
    steps = [max(one.trajectory.step_of(0, p, "commit") for p in t.positions) for t in targets]
    return WordScores(
        words=tuple(t.text for t in targets),
        **record.scores(targets),
        commit_step=torch.tensor(steps, dtype=torch.int64),
        grey=_fall(one, targets, "mean"),
        blurred=_fall(one, targets, "blur"),
        position=torch.tensor([t.positions[0] for t in targets], dtype=torch.int64),
        repetition=_repetitions(one, targets),
    )


class _Record:
    """What every step's logits say of the tokens of words, step by step."""

    def __init__(self, forward: DenoisingForward, targets: Sequence[Target]) -> None:
        pairs = dict(p for t in targets for p in zip(t.positions, t.token_ids, strict=True))
        self.tokens = [Target("", (p,), (token,)) for p, token in sorted(pairs.items())]
        self._forward = forward
        shape = forward.trajectory.steps, len(self.tokens)
        self._entropy = torch.full(shape, torch.nan, dtype=torch.float64)
        self._best = torch.full((*shape, 2), -1, dtype=torch.int64)
        self._odds = torch.zeros(*shape, 2, dtype=torch.float64)
        self._own = torch.zeros(shape, dtype=torch.float64)

    def add(self, step: int, numbers: Sequence[int], logits: Tensor) -> None:
        """Take the logits (T, V) of a step, which computes the tokens of these numbers."""
        for n in numbers:
            (position,), (token,) = self.tokens[n].positions, self.tokens[n].token_ids
            odds = logits[position].detach().cpu().double().softmax(-1)
            self._entropy[step, n] = torch.special.entr(odds).sum()
            self._odds[step, n], self._best[step, n] = odds.topk(2)
            self._own[step, n] = odds[token]

    def scores(self, targets: Sequence[Target]) -> dict[str, Any]:
        """Columns of :class:`WordScores` that logits give."""
        trajectory = self._forward.trajectory
        confidence = trajectory.confidence[0].tolist()
        number = {t.positions[0]: n for n, t in enumerate(self.tokens)}
        rows: list[tuple[float, ...]] = []
        rivals = []
        for target in targets:
            own = [(number[p], trajectory.step_of(0, p, "commit")) for p in target.positions]
            until = [self._entropy[: step + 1, n].nanmean() for n, step in own]
            every = [self._entropy[:, n].nanmean() for n, _ in own]
            n, step = min(own, key=lambda pair: float(self._own[pair[1], pair[0]]))
            first, second = self._best[step, n].tolist()
            rival = second if first == self.tokens[n].token_ids[0] else first
            rivals.append(rival)
            other = float(self._odds[step, n, 1 if rival == second else 0])
            rows.append(
                (
                    least_sure(confidence, target),
                    float(self._own[step, n]) - other,
                    float(torch.stack([self._entropy[s, m] for m, s in own]).mean()),
                    float(torch.stack(until).mean()),
                    float(torch.stack(every).mean()),
                    float(sum(self._flips(m, s) for m, s in own)),
                )
            )
        columns = torch.tensor(rows, dtype=torch.float64).reshape(-1, 6).T
        names = ("probability", "margin", "entropy", "mean_entropy", "all_entropy")
        found: dict[str, Any] = dict(zip(names, columns, strict=False))
        texts = answer_token_texts(self._forward.adapter, rivals)
        return found | {
            "flips": columns[5].long(),
            "runner_up": tuple(text.strip() for text in texts),
        }

    def _flips(self, number: int, commit: int) -> int:
        """How often a token's likeliest candidate changed, up to the step that committed it."""
        best = [b for b in self._best[: commit + 1, number, 0].tolist() if b >= 0]
        return sum(a != b for a, b in itertools.pairwise(best))


def _fall(forward: DenoisingForward, targets: Sequence[Target], baseline: str) -> Tensor:
    """(N,) how far the words' log-probabilities fall where all of the picture is replaced; NaN in
    families whose pixels cannot be edited."""
    wanted = [(0, target) for target in targets]
    try:
        fill = pixel_fill(forward, baseline)
    except MethodError:
        return torch.full((len(targets),), torch.nan, dtype=torch.float64)
    removed = torch.ones(1, sum(h * w for h, w in forward.request.layout.shapes)).bool()
    before, after = (
        read(with_pixels(forward, pixels), wanted)
        for pixels in (forward.request.pixels.detach(), fill(removed))
    )
    return before - after


def _repetitions(forward: DenoisingForward, targets: Sequence[Target]) -> Tensor:
    """(N,) how often each word's text stands in the answer before it."""
    words = words_of(forward.adapter, forward.trajectory.tokens[0].tolist())
    before = [
        sum(w.text.lower() == t.text.lower() and w.positions[-1] < t.positions[0] for w in words)
        for t in targets
    ]
    return torch.tensor(before, dtype=torch.int64)
