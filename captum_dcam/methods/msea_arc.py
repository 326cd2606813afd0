r"""Multi-scale explanation aggregation and activation ranking correlation."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from captum_dcam.errors import InputError, MethodError
from captum_dcam.methods.base import (
    AttributionTask,
    PerWord,
    WordMaps,
    check_choices,
    check_counts,
    entered,
    pairs_of,
)
from captum_dcam.methods.lens import Lens, context_of, own_steps, reads
from captum_dcam.methods.rescaling import Back, rescaled
from captum_dcam.methods.tam import (
    check_order_and_filter,
    filtered,
    rank_biased_overlap,
    without_interference,
)
from captum_dcam.model.sequence import split_grids
from captum_dcam.model.words import Target

AGGREGATES = ("mean", "max")


@dataclass(frozen=True)
class Reader:
    """The lens at the task's own scale, every scale's lens with the way back to the task's grids
    (None: its own), and the step at which each text token's own map is read."""

    lens: Lens
    scales: list[tuple[Lens, Back | None]]
    steps: list[int]


@entered(
    "msea_arc",
    "MSEA + ARC",
    "logit lens",
    "Liang et al. 2025, Eq. 2–9",
    "3 (no cache: 3 per state)",
    "rescaling",
)
class MseaArc(PerWord):
    r"""MSEA and ARC (Liang et al. 2025), each of which can be turned off.

    MSEA (Eq. 3–5): the logit lens on the image at several sizes, the answer held fixed; the maps
    are brought back to the image's own grid (bilinearly, at the centres of its tokens) and
    aggregated. Models that keep an image's size get the resized image, others get it on a black
    canvas of the image's size, in the upper left corner of what their tokens show.

    ARC (Eq. 7–9): from the word's map A_t the mean of its context's maps is subtracted, a context
    token weighing :math:`1 - r_j`, with r_j the rank-biased overlap of the k tokens that it and the
    word predict; the map of the token with the least activation joins in with r = 0. The positive
    part of :math:`A_t - β Â_t` is filtered (rank Gaussian).

    Without ARC maps are signed logits (Eq. 5); with it they are not negative. Every token's map is
    read at its own state, the rankings at the state of the word. A word of several tokens is the
    sum of theirs before the filter.

    Args:
        scales (tuple of float): factors of the image's sides, at most 1 where the model does not
            keep an image's size. Default: (0.5, 0.75, 1.0)
        aggregate (str): ``mean`` (Eq. 5) or ``max``. Default: ``"mean"``
        k (int): depth of the rankings. Default: 50
        p (float): of the rank-biased overlap, in ]0, 1[; the paper does not give it. Default: 0.9
        order (str): what context is; see :class:`captum_dcam.methods.tam.TokenActivationMap`.
        filter (int): odd window of the rank Gaussian filter; 0 for none. Default: 3
        msea (bool): several scales. Default: True
        arc (bool): subtract the context. Default: True
    """

    scales: tuple[float, ...] = (0.5, 0.75, 1.0)
    aggregate: str = "mean"
    k: int = 50
    p: float = 0.9
    order: str = "commit"
    filter: int = 3
    msea: bool = True
    arc: bool = True

    def __post_init__(self) -> None:
        object.__setattr__(self, "scales", tuple(self.scales))
        if not self.scales or any(not 0 < s <= 4 for s in self.scales):
            raise InputError(f"scales is {self.scales}: expected factors above 0, at most 4")
        check_choices(self, aggregate=AGGREGATES)
        check_counts(self, "k")
        if not 0 < self.p < 1:
            raise InputError(f"p is {self.p}: expected a number between 0 and 1")
        check_order_and_filter(self)

    def check(self, task: AttributionTask) -> None:
        super().check(task)
        adapter = task.forward.adapter
        if self.msea and not adapter.any_size and max(self.scales) > 1:
            raise MethodError(
                f"scale {max(self.scales):g} does not fit the fixed input of {adapter.family}: "
                "the image is pasted on a canvas of its own size; choose scales up to 1"
            )

    def reader(self, task: AttributionTask) -> Reader:
        self.check(task)
        wanted = reads(task, self.order if self.arc else None)
        own = Lens(task.forward, wanted, base=self.arc)
        scales: list[tuple[Lens, Back | None]] = []
        for scale in self.scales if self.msea else (1.0,):
            if scale == 1:
                scales.append((own, None))
            else:
                forward, back = rescaled(task.forward, scale)
                scales.append((Lens(forward, wanted), back))
        return Reader(own, scales, own_steps(task))

    def word(self, task: AttributionTask, reader: Reader, target: Target) -> WordMaps:
        parts = []
        for position, token in pairs_of(target):
            image = self._aggregated(reader, task.step(position), token)
            parts.append(self._refined(task, reader, position, image) if self.arc else image)
        maps = split_grids(torch.stack(parts).sum(0), task.forward)
        return filtered(maps, self.filter if self.arc else 0), None

    def _aggregated(self, reader: Reader, step: int, token: int) -> Tensor:
        """(N,) logits over the scales (Eq. 5)."""
        found = [(lens.image(step, token), back) for lens, back in reader.scales]
        maps = torch.stack([m if back is None else back.of(m) for m, back in found])
        return maps.mean(0) if self.aggregate == "mean" else maps.amax(0)

    def _refined(
        self, task: AttributionTask, reader: Reader, position: int, image: Tensor
    ) -> Tensor:
        """(N,) positive part of Eq. 9, before its filter."""
        tokens, step = reader.lens.tokens, task.step(position)
        context = context_of(task, position, self.order)
        rankings = reader.lens.rankings(step, self.k)
        overlap = rank_biased_overlap(rankings[context], rankings[tokens.prompt + position], self.p)
        own = [(reader.steps[k], int(tokens.ids[k])) for k in context.tolist()]
        maps = [reader.lens.least(step), *(self._aggregated(reader, *pair) for pair in own)]
        weights = torch.cat((torch.ones(1), 1 - overlap.float()))
        return without_interference(image, torch.stack(maps), weights)[0]


@entered("msea", "MSEA", "logit lens", "Liang et al. 2025, Eq. 2–5", "3", "rescaling")
class Msea(MseaArc):
    """:class:`MseaArc` with several scales alone: signed maps, Eq. 5."""

    arc: bool = False


@entered("arc", "ARC", "logit lens", "Liang et al. 2025, Eq. 2, 7–9", "1 (no cache: 1 per state)")
class Arc(MseaArc):
    """:class:`MseaArc` at the image's own size alone: Eq. 7–9."""

    msea: bool = False
