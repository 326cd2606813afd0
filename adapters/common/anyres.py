r"""Any-resolution packing of LLaVA-type families: a base view, then a mosaic of tiles.

The image goes into the model twice. The base view is the whole image in one square tile; the
mosaic is the image resized without distortion, padded to a canvas of whole tiles and cut up. The
tiles' tokens are joined to one rectangle, freed of padding, perhaps reduced, and every row is
followed by a newline token. Here stands which canvas is chosen, how tiles are cut, and which pixels
every token covers; sizes are (W, H) as in PIL.
"""

from __future__ import annotations

import ast
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from captum_dcam.errors import InputError
from captum_dcam.model.layout import Grid

Size = tuple[int, int]
#: how the image is made square for the base view
BASES = ("stretch", "pad")


@dataclass(frozen=True)
class Tiling:
    r"""How a family cuts images.

    Args:
        tile (int): S, side of a tile in pixels.
        side (int): tokens along a tile's side, after pooling.
        cell (float): pixels along a token's side; ``side * cell`` may be less than ``tile``: the
            rest is cut off by the patch convolution (or by pooling), and no token sees it.
        pinpoints (tuple): (W, H) in pixels of the canvases; empty: base view only.
        base (str, optional): ``stretch`` or ``pad``. Default: ``"stretch"``
        fill (tuple, optional): RGB around a padded base view. Default: black
        most (int, optional): ``anyres_max_N``: mosaics of more than ``1.21 N side²`` tokens are
            reduced to about ``N side²``. Default: never reduced
        digits (int, optional): the padding in tokens is counted from products that are rounded to
            this number of digits first, as transformers does. Default: not rounded
    """

    tile: int
    side: int
    cell: float
    pinpoints: tuple[Size, ...] = ()
    base: str = "stretch"
    fill: tuple[int, int, int] = (0, 0, 0)
    most: int | None = None
    digits: int | None = None

    def __post_init__(self) -> None:
        if self.base not in BASES:
            raise InputError(f"base is {self.base!r}: expected one of {BASES}")
        if self.side * self.cell > self.tile + 1e-6:
            raise InputError(
                f"{self.side} tokens of {self.cell} px do not fit into a tile of {self.tile} px"
            )
        odd = [p for p in self.pinpoints if p[0] % self.tile or p[1] % self.tile]
        if odd:
            raise InputError(f"pinpoints {odd} are no multiples of the tile's {self.tile} px")

    def whole(self, tokens: float) -> int:
        """Whole tokens of a product."""
        return int(tokens if self.digits is None else round(tokens, self.digits))


@dataclass(frozen=True)
class Mosaic:
    r"""Where an image lies on its canvas, and which of the canvas's tokens remain.

    Args:
        canvas (tuple): (W, H) in pixels.
        resized (tuple), at (tuple): (W, H) and upper left (x, y) of the image on the canvas.
        kept (tuple): (h, w), tokens that remain after the padding's are taken away.
        offset (tuple): (row, column) of the first of them on the whole canvas.
        shape (tuple): (rows, columns) that the model sees: ``kept``, or less where reduced.
    """

    canvas: Size
    resized: Size
    at: tuple[int, int]
    kept: tuple[int, int]
    offset: tuple[int, int]
    shape: tuple[int, int]


def parse_pinpoints(value: object, tile: int) -> tuple[Size, ...]:
    """Canvases in pixels from a configuration: pairs, their text, or a range ``(1x1),...,(6x6)``
    in tiles."""
    if isinstance(value, str) and "x" in value:
        pairs = [(int(a), int(b)) for a, b in re.findall(r"\((\d+)x(\d+)\)", value)]
        (w0, h0), (w1, h1) = pairs[0], pairs[-1]
        return tuple((w * tile, h * tile) for w in range(w0, w1 + 1) for h in range(h0, h1 + 1))
    listed: Any = ast.literal_eval(value) if isinstance(value, str) else value
    if not isinstance(listed, Sequence) or not listed:
        raise InputError(
            f"image_grid_pinpoints is {value!r}: expected pairs (W, H) in pixels, or a range "
            "such as '(1x1),...,(6x6)' in tiles"
        )
    return tuple((int(w), int(h)) for w, h in listed)


def best_canvas(size: Size, pinpoints: Sequence[Size]) -> Size:
    """The canvas that shows most of the image's own pixels; of equals, the one with least waste;
    of those, the first."""

    def merit(canvas: Size) -> tuple[int, int]:
        scale = min(canvas[0] / size[0], canvas[1] / size[1])
        shown = min(int(size[0] * scale) * int(size[1] * scale), size[0] * size[1])
        return shown, shown - canvas[0] * canvas[1]

    return max(pinpoints, key=merit)


def mosaic(size: Size, tiling: Tiling) -> Mosaic:
    """Where an image of ``size`` goes."""
    width, height = size
    canvas = best_canvas(size, tiling.pinpoints)
    scale_w, scale_h = canvas[0] / width, canvas[1] / height
    if scale_w < scale_h:
        resized = canvas[0], min(math.ceil(height * scale_w), canvas[1])
    else:
        resized = min(math.ceil(width * scale_h), canvas[0]), canvas[1]
    at = (canvas[0] - resized[0]) // 2, (canvas[1] - resized[1]) // 2
    w, h = (tiling.side * (c // tiling.tile) for c in canvas)
    row = column = 0
    # families compute the padding in tokens anew, so an edge row can still hold some of it
    if width / height > w / h:
        row = (h - tiling.whole(height * (w / width))) // 2
    else:
        column = (w - tiling.whole(width * (h / height))) // 2
    shape = kept = h - 2 * row, w - 2 * column
    if tiling.most is not None:
        times = math.sqrt(kept[0] * kept[1] / (tiling.most * tiling.side**2))
        if times > 1.1:
            shape = int(kept[0] // times), int(kept[1] // times)
    if min(shape) < 1:
        side, most = ("higher", h) if width < height else ("wider", w)
        raise InputError(
            f"the image is {width}×{height} px, more than {most} times {side} than its other side: "
            f"on its canvas of {canvas[0]}×{canvas[1]} px it is thinner than a row of tokens; crop "
            "it or cut it into pieces"
        )
    return Mosaic(canvas, resized, at, kept, (row, column), shape)


def views(image: Image.Image, tiling: Tiling) -> list[Image.Image]:
    """The base view, then the tiles row by row: K images of S × S pixels."""
    image = image.convert("RGB")
    side = (tiling.tile, tiling.tile)
    out = [(padded(image, tiling.fill) if tiling.base == "pad" else image).resize(side)]
    if not tiling.pinpoints:
        return out
    place = mosaic(image.size, tiling)
    canvas = Image.new("RGB", place.canvas)
    canvas.paste(image.resize(place.resized), place.at)
    wide, high = (range(0, pixels, tiling.tile) for pixels in place.canvas)
    return out + [canvas.crop((x, y, x + side[0], y + side[1])) for y in high for x in wide]


def padded(image: Image.Image, fill: tuple[int, int, int]) -> Image.Image:
    """The image in the middle of the smallest square that holds it."""
    side = max(image.size)
    square = Image.new("RGB", (side, side), fill)
    square.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
    return square


def view_count(size: Size, tiling: Tiling) -> int:
    """K, how many tiles an image becomes, base view included."""
    if not tiling.pinpoints:
        return 1
    width, height = best_canvas(size, tiling.pinpoints)
    return 1 + (width // tiling.tile) * (height // tiling.tile)


def token_count(size: Size, tiling: Tiling) -> int:
    """Tokens of an image: base view, mosaic and its newlines."""
    if not tiling.pinpoints:
        return tiling.side**2
    rows, columns = mosaic(size, tiling).shape
    return tiling.side**2 + rows * (columns + 1)


def grids(size: Size, start: int, tiling: Tiling, image: int = 0) -> tuple[Grid, ...]:
    r"""The grids of one image: base view, then mosaic.

    Edges are in pixels of the image. Tokens of padding lie outside of it; what tokens of
    neighbouring tiles leave out between them is in no token's box.

    Args:
        size (tuple): (W, H) of the image.
        start (int): position of the image's first token.
        tiling (Tiling): of the family.
        image (int, optional): index of the image in the request. Default: 0
    """
    n, longest, shape = tiling.side, max(size), (size[1], size[0])
    ticks = torch.arange(n + 1, dtype=torch.float64) * tiling.cell / tiling.tile
    pad = tiling.base == "pad"
    marks = [ticks * longest - (longest - p) // 2 if pad else ticks * p for p in size]
    x, y = (torch.stack((on[:-1], on[1:]), dim=1) for on in marks)
    base = Grid(torch.arange(start, start + n * n).view(n, n), x, y, shape, image)
    if not tiling.pinpoints:
        return (base,)
    place = mosaic(size, tiling)
    rows, columns = place.shape
    at = start + n * n + torch.arange(rows)[:, None] * (columns + 1) + torch.arange(columns)
    x, y = (_mosaic_edges(place, axis, size, tiling) for axis in (0, 1))
    return base, Grid(at, x, y, shape, image)


def _mosaic_edges(place: Mosaic, axis: int, size: Size, tiling: Tiling) -> Tensor:
    """Pixel edges (n, 2) of the mosaic's columns (axis 0) or rows (axis 1)."""
    n, kept, offset = place.shape[1 - axis], place.kept[1 - axis], place.offset[1 - axis]
    ticks = torch.arange(n + 1, dtype=torch.float64) * kept / n + offset  # in the canvas's tokens
    left, right = ticks[:-1], ticks[1:]
    tile_left, tile_right = (left / tiling.side).floor(), (right / tiling.side).ceil() - 1
    gap = tiling.tile - tiling.side * tiling.cell
    on = torch.stack((left * tiling.cell + tile_left * gap, right * tiling.cell + tile_right * gap))
    return ((on - place.at[axis]) * size[axis] / place.resized[axis]).T


def owners(size: Size, tiling: Tiling) -> Tensor:
    """(K, S, S) int64: the image token that every pixel of the views belongs to, counted over the
    base view's grid and the mosaic's, row by row; -1 for padding and what no token sees."""
    s, n = tiling.tile, tiling.side
    inside = (torch.arange(s, dtype=torch.float64) / tiling.cell).floor().long()
    inside[inside >= n] = -1
    base = _joined(inside, inside, n)[None]
    if not tiling.pinpoints:
        return base
    place = mosaic(size, tiling)
    tiles = [
        torch.where(inside >= 0, inside + n * t, -1) for t in range(max(place.canvas) // s)
    ]  # the canvas's token of every pixel along one axis
    row, column = ([_seen(t, place, axis) for t in tiles] for axis in (0, 1))
    wide, tall = (c // s for c in place.canvas)
    parts = [_joined(row[i], column[j], place.shape[1]) for i in range(tall) for j in range(wide)]
    mosaic_part = torch.stack(parts)
    return torch.cat((base, torch.where(mosaic_part >= 0, mosaic_part + n * n, -1)))


def _seen(tokens: Tensor, place: Mosaic, axis: int) -> Tensor:
    """Rows (axis 0) or columns (axis 1) that the model sees, of the canvas's."""
    at = tokens - place.offset[axis]
    kept, shape = place.kept[axis], place.shape[axis]
    out = ((2 * at + 1) * shape).div(2 * kept, rounding_mode="floor")  # of the middle
    return torch.where((tokens >= 0) & (at >= 0) & (at < kept), out, -1)


def _joined(rows: Tensor, columns: Tensor, width: int) -> Tensor:
    """(S, S) numbers of cells in rows and columns; -1 where either is."""
    cell = rows[:, None] * width + columns
    return torch.where((rows[:, None] >= 0) & (columns >= 0), cell, -1)
