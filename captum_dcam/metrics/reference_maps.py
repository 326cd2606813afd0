r"""Maps that look at no model: two floors and a ceiling for every localisation table."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from captum_dcam import checks
from captum_dcam.errors import InputError
from captum_dcam.metrics._checks import working_dtype


def oracle_map(mask: Tensor, grid: tuple[int, int]) -> Tensor:
    r"""The ground truth as the token grid sees it: how much of each cell the mask covers.

    Scored like any other map, after the same resizing, it shows the best score that a map on this
    grid can reach. Cells need not be whole pixels: a pixel cut by a cell border counts in part.

    Args:
        mask (Tensor): bool, (..., H, W).
        grid (tuple of int): (h, w), rows and columns of tokens; coarser or finer than the mask.

    Returns:
        Tensor: (..., h, w), float32, in [0, 1].

    Raises:
        ValueError: a mask that is not boolean or has no pixels, or a grid that is not two positive
            integers.
    """
    if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
        kind = mask.dtype if isinstance(mask, Tensor) else type(mask).__name__
        raise InputError(f"mask is {kind}: expected a tensor of torch.bool (..., H, W)")
    if mask.ndim < 2 or 0 in mask.shape[-2:]:
        raise InputError(f"mask has shape {tuple(mask.shape)}: expected (..., H, W)")
    h, w = _checked_grid(grid)
    dtype = working_dtype(mask.device)
    rows = _cell_weights(mask.shape[-2], h).to(mask.device, dtype)
    columns = _cell_weights(mask.shape[-1], w).to(mask.device, dtype)
    return (rows @ mask.to(dtype) @ columns.T).clamp(0, 1).float()


def random_map(shape: Sequence[int], generator: torch.Generator) -> Tensor:
    r"""Independent uniform noise: the floor of a method that knows nothing.

    Args:
        shape (sequence of int): (..., h, w).
        generator (torch.Generator): the only source of randomness; the map lies on its device.

    Returns:
        Tensor: of that shape, float32, in [0, 1).

    Raises:
        ValueError: fewer than two sizes, or one below 1.
    """
    sizes = tuple(shape)
    if len(sizes) < 2 or min(sizes) < 1:
        raise InputError(f"shape is {sizes}: expected (..., h, w), all at least 1")
    return torch.rand(sizes, generator=generator, device=generator.device)


def center_blob_map(grid: tuple[int, int], sigma: float = 0.25) -> Tensor:
    r"""A Gaussian in the middle: the floor of a method that knows only where objects tend to lie.

    Args:
        grid (tuple of int): (h, w).
        sigma (float): standard deviation as a share of each side. Default: 0.25.

    Returns:
        Tensor: (h, w), float32, in (0, 1], highest in the middle, the same under flips.

    Raises:
        ValueError: a grid that is not two positive integers, or ``sigma`` not above 0.
    """
    h, w = _checked_grid(grid)
    if not 0 < sigma < float("inf"):
        raise InputError(f"sigma is {sigma}: expected a positive share of the side, such as 0.25")
    vertical, horizontal = _bell(h, sigma), _bell(w, sigma)
    return (vertical[:, None] * horizontal[None, :]).float()


def _bell(size: int, sigma: float) -> Tensor:
    offset = (torch.arange(size, dtype=torch.float64) + 0.5) / size - 0.5
    # The floor keeps far corners of a very narrow blob above zero.
    return torch.exp(-0.5 * (offset / sigma).square()).clamp(min=1e-15)


def _cell_weights(pixels: int, cells: int) -> Tensor:
    """(cells, pixels): the share of each cell that each pixel fills; every row sums to 1."""
    start = torch.arange(cells, dtype=torch.float64)[:, None] * (pixels / cells)
    overlap = pixel_overlap(start, start + pixels / cells, pixels)
    return overlap / overlap.sum(1, keepdim=True)


def pixel_overlap(start: Tensor, end: Tensor, pixels: int) -> Tensor:
    """(cells, pixels): how much of each pixel lies between a cell's start and end (cells, 1)."""
    pixel = torch.arange(pixels, dtype=torch.float64)
    return (torch.minimum(end, pixel + 1) - torch.maximum(start, pixel)).clamp(min=0)


def _checked_grid(grid: tuple[int, int]) -> tuple[int, int]:
    sides = [checks.as_whole(n) or 0 for n in grid]
    if len(sides) != 2 or min(sides) < 1:
        raise InputError(f"grid is {tuple(grid)}: expected (h, w), two integers of at least 1")
    return sides[0], sides[1]
