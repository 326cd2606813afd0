r"""Maps that look at no model, in the place of a method's: the ceiling and two floors."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from captum_dcam.evaluation.words import Word
from captum_dcam.metrics import center_blob_map, random_map
from captum_dcam.metrics.reference_maps import pixel_overlap
from captum_dcam.model.layout import Grid, Layout
from captum_dcam.registry import Registry

FloorMaps = tuple[tuple[Tensor, ...], list[bool]]

#: name → function of words, the first image's masks, the request's layout and a seed that gives
#: maps (N, h, w), one per grid, and which words have one; after those four come its settings
FLOORS: Registry[Callable[..., FloorMaps]] = Registry("floor", given=4)


@FLOORS.register("oracle")
def oracle(words: Sequence[Word], masks: dict[str, Tensor], layout: Layout, seed: int) -> FloorMaps:
    """How much of each image token the mask covers; of words with a mask."""
    there = [bool(w.kind == "object" and w.objects) for w in words]
    found = tuple(torch.zeros(len(words), *grid.shape) for grid in layout.grids)
    for maps, grid in zip(found, layout.grids, strict=True):
        for n, word in enumerate(words):
            if there[n] and grid.image == 0:
                union = torch.stack([masks[name] for name in word.objects]).any(0)
                maps[n] = covered(union, grid)
    return found, there


@FLOORS.register("random")
def random(words: Sequence[Word], masks: dict[str, Tensor], layout: Layout, seed: int) -> FloorMaps:
    """Noise of this seed."""
    generator, count = torch.Generator().manual_seed(seed), len(words)
    maps = (random_map((count, *grid.shape), generator) for grid in layout.grids)
    return tuple(maps), [True] * count


@FLOORS.register("center_blob")
def center_blob(
    words: Sequence[Word], masks: dict[str, Tensor], layout: Layout, seed: int, sigma: float = 0.25
) -> FloorMaps:
    """A Gaussian in the middle of every grid, ``sigma`` wide as a share of its sides."""
    blobs = (center_blob_map(grid.shape, sigma=sigma) for grid in layout.grids)
    return tuple(b.expand(len(words), *b.shape).clone() for b in blobs), [True] * len(words)


def covered(mask: Tensor, grid: Grid) -> Tensor:
    r"""How much of each image token (h, w) the mask (H, W) covers, float32 in [0, 1].

    As :func:`captum_dcam.metrics.oracle_map`, for grids of any edges: tiles, crops, borders.
    """
    shares = []
    for edges, size in zip((grid.y_edges, grid.x_edges), mask.shape, strict=True):
        start, end = edges[:, :1], edges[:, 1:]
        shares.append(pixel_overlap(start, end, size) / (end - start))
    return (shares[0] @ mask.double() @ shares[1].T).clamp(0, 1).float()
