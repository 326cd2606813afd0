r"""Maps that look at no model, in the place of a method's: the ceiling and two floors."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from captum_dcam.evaluation.words import Word
from captum_dcam.metrics import center_blob_map, random_map
from captum_dcam.model.layout import Grid, Layout


def floor_maps(
    name: str,
    words: Sequence[Word],
    masks: dict[str, Tensor],
    layout: Layout,
    seed: int,
    **settings: float,
) -> tuple[tuple[Tensor, ...], list[bool]]:
    r"""Maps (N, h, w), one a grid, and which words have one.

    Args:
        name (str): ``oracle`` (how much of each image token the mask covers; words with a mask),
            ``random`` or ``center_blob``.
        words (sequence of Word): N.
        masks (dict): (H, W) bool of the first picture's objects.
        layout (Layout): of the request.
        seed (int): of the random maps.
        **settings: of the map.
    """
    count, there = len(words), [True] * len(words)
    if name == "oracle":
        there = [bool(w.kind == "object" and w.objects) for w in words]
        maps = [_oracle(words, masks, grid, there) for grid in layout.grids]
    elif name == "random":
        generator = torch.Generator().manual_seed(seed)
        maps = [random_map((count, *grid.shape), generator) for grid in layout.grids]
    else:
        blobs = [center_blob_map(grid.shape, **settings) for grid in layout.grids]
        maps = [blob.expand(count, *blob.shape).clone() for blob in blobs]
    return tuple(maps), there


def _oracle(
    words: Sequence[Word], masks: dict[str, Tensor], grid: Grid, there: list[bool]
) -> Tensor:
    out = torch.zeros(len(words), *grid.shape)
    if grid.image == 0:
        for n, word in enumerate(words):
            if there[n]:
                union = torch.stack([masks[name] for name in word.objects]).any(0)
                out[n] = covered(union, grid)
    return out


def covered(mask: Tensor, grid: Grid) -> Tensor:
    r"""How much of each image token (h, w) the mask (H, W) covers, float32 in [0, 1].

    As :func:`captum_dcam.metrics.oracle_map`, for grids of any edges: tiles, crops, borders.
    """
    rows, columns = (
        _shares(edges, size)
        for edges, size in zip((grid.y_edges, grid.x_edges), mask.shape, strict=True)
    )
    return (rows @ mask.double() @ columns.T).clamp(0, 1).float()


def _shares(edges: Tensor, pixels: int) -> Tensor:
    """(cells, pixels): the share of each cell that each pixel fills."""
    at = torch.arange(pixels, dtype=torch.float64)
    low, high = edges[:, :1], edges[:, 1:]
    overlap = (torch.minimum(high, at + 1) - torch.maximum(low, at)).clamp(min=0)
    return overlap / (high - low)
