r"""Every denoising step of a generation is replayed, and what its logits say of words is noted."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from captum_dcam import maps
from captum_dcam.model.budget import rows_at_once
from captum_dcam.model.forward import DenoisingForward, holding, single
from captum_dcam.model.words import Target, least_sure

#: how many candidates of every token are noted at every step
CANDIDATES = 3


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
    return StepRecord(single(forward, example), targets).probabilities


class StepRecord:
    r"""What the logits of every step say of the tokens of words; replays the steps once.

    Of an answer that was given, each token is read in the state that hides it alone.

    Args:
        forward (DenoisingForward): with a bound generation of one example.
        targets (sequence of Target): N words, M different tokens in all.

    Attributes:
        tokens (tuple of Target): the M tokens, in the order of their positions.
        entropy (Tensor): (S, M) float64 in nats; NaN where a step does not compute the token.
        odds (Tensor): (S, M, C) float64: probabilities of its C likeliest candidates, the likeliest
            first.
        best (Tensor): (S, M, C) int64: their ids; -1 where a step does not compute the token.
        logs (Tensor): (S, M) float64: its own log-probability.
        probabilities (Tensor): (S, N) float32, as :func:`word_probabilities` gives them.
    """

    def __init__(self, forward: DenoisingForward, targets: Sequence[Target]) -> None:
        pairs = {p for t in targets for p in zip(t.positions, t.token_ids, strict=True)}
        self.forward, self.targets = forward, tuple(targets)
        self.tokens = tuple(Target("", (p,), (token,)) for p, token in sorted(pairs))
        self._number = {pair: n for n, pair in enumerate(sorted(pairs))}
        steps, count = forward.trajectory.steps, min(CANDIDATES, forward.adapter.vocabulary)
        shape = steps, len(self.tokens)
        self.entropy = torch.full(shape, torch.nan, dtype=torch.float64)
        self.best = torch.full((*shape, count), -1, dtype=torch.int64)
        self.odds = torch.zeros(*shape, count, dtype=torch.float64)
        self.logs = torch.full(shape, torch.nan, dtype=torch.float64)
        self.probabilities = torch.full((steps, len(self.targets)), torch.nan)
        self._words = [] if forward.trajectory.forced else maps.words_read(forward, targets)
        by_step(forward, self.tokens, self._add)

    def _add(self, step: int, numbers: Sequence[int], logits: Tensor) -> None:
        """Take the logits (T, V) of a step, which computes the tokens of these numbers."""
        at = torch.tensor(numbers)
        positions = torch.tensor([self.tokens[n].positions[0] for n in numbers])
        tokens = torch.tensor([self.tokens[n].token_ids[0] for n in numbers])
        rows = logits.detach()[positions.to(logits.device)].cpu().double().log_softmax(-1)
        odds = rows.exp()
        self.entropy[step, at] = torch.special.entr(odds).sum(-1)
        self.odds[step, at], self.best[step, at] = odds.topk(self.best.shape[-1])
        self.logs[step, at] = rows.gather(1, tokens[:, None])[:, 0]
        if self._words[step : step + 1]:
            self._reckon(step, logits)

    def _reckon(self, step: int, logits: Tensor) -> None:
        """The words' probabilities at a step; words of the answer's own tokens together."""
        trajectory, usual = self.forward.trajectory, None
        for n in self._words[step]:
            target = self.targets[n]
            if trajectory.tokens[0, list(target.positions)].tolist() != list(target.token_ids):
                found = maps.odds_of(self.forward, target, 0, step, logits)
            else:
                usual = maps.token_odds(self.forward, 0, step, logits) if usual is None else usual
                found = least_sure(usual, target)
            self.probabilities[step, n] = found

    def commits(self, target: Target) -> list[tuple[int, int]]:
        """For each of a word's tokens, its number and the step that committed it."""
        trajectory = self.forward.trajectory
        return [
            (self._number[p, token], trajectory.step_of(0, p, "commit"))
            for p, token in zip(target.positions, target.token_ids, strict=True)
        ]

    def least_sure(self, target: Target) -> tuple[int, int]:
        """The number of a word's least sure token, and the step that committed it."""
        return min(self.commits(target), key=lambda pair: float(self.logs[pair[1], pair[0]]))

    def rival(self, number: int, step: int) -> tuple[int, float]:
        """The likeliest other token in a token's place at a step, and its probability."""
        (own,) = self.tokens[number].token_ids
        at = next(c for c, token in enumerate(self.best[step, number].tolist()) if token != own)
        return int(self.best[step, number, at]), float(self.odds[step, number, at])

    def flips(self, number: int, commit: int) -> int:
        """How often a token's likeliest candidate changed, up to the step that committed it."""
        best = [b for b in self.best[: commit + 1, number, 0].tolist() if b >= 0]
        return sum(a != b for a, b in itertools.pairwise(best))


def by_step(
    forward: DenoisingForward,
    targets: Sequence[Target],
    add: Callable[[int, Sequence[int], Tensor], None],
    example: int = 0,
) -> None:
    r"""Replay every denoising step that computes one of the words, in chunks, without gradients; of
    an answer that was given, the states that hide one of them.

    Args:
        forward (DenoisingForward): with a bound generation.
        targets (sequence of Target): N words.
        add (callable): told of a step, the numbers of the words that it computes, and its logits
            (T, V).
        example (int, optional): of the batch. Default: 0
    """
    trajectory = forward.trajectory
    read = maps.words_read(forward, targets, example)
    if trajectory.forced:
        hides = trajectory.commit_step[example].tolist()
        own = [{hides[p] for p in t.positions} for t in targets]
        read = [[n for n in row if s in own[n]] for s, row in enumerate(read)]
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
