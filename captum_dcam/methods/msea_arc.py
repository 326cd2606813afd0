r"""Multi-scale explanation aggregation and activation ranking correlation.

:func:`rescaled` binds a generation with its images at another size, and says how maps come back.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from PIL import Image
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
from captum_dcam.methods.tam import (
    check_order_and_filter,
    filtered,
    rank_biased_overlap,
    without_interference,
)
from captum_dcam.model.adapter import Request
from captum_dcam.model.forward import DenoisingForward
from captum_dcam.model.images import to_rgb
from captum_dcam.model.layout import Grid, Layout
from captum_dcam.model.sequence import split_grids
from captum_dcam.model.words import Target

AGGREGATES = ("mean", "max")

# -- images at another size ----------------------------------------------------------------------


@dataclass(frozen=True)
class Place:
    """Where a point (y, x) of an image lies at another size: ``point * ratio + offset``."""

    ratio: tuple[float, float]
    offset: tuple[int, int]


@dataclass(frozen=True)
class Back:
    r"""How maps of another scale come back to a layout's grids.

    Args:
        shapes (tuple): (h', w') of the other scale's grids.
        ways (tuple): for every own grid (h, w), triples of another grid's number and the matrices
            (h, h') and (w, w'): the map is the sum of ``R @ map @ C.T`` over them.
    """

    shapes: tuple[tuple[int, int], ...]
    ways: tuple[tuple[tuple[int, Tensor, Tensor], ...], ...]

    def of(self, values: Tensor) -> Tensor:
        """Values (N',) of the other scale's image tokens as (N,) of the own."""
        parts = values.double().split([h * w for h, w in self.shapes])
        others = [p.view(s) for p, s in zip(parts, self.shapes, strict=True)]
        maps = [sum((r @ others[i] @ c.T for i, r, c in way), torch.zeros(())) for way in self.ways]
        return torch.cat([m.flatten() for m in maps]).to(values.dtype)


def rescaled(forward: DenoisingForward, scale: float) -> tuple[DenoisingForward, Back]:
    r"""The same prompt and answer with the images at another size.

    Args:
        forward (DenoisingForward): bound, batch 1.
        scale (float): factor of the images' sides.

    Returns:
        tuple: a forward bound to the new request and the same trajectory; how its maps come back to
        ``forward``'s grids.

    Raises:
        MethodError: the new request has other images or grids, or its grids show other parts.
    """
    request, adapter = forward.request, forward.adapter
    images, places = [], []
    for index, image in enumerate(request.images[0]):
        whole = to_rgb(image)
        w, h = max(1, round(whole.width * scale)), max(1, round(whole.height * scale))
        small = whole.resize((w, h), Image.Resampling.BICUBIC)
        ratio, (y, x) = (h / whole.height, w / whole.width), (0, 0)
        if not adapter.any_size:
            # on a black canvas, so that what tokens showed of the image, they show again
            start = _shown(request.layout, index)
            y, x = (round(s * (1 - r)) for s, r in zip(start, ratio, strict=True))
            canvas = Image.new("RGB", image.size)
            canvas.paste(small, (x, y))
            small = canvas
        images.append(small)
        places.append(Place(ratio, (y, x)))
    new = adapter.prepare_again(request, images)
    old_grids, new_grids = request.layout.grids, new.layout.grids
    if [g.image for g in old_grids] != [g.image for g in new_grids]:
        raise MethodError(
            f"at scale {scale:g} {adapter.family} lays out {len(new_grids)} grids of image tokens, "
            f"at scale 1 {len(old_grids)}: their maps cannot be aggregated; choose other scales"
        )
    ways = tuple(
        _ways(number, old_grids[number], new_grids, places, scale)
        for number in range(len(old_grids))
    )
    return _bound(forward, new), Back(new.layout.shapes, ways)


def _shown(layout: Layout, image: int) -> tuple[float, float]:
    """Upper left corner (y, x) of what the tokens of an image show; (0, 0) if it has none."""
    grids = [g for g in layout.grids if g.image == image]
    if not grids:
        return 0.0, 0.0
    return min(float(g.y_edges.min()) for g in grids), min(float(g.x_edges.min()) for g in grids)


def _bound(forward: DenoisingForward, new: Request) -> DenoisingForward:
    """The generation bound to another request with the same answer."""
    request, trajectory = forward.request, forward.trajectory
    longer = new.layout.prefix_length - request.layout.prefix_length
    holds_prefix = [i == 0 or trajectory.cache == "none" for i in range(len(trajectory.lengths))]
    lengths = zip(trajectory.lengths, holds_prefix, strict=True)
    trajectory = replace(
        trajectory,
        lengths=tuple(n + longer * holds for n, holds in lengths),
        image_end=new.layout.image_end,
        kept={},
    )
    return forward.again(request=new, trajectory=trajectory)


def _ways(
    number: int, old: Grid, new_grids: Sequence[Grid], places: Sequence[Place], scale: float
) -> tuple[tuple[int, Tensor, Tensor], ...]:
    """From which grids of the other scale the map of grid ``number`` comes, and how.

    Its own, where that shows all of its part of the image; else (tiles) those with cells of the
    same size, each for the points that it shows.
    """
    place = places[old.image]
    points = [
        e.mean(1) * r + o
        for e, r, o in zip((old.y_edges, old.x_edges), place.ratio, place.offset, strict=True)
    ]
    ends = [n * r + o for n, r, o in zip(old.image_size, place.ratio, place.offset, strict=True)]
    chosen = [number]
    if not all(bool(i.all()) for i in _inside(new_grids[number], points)):
        chosen = [i for i, g in enumerate(new_grids) if g.image == old.image and _alike(g, old)]
    ways, covered = [], 0
    for index in chosen:
        grid = new_grids[index]
        inside = _inside(grid, points)
        covered += int(inside[0].sum() * inside[1].sum())
        rows, columns = (
            _interpolation(e.mean(1), p, end) * i[:, None]
            for e, p, end, i in zip((grid.y_edges, grid.x_edges), points, ends, inside, strict=True)
        )
        ways.append((index, rows, columns))
    if covered != old.shape[0] * old.shape[1]:
        raise MethodError(
            f"at scale {scale:g} the grids of image tokens show other parts of the image: "
            f"{covered} of {old.shape[0] * old.shape[1]} tokens have a place there; choose other "
            "scales"
        )
    return tuple(ways)


def _inside(grid: Grid, points: Sequence[Tensor]) -> list[Tensor]:
    """Which of points' y (h,) and x (w,) the grid shows; of abutting grids only one does."""
    every = zip((grid.y_edges, grid.x_edges), points, strict=True)
    return [(p >= e.min()) & (p < e.max()) for e, p in every]


def _alike(one: Grid, other: Grid) -> bool:
    """Whether two grids have cells of the same size."""
    pairs = ((one.y_edges, other.y_edges), (one.x_edges, other.x_edges))
    sizes = [[float((e[:, 1] - e[:, 0]).mean()) for e in pair] for pair in pairs]
    return all(abs(a - b) <= 1e-6 * max(a, b) for a, b in sizes)


def _interpolation(centers: Tensor, at: Tensor, shown: float) -> Tensor:
    """(n, m): linear between centres, flat outside them and beyond where the image ends."""
    count = max(1, int((centers < shown).sum()))
    at = at.clamp(centers[0], centers[count - 1])
    right = torch.searchsorted(centers[:count].contiguous(), at).clamp(min(1, count - 1), count - 1)
    left = (right - 1).clamp_min(0)
    gap = centers[right] - centers[left]
    part = (at - centers[left]) / gap.where(gap > 0, torch.ones_like(gap))
    out = torch.zeros(len(at), len(centers), dtype=torch.float64)
    rows = torch.arange(len(at))
    out[rows, left] += 1 - part
    out[rows, right] += part
    return out


# -- the methods ---------------------------------------------------------------------------------


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
