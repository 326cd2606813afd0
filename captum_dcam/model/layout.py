r"""Which sequence position is which pixel box.

A :class:`Grid` is one rectangle of image tokens (an image, a tile, a thumbnail, a frame); a
:class:`Layout` is all grids of a request. Positions are those of the sequence that the transformer
blocks see, boxes are in pixels of the image that the user gave.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from captum_dcam.errors import InputError, InputTypeError

#: interpolation modes of :meth:`Grid.to_pixels`
MODES = ("bilinear", "nearest")


@dataclass(frozen=True)
class Grid:
    r"""A rectangle of image tokens.

    Args:
        positions (Tensor): (h, w) int64, position in the hooked sequence of every token.
        x_edges (Tensor): (w, 2) float64, left and right pixel edge of every column.
        y_edges (Tensor): (h, 2) float64, upper and lower pixel edge of every row.
        image_size (tuple): (H, W) of the image in pixels.
        image (int): index of the image in the request. Default: 0
    """

    positions: Tensor
    x_edges: Tensor
    y_edges: Tensor
    image_size: tuple[int, int]
    image: int = 0

    @property
    def shape(self) -> tuple[int, int]:
        """(h, w) in tokens."""
        return self.positions.shape[0], self.positions.shape[1]

    def box(self, row: int, column: int) -> tuple[float, float, float, float]:
        """(x0, y0, x1, y1) in pixels of the token at (row, column)."""
        (x0, x1), (y0, y1) = self.x_edges[column].tolist(), self.y_edges[row].tolist()
        return x0, y0, x1, y1

    def to_pixels(self, maps: Tensor, mode: str = "bilinear") -> Tensor:
        r"""Maps (…, h, w) at token resolution to (…, H, W) in pixels.

        ``bilinear`` interpolates between the centres of the boxes, also across gaps between them,
        and is flat outside the outermost centres. Pixels beyond the outermost boxes (cropped away)
        are 0. ``nearest`` paints the boxes.
        """
        if maps.shape[-2:] != self.positions.shape:
            raise InputError(
                f"maps have shape {tuple(maps.shape)}: expected (…, {self.shape[0]}, "
                f"{self.shape[1]}), the grid of image tokens"
            )
        if mode not in MODES:
            raise InputError(f"mode is {mode!r}: expected one of {MODES}")
        wide = maps.double() if maps.dtype == torch.float64 else maps.float()
        rows = _weights(self.y_edges, self.image_size[0], mode).to(wide)
        columns = _weights(self.x_edges, self.image_size[1], mode).to(wide)
        found = rows @ wide @ columns.T
        return found.to(maps.dtype) if maps.is_floating_point() else found

    def resized(self, size: tuple[int, int]) -> Grid:
        """The same tokens over the image at another size (H, W)."""
        (height, width), (tall, wide) = self.image_size, size
        x_edges, y_edges = self.x_edges * (wide / width), self.y_edges * (tall / height)
        return replace(self, x_edges=x_edges, y_edges=y_edges, image_size=size)

    @property
    def whole(self) -> bool:
        """Whether equal boxes cover the whole image, and nothing but it: plain resizing of a map
        then is right."""
        plain = uniform_grid(0, self.shape, self.image_size)
        pairs = ((self.x_edges, plain.x_edges), (self.y_edges, plain.y_edges))
        return all(torch.allclose(own, even) for own, even in pairs)


def _weights(edges: Tensor, pixels: int, mode: str) -> Tensor:
    """Interpolation matrix (pixels, cells) of one axis."""
    at = torch.arange(pixels, dtype=torch.float64) + 0.5
    inside = (at[:, None] >= edges[:, 0]) & (at[:, None] < edges[:, 1])
    if mode == "nearest":
        first = inside & (inside.cumsum(1) == 1)
        return first.double()
    centers = edges.mean(1)
    right = torch.searchsorted(centers, at).clamp(1, max(len(centers) - 1, 1))
    out = torch.zeros(pixels, len(centers), dtype=torch.float64)
    if len(centers) == 1:
        out[:, 0] = 1.0
    else:
        gap = centers[right] - centers[right - 1]
        part = ((at - centers[right - 1]) / gap).clamp(0, 1)
        rows = torch.arange(pixels)
        out[rows, right - 1] = 1 - part
        out[rows, right] = part
    covered = (at >= edges.min()) & (at < edges.max())
    return out * covered[:, None]


def _within(edges: Tensor, cuts: Tensor) -> Tensor:
    """(n, cells) float64, 1 where the cell between two cuts lies between a token's two edges."""
    inside = (cuts[:-1] >= edges[:, :1]) & (cuts[1:] <= edges[:, 1:])
    return inside.double()


def uniform_grid(
    start: int, shape: tuple[int, int], image_size: tuple[int, int], image: int = 0
) -> Grid:
    """Grid of consecutive positions from ``start``, row-major, that divides the image evenly."""
    h, w = shape
    x = torch.linspace(0, image_size[1], w + 1, dtype=torch.float64)
    y = torch.linspace(0, image_size[0], h + 1, dtype=torch.float64)
    return Grid(
        torch.arange(start, start + h * w).reshape(h, w),
        torch.stack((x[:-1], x[1:]), dim=1),
        torch.stack((y[:-1], y[1:]), dim=1),
        image_size,
        image,
    )


@dataclass(frozen=True)
class Layout:
    r"""All image tokens of a request.

    Args:
        grids (tuple of Grid): in sequence order.
        prefix_length (int): tokens before the response.
    """

    grids: tuple[Grid, ...]
    prefix_length: int

    def __post_init__(self) -> None:
        if not self.grids:
            raise InputError("the layout has no image tokens: give the request at least one image")

    @cached_property
    def image_end(self) -> int:
        """One past the last image position: the least length of a hooked sequence that holds it."""
        return 1 + max(int(g.positions.max()) for g in self.grids)

    @cached_property
    def shares(self) -> tuple[Tensor, ...]:
        r"""The share of its image that every token shows, (h, w) float64, one per grid.

        The area of the token's box over the image's. A place that several tokens show (tiles over
        an overview, tiles that overlap) counts for each of them divided by their number.
        """
        found: dict[int, Tensor] = {}
        for image in {g.image for g in self.grids}:
            own = {i: g for i, g in enumerate(self.grids) if g.image == image}
            x = torch.cat([g.x_edges.flatten() for g in own.values()]).unique()
            y = torch.cat([g.y_edges.flatten() for g in own.values()]).unique()
            cells = {i: (_within(g.y_edges, y), _within(g.x_edges, x)) for i, g in own.items()}
            tokens = sum(rows.sum(0)[:, None] * columns.sum(0) for rows, columns in cells.values())
            parts = y.diff()[:, None] * x.diff() / torch.as_tensor(tokens).clamp(min=1)
            for i, (rows, columns) in cells.items():
                found[i] = rows @ parts @ columns.T / math.prod(own[i].image_size)
        return tuple(found[i] for i in range(len(self.grids)))

    @property
    def images(self) -> tuple[int, ...]:
        """Numbers of the images that a grid shows; frames of a video may share one, which is then
        the first frame's."""
        return tuple(sorted({g.image for g in self.grids}))

    @property
    def shapes(self) -> tuple[tuple[int, int], ...]:
        """(h, w) of every grid."""
        return tuple(g.shape for g in self.grids)

    def to_pixels(
        self, maps: Tensor | Sequence[Tensor], mode: str = "bilinear"
    ) -> Tensor | tuple[Tensor, ...]:
        r"""Maps at token resolution in the pixels of the images, whatever the family crops, pads
        or cuts into tiles.

        Args:
            maps (Tensor or sequence): (…, h, w), or one per grid: as ``attribute`` of a layer
                method returns them.
            mode (str, optional): as :meth:`Grid.to_pixels`. Default: ``"bilinear"``

        Returns:
            Tensor or tuple: (…, H, W), where grids (tiles, a thumbnail) overlap their maps add up
            and pixels that no token sees are 0; a tuple with one per image when there are several.

        Raises:
            ValueError: maps that are not of the layout's grids.
        """
        given = (maps,) if isinstance(maps, Tensor) else tuple(maps)
        out = tuple(self.over_image(given, image, mode=mode) for image in self.images)
        return out[0] if len(out) == 1 else out

    def over_image(
        self,
        maps: Sequence[Tensor],
        image: int,
        size: tuple[int, int] | None = None,
        mode: str = "bilinear",
    ) -> Tensor:
        r"""Maps (…, h, w), one per grid, over one image as :meth:`to_pixels`.

        ``size`` (H, W) is another size of the image. Default: the image's own
        """
        own = zip(self.grids, self._checked(maps), strict=True)
        shown = [(g if size is None else g.resized(size), m) for g, m in own if g.image == image]
        if not shown:
            raise InputError(f"no grid shows image {image}: expected one of {list(self.images)}")
        total = sum(
            grid.to_pixels(m if m.dtype == torch.float64 else m.float(), mode) for grid, m in shown
        )
        assert isinstance(total, Tensor)
        return total.to(maps[0].dtype) if maps[0].is_floating_point() else total

    def _checked(self, maps: Sequence[Tensor]) -> Sequence[Tensor]:
        if not all(isinstance(m, Tensor) for m in maps):
            kinds = [type(m).__name__ for m in maps]
            raise InputTypeError(f"maps are {kinds}: expected tensors, as attribute returns them")
        found = [tuple(m.shape) for m in maps]
        if [shape[-2:] for shape in found] != list(self.shapes):
            wanted = ", ".join(f"(…, {h}, {w})" for h, w in self.shapes)
            raise InputError(
                f"maps have shapes {found}: expected {wanted}, one for each grid of image tokens, "
                "as attribute returns them"
            )
        return maps


#: the tensors of a grid, by their names in a file
_TENSORS = ("positions", "x_edges", "y_edges")


def layout_record(layout: Layout) -> dict[str, Any]:
    """The part of a layout that goes into a manifest."""
    return {
        "grids": [{"image_size": g.image_size, "image": g.image} for g in layout.grids],
        "prefix_length": layout.prefix_length,
    }


def layout_tensors(layout: Layout) -> dict[str, Tensor]:
    """The part of a layout that goes into a file of tensors."""
    grids = enumerate(layout.grids)
    return {f"grid.{i}.{name}": getattr(grid, name) for i, grid in grids for name in _TENSORS}


def read_layout(manifest: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Layout:
    """The layout of both parts."""
    grids = tuple(
        Grid(
            **{name: tensors[f"grid.{i}.{name}"] for name in _TENSORS},
            image_size=(g["image_size"][0], g["image_size"][1]),
            image=g["image"],
        )
        for i, g in enumerate(manifest["grids"])
    )
    return Layout(grids, manifest["prefix_length"])
