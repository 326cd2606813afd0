r"""How little of an image must go for a wrong word to give way to the right one, after EAGLE."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from captum_dcam.errors import InputError
from captum_dcam.faithfulness.curves import checked_call, ranked
from captum_dcam.methods.edited import read_removed
from captum_dcam.model.forward import DenoisingForward, holding
from captum_dcam.model.trajectory import Score
from captum_dcam.model.words import Target

#: shares of the image removed
REMOVED = (0.0, 0.02, 0.05, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)


@dataclass(frozen=True, eq=False)
class Corrections:
    r"""N words that were explained as what should have been written.

    Args:
        fractions (Tensor): (S,) float64, increasing, the share of patches removed.
        right (Tensor): (N, S) bool: the word is the likeliest at all its places then.
    """

    fractions: Tensor
    right: Tensor

    @property
    def area(self) -> Tensor:
        """(N,) float64, the smallest share whose removal corrects the word; 1 where none does."""
        never = torch.ones_like(self.fractions)
        return torch.where(self.right, self.fractions, never).amin(1)

    @property
    def amcr(self) -> float:
        """Average minimal correction region; lower is better."""
        return float(self.area.mean())

    def success_rate(self, budget: float = 0.1) -> float:
        """CSR@budget: the share of the words that are corrected by removing at most ``budget`` of
        the image; higher is better. Of all words: the authors' script leaves those out that
        nothing corrects."""
        return float((self.right & (self.fractions <= budget)).any(1).double().mean())


@holding
def correction(
    forward: DenoisingForward,
    targets: Sequence[Target],
    maps: Iterable[Tensor],
    *,
    baseline: str = "mean",
    where: str = "pixels",
    patch: int = 1,
    fractions: Sequence[float] = REMOVED,
    score: Score = "commit",
    generator: torch.Generator | None = None,
    chunk: int = 8,
) -> Corrections:
    r"""Remove what a map of the right word holds least of, until the model would write this word.

    A target has the places of the wrong word and the token ids of the right one; its map shows what
    speaks for the right one. Where EAGLE's authors decode a new answer for every edited image, here
    the answer is held fixed and the places are read in the states of their own steps.

    Args:
        forward (DenoisingForward): bound, one example.
        targets (sequence of Target): N words, of the right tokens at the wrong word's positions.
        maps (iterable of Tensor): one (N, h, w) per grid; order counts, scale does not.
        baseline, where, patch, score, chunk: as in :func:`captum_dcam.faithfulness.deletion`.
        fractions (sequence of float, optional): of the image removed, increasing, from 0 and below
            1; rounded to whole patches. Default: :data:`REMOVED`
        generator (torch.Generator, optional): draws the order of equal values. Default: one with
            seed 0

    Returns:
        Corrections: with AMCR and CSR.

    Source:
        Chen et al., CVPR 2026 (arXiv:2509.22496), hallucination mitigation: AMCR, CSR@10 %.
    """
    asked = list(fractions)
    if asked != sorted(set(asked)) or not asked or asked[0] < 0 or asked[-1] >= 1:
        raise InputError(f"fractions are {asked}: expected increasing numbers from 0 to below 1")
    generator = checked_call(
        forward, targets, score, generator, baseline=baseline, where=where, patch=patch, chunk=chunk
    )
    groups, places = ranked(forward, targets, maps, patch, generator, "correction")
    count = places.shape[1]
    counts = sorted({round(share * count) for share in asked})
    removed = torch.stack([row >= count - c for row in places for c in counts])
    wanted = [(row, targets[row // len(counts)]) for row in range(len(removed))]
    found = read_removed(
        forward, removed, groups, wanted, baseline, where, score, chunk, value="likeliest"
    )
    fractions_of = torch.tensor(counts, dtype=torch.float64) / count
    return Corrections(fractions_of, found.view(len(targets), len(counts)) == 1)
