r"""Does what a map highlights speak for the word? It is removed, and the word is read again."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from captum_dcam import checks
from captum_dcam.model.forward import DenoisingForward, holding
from captum_dcam.model.trajectory import Score
from captum_dcam.model.words import Target


@holding
def sign_check(
    forward: DenoisingForward,
    targets: Sequence[Target],
    maps: Sequence[Tensor],
    generator: torch.Generator,
    *,
    example: int = 0,
    score: Score = "commit",
    share: float = 0.1,
) -> Tensor:
    r"""Does removing what a map highlights lower the token's probability?

    The mean image token replaces the ``share`` of image tokens with the highest values at the tap,
    and, for comparison, the same number of random ones, the same for all words. Then the explained
    tokens are read again. Costs the blocks above the tap once per word, and twice more.

    Args:
        forward (DenoisingForward): with the bound generation.
        targets (sequence of Target): N targets of the example; of one with a foil, the
            log-probability is that of its tokens less that of its foil's.
        maps (sequence of Tensor): one (N, h, w) per grid.
        generator (torch.Generator): draws the random tokens.
        example (int, optional), score (str or int, optional): as in
            :func:`captum_dcam.explain_generation`.
        share (float, optional): fraction of image tokens removed. Default: 0.1

    Returns:
        Tensor: (N, 2) float64: the fall of the log-probability (mean over the target's tokens) when
        the highlighted tokens are removed, and when random ones are. A map whose first column is
        not above the second is no evidence; one whose first column is below zero is inverted.
    """
    share = checks.real("share", share, 0, 1, above=True)
    checks.draws("generator", generator)
    forward.trajectory.check_score(score)
    if not targets:
        return torch.zeros(0, 2, dtype=torch.float64)
    before = _log_probabilities(forward, targets, example, score)
    drawn = [torch.rand(m.shape[1:], generator=generator) for m in maps]

    def after(values: Sequence[Tensor], words: Sequence[Target]) -> Tensor:
        masks = [_top(v, share) for v in values]

        def erase(features: Tensor, grid: int) -> Tensor:
            mean = features.mean((-2, -1), keepdim=True)
            return torch.where(masks[grid].to(features.device), mean, features)

        with forward.edited(erase):
            return _log_probabilities(forward, words, example, score)

    highlighted = [after([m[n] for m in maps], [target]) for n, target in enumerate(targets)]
    return torch.stack((before - torch.cat(highlighted), before - after(drawn, targets)), dim=1)


def _top(values: Tensor, share: float) -> Tensor:
    """Boolean mask of the highest ``share`` of values; the first of equal ones count."""
    count = max(1, round(share * values.numel()))
    order = values.flatten().float().argsort(descending=True, stable=True)[:count]
    mask = torch.zeros(values.numel(), dtype=torch.bool)
    mask[order.cpu()] = True
    return mask.view(values.shape)


def _log_probabilities(
    forward: DenoisingForward, targets: Sequence[Target], example: int, score: Score
) -> Tensor:
    """(N,) mean log-probability of each target's tokens, less its foil's, each read at its own
    step."""
    trajectory = forward.trajectory
    at = {
        p: trajectory.step_of(example, p, score) for p in {p for t in targets for p in t.positions}
    }
    steps = sorted(set(at.values()))
    with torch.no_grad():
        logits = forward.replay(torch.full((len(steps),), example), torch.tensor(steps))
    found = torch.zeros(len(targets), dtype=torch.float64)
    for n, target in enumerate(targets):
        for position, token, sign in target.terms:
            row = logits[steps.index(at[position]), position].double().log_softmax(-1)
            found[n] += sign * float(row[token]) / len(target.positions)
    return found
