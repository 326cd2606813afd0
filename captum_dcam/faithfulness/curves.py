r"""Deletion and insertion: the word's probability as the image goes, or comes, map first."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from captum_dcam import checks
from captum_dcam.errors import InputError
from captum_dcam.faithfulness.reading import check_counts, flat_maps
from captum_dcam.methods.captum_common import groups_of
from captum_dcam.methods.edited import BASELINES, WHERE, one_example, read_removed
from captum_dcam.model.forward import DenoisingForward, holding
from captum_dcam.model.progress import ProgressLike, watched
from captum_dcam.model.trajectory import Score
from captum_dcam.model.words import Target

#: shares of the image removed or revealed
FRACTIONS = (0.0, 0.05, 0.1, 0.2, 0.3, 0.5, 0.75, 1.0)


@dataclass(frozen=True, eq=False)
class Curves:
    r"""Deletion or insertion curves of N words.

    Args:
        kind (str): ``deletion`` or ``insertion``.
        fractions (Tensor): (S,) float64, from 0 to 1, the share of patches edited.
        probability (Tensor): (N, S) float64: of the word, geometric mean over its tokens.
        control (Tensor): (N, S) float64: the same in random order, mean over the orders drawn;
            (N, 0) when none was asked for.
    """

    kind: str
    fractions: Tensor
    probability: Tensor
    control: Tensor

    @property
    def auc(self) -> Tensor:
        """(N,) area under the curve. Deletion: lower is better. Insertion: higher."""
        return torch.trapezoid(self.probability, self.fractions)

    @property
    def control_auc(self) -> Tensor:
        """(N,) area under the curve of random orders."""
        if self.control.shape[1] == 0:
            raise InputError("no random order was drawn: ask for controls=1 or more")
        return torch.trapezoid(self.control, self.fractions)

    @property
    def gain(self) -> Tensor:
        """(N,) how far the area is on the good side of random orders; 0: no better than chance."""
        sign = 1 if self.kind == "insertion" else -1
        return sign * (self.auc - self.control_auc)

    @property
    def supported(self) -> Tensor:
        """(N,) bool: the whole image makes the word more probable than the empty one does."""
        return self._whole > self._empty

    @property
    def normalized(self) -> Tensor:
        """(N, S): 0 at the empty image's probability, 1 at the whole one's; not clipped. NaN for
        words that the image does not support, about which such a curve says nothing."""
        span = (self._whole - self._empty)[:, None]
        scaled = (self.probability - self._empty[:, None]) / span.masked_fill(span == 0, 1)
        return scaled.masked_fill(~self.supported[:, None], float("nan"))

    @property
    def normalized_auc(self) -> Tensor:
        """(N,) area under :attr:`normalized`; NaN for words that the image does not support."""
        return torch.trapezoid(self.normalized, self.fractions)

    @property
    def _whole(self) -> Tensor:
        return self.probability[:, 0 if self.kind == "deletion" else -1]

    @property
    def _empty(self) -> Tensor:
        return self.probability[:, -1 if self.kind == "deletion" else 0]


@holding
def deletion(
    forward: DenoisingForward,
    targets: Sequence[Target],
    maps: Iterable[Tensor],
    *,
    baseline: str = "mean",
    where: str = "pixels",
    patch: int = 1,
    fractions: Sequence[float] = FRACTIONS,
    score: Score = "commit",
    controls: int = 1,
    generator: torch.Generator | None = None,
    chunk: int = 8,
    progress: ProgressLike = None,
) -> Curves:
    r"""Remove image patches, those with the highest map first, and read the word again.

    The answer is held fixed: every token of a word is read in the state of its own step, masked,
    with the same other tokens around it. Only the image changes.

    Args:
        forward (DenoisingForward): bound, one example.
        targets (sequence of Target): N words.
        maps (iterable of Tensor): one (N, h, w) per grid; order counts, scale does not.
        baseline (str, optional): what replaces removed pixels: ``mean``, ``blur`` or ``inpaint``,
            see :func:`captum_dcam.methods.edited.pixel_fill`. Default: ``"mean"``
        where (str, optional): ``pixels``, or ``tap``: removed image tokens become the mean image
            token of their grid at the tapped block, which needs no pixels and runs on every family
            (``baseline`` then means nothing). Blocks below have mixed the tokens, so few of them
            tell much: there, insertion hardly separates methods. Default: ``"pixels"``
        patch (int, optional): side of a patch in image tokens. Default: 1
        fractions (sequence of float, optional): increasing, from 0 to 1; rounded to whole patches.
            Default: :data:`FRACTIONS`
        score (str or int, optional): state at which a token is read, or the step's number.
            Default: ``"commit"``
        controls (int, optional): random orders to compare with, the same for all words. Default: 1
        generator (torch.Generator, optional): draws them, and the order of equal values. Default:
            one with seed 0
        chunk (int, optional): edited images per forward pass. Default: 8
        progress (bool, callable or Progress, optional): True shows a bar of the model's passes, see
            :mod:`captum_dcam.model.progress`. Default: nothing

    Returns:
        Curves: of kind ``deletion``.

    Raises:
        MethodError: pixels cannot be edited in this family: use ``where="tap"``.
        ValueError: settings or maps that do not fit.

    Source:
        Petsiuk et al., RISE, 2018, section 4.1.
    """
    return _curves("deletion", forward, targets, maps, baseline, where, patch, fractions, score,
                   controls, generator, chunk, progress)  # fmt: skip


@holding
def insertion(
    forward: DenoisingForward,
    targets: Sequence[Target],
    maps: Iterable[Tensor],
    *,
    baseline: str = "mean",
    where: str = "pixels",
    patch: int = 1,
    fractions: Sequence[float] = FRACTIONS,
    score: Score = "commit",
    controls: int = 1,
    generator: torch.Generator | None = None,
    chunk: int = 8,
    progress: ProgressLike = None,
) -> Curves:
    r"""Reveal image patches of an empty image, those with the highest map first.

    Args, returns and raises as :func:`deletion`; the kind is ``insertion``.
    """
    return _curves("insertion", forward, targets, maps, baseline, where, patch, fractions, score,
                   controls, generator, chunk, progress)  # fmt: skip


def check_settings(
    baseline: str,
    where: str,
    patch: int,
    chunk: int,
    fractions: Sequence[float] = (0.0, 1.0),
    controls: int = 0,
) -> None:
    """ValueError for settings of :func:`deletion` that are out of range."""
    check_counts(patch=patch, chunk=chunk)
    check_counts(0, controls=controls)
    checks.choice("baseline", baseline, BASELINES)
    checks.choice("where", where, WHERE)
    asked = list(fractions)
    if asked[:1] != [0] or asked[-1:] != [1] or asked != sorted(set(asked)):
        raise InputError(f"fractions are {asked}: expected increasing numbers from 0 to 1")


def checked_call(
    forward: DenoisingForward,
    targets: Sequence[Target],
    score: Score,
    generator: torch.Generator | None,
    **settings: Any,
) -> torch.Generator:
    """What draws for :func:`deletion` and metrics like it, whose words and settings are checked."""
    check_settings(**settings)
    forward.trajectory.check_score(score)
    if not targets:
        raise InputError("no target is given: expected at least one word")
    return checks.draws("generator", generator) or torch.Generator().manual_seed(0)


def _curves(
    kind: str,
    forward: DenoisingForward,
    targets: Sequence[Target],
    maps: Iterable[Tensor],
    baseline: str,
    where: str,
    patch: int,
    fractions: Sequence[float],
    score: Score,
    controls: int,
    generator: torch.Generator | None,
    chunk: int,
    progress: ProgressLike,
) -> Curves:
    generator = checked_call(
        forward, targets, score, generator, baseline=baseline, where=where, patch=patch,
        chunk=chunk, fractions=fractions, controls=controls,
    )  # fmt: skip
    groups, places = ranked(forward, targets, maps, patch, generator, "deletion, insertion")
    count = places.shape[1]
    random = [_places(torch.zeros(count), generator) for _ in range(controls)]
    counts = sorted({round(share * count) for share in fractions})
    number, steps = len(targets), len(counts)
    edited = torch.stack([p < c for p in [*places, *random] for c in counts])
    removed = edited if kind == "deletion" else ~edited
    wanted = [
        (order * steps + s, target)
        for n, target in enumerate(targets)
        for order in (n, *range(number, number + controls))
        for s in range(steps)
    ]
    with watched(forward.adapter, progress, kind):
        logs = read_removed(forward, removed, groups, wanted, baseline, where, score, chunk)
    found = logs.exp().view(number, 1 + controls, steps)
    control = found[:, 1:]
    return Curves(
        kind,
        torch.tensor(counts, dtype=torch.float64) / count,
        found[:, 0],
        control.mean(1) if controls else control.new_zeros(number, 0),
    )


def ranked(
    forward: DenoisingForward,
    targets: Sequence[Target],
    maps: Iterable[Tensor],
    patch: int,
    generator: torch.Generator,
    caller: str,
) -> tuple[Tensor, Tensor]:
    """Patch (T,) of every image token, and the places (N, G) of patches in the order of every map,
    0 for the highest; equal values in random order."""
    values = flat_maps(forward, maps, targets, caller)
    groups = groups_of(one_example(forward).layout.shapes, patch)
    count = int(groups.max()) + 1
    sums = torch.zeros(len(values), count, dtype=torch.float64).index_add_(1, groups, values)
    places = [_places(row / groups.bincount(), generator) for row in sums]
    return groups, torch.stack(places) if places else groups.new_zeros(0, count)


def _places(values: Tensor, generator: torch.Generator) -> Tensor:
    """Place (G,) of every patch, 0 for the highest value; equal values in random order."""
    # Ties in reading order would give a flat map a head start at the top of the image.
    shuffle = torch.randperm(len(values), generator=generator, device=generator.device).cpu()
    order = shuffle[values[shuffle].argsort(descending=True, stable=True)]
    places = torch.empty_like(order)
    places[order] = torch.arange(len(order))
    return places
