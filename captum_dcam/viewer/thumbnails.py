r"""Small overlays of a comparison: heat of one word by one method over the image or images."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from PIL import Image
from scipy import ndimage
from torch import Tensor
from torch.nn.functional import avg_pool2d

from captum_dcam.results.comparison import Comparison
from captum_dcam.viewer.ink import Color
from captum_dcam.viewer.overlay import MUTE, fitted, muted, overlay, picture_maps, scaled

#: of the object's mask
OUTLINE: Color = (255, 255, 255)
#: pixels between pictures of one cell
BETWEEN = 2


def places(sizes: Sequence[tuple[int, int]], width: int) -> list[tuple[int, int, int, int]]:
    """(left, top, width, height) of every image in a cell ``width`` wide, row by row."""
    columns = math.ceil(math.sqrt(len(sizes)))
    own = (width - BETWEEN * (columns - 1)) // columns
    shown = [fitted(size, own, own * 1.25) for size in sizes]
    out, top = [], 0
    for start in range(0, len(sizes), columns):
        line = shown[start : start + columns]
        for k, (w, h) in enumerate(line):
            left = k * (own + BETWEEN) + (own - w) // 2
            out.append((left, top, w, h))
        top += max(h for _, h in line) + BETWEEN
    return out


def grid_height(sizes: Sequence[tuple[int, int]], width: int) -> int:
    """Height of a cell."""
    return max(top + height for _, top, _, height in places(sizes, width))


class Thumbnails:
    r"""Overlays of one size.

    Args:
        comparison (Comparison): maps, images and masks.
        width (int): of a cell in pixels.
        scale (str): ``map`` or ``row``.
        cmap (str): a matplotlib colour map.
        mode (str): ``bilinear`` or ``nearest``.
    """

    def __init__(
        self, comparison: Comparison, width: int, scale: str, cmap: str, mode: str
    ) -> None:
        self.comparison = comparison
        self.width = width
        self.scale, self.cmap, self.mode = scale, cmap, mode
        sizes = [i.size for i in comparison.images]
        self.places = places(sizes, width)
        self.height = grid_height(sizes, width)
        self._grounds = [
            muted(scaled(image, (w, h)), MUTE)
            for image, (_, _, w, h) in zip(comparison.images, self.places, strict=True)
        ]
        self._edges = [_edge(m, self.places[0][2:]) for m in comparison.masks or ()]
        self._maps: dict[int, list[Tensor]] = {}

    def pictures(self, row: int, word: int) -> list[tuple[Image.Image, tuple[int, int]]] | None:
        """Overlays of a cell with their places; None where there is no map."""
        every = self._row(row)
        maps = [m[word] for m in every]
        peak = max(float(m.max()) for m in maps)
        whole = all(bool(m.isfinite().all()) for m in maps)
        if not whole or (peak <= 0 and not self.comparison.rows[row].complete[word]):
            return None
        if self.scale == "row":
            finite = [m[m.isfinite().flatten(1).all(1)] for m in every]
            peak = max(float(m.max()) for m in finite if len(m))
        vmax = peak if peak > 0 else None
        drawn = [
            overlay(ground, values, cmap=self.cmap, vmax=vmax)
            for values, ground in zip(maps, self._grounds, strict=True)
        ]
        edge = self._edges[word] if word < len(self._edges) else None
        if edge is not None:
            pixels = np.asarray(drawn[0]).astype(np.float32)
            pixels[edge] = 0.2 * pixels[edge] + 0.8 * np.asarray(OUTLINE, dtype=np.float32)
            drawn[0] = Image.fromarray(np.rint(pixels).astype(np.uint8))
        return [(one, place[:2]) for one, place in zip(drawn, self.places, strict=True)]

    def _row(self, row: int) -> list[Tensor]:
        """Maps (N, H, W) of a method over every image; computed once, kept for one row."""
        if row not in self._maps:
            places = enumerate(self.places)
            self._maps = {row: [self._reduced(row, i, (w, h)) for i, (_, _, w, h) in places]}
        return self._maps[row]

    def _reduced(self, row: int, image: int, size: tuple[int, int]) -> Tensor:
        """Maps over a thumbnail; tokens smaller than its pixels are averaged."""
        layout = self.comparison.layout
        # grids side by side have at most so many tokens in a line
        tokens = sum(max(grid.shape) for grid in layout.grids if grid.image == image)
        k = max(1, math.ceil(tokens / min(size)))
        large = (size[0] * k, size[1] * k)
        maps = picture_maps(layout, self.comparison.rows[row].maps, image, large, self.mode)
        return maps if k == 1 else avg_pool2d(maps[:, None], k)[:, 0]


def _edge(mask: Tensor | None, size: tuple[int, int]) -> np.ndarray | None:
    """Inner border (H, W) bool of a mask at another size (W, H)."""
    if mask is None:
        return None
    full = Image.fromarray(mask.numpy().astype(np.uint8) * 255)
    small = np.asarray(full.resize(size, Image.Resampling.BOX)) > 127
    return small & ~ndimage.binary_erosion(small)
