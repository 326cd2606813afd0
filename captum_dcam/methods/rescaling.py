"""A bound generation with its images at another size, and how its maps come back."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from PIL import Image
from torch import Tensor

from captum_dcam.errors import MethodError
from captum_dcam.model.adapter import Request
from captum_dcam.model.forward import DenoisingForward
from captum_dcam.model.layout import Grid, Layout
from captum_dcam.model.prompts import to_rgb


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
