r"""Arithmetic that every refinement shares: working precision, statistics, quantiles.

Two habits keep the results finite. Half precision is worked on in fp32, and sums are taken over
maps divided by their own maximum, so that neither 1e30 nor fp16's 65504 overflows when squared.
"""

import numpy as np
import torch
from torch import Tensor


def to_working(maps: Tensor) -> Tensor:
    r"""Detach, and give fp16 and bf16 maps fp32's precision; fp32 and fp64 stay as they are."""
    half = maps.dtype in (torch.float16, torch.bfloat16)
    return maps.detach().to(torch.float32 if half else maps.dtype)


def peak(maps: Tensor) -> Tensor:
    r"""The largest magnitude of each map as (..., 1, 1); 1 where a map is all zero."""
    top = maps.abs().amax(dim=(-2, -1), keepdim=True)
    return torch.where(top > 0, top, torch.ones_like(top))


def mean_std(maps: Tensor) -> tuple[Tensor, Tensor]:
    r"""Mean and population standard deviation of each map, as (..., 1, 1).

    Exactly (c, 0) for a map that is c everywhere, because it is divided by its peak first.
    """
    scale = peak(maps)
    unit = maps / scale
    mean = unit.mean(dim=(-2, -1), keepdim=True)
    std = (unit - mean).square().mean(dim=(-2, -1), keepdim=True).sqrt()
    return mean * scale, std * scale


def skewness(maps: Tensor) -> Tensor:
    r"""Population skewness E[((M - mean) / std)^3] as (..., 1, 1); 0 for constant maps."""
    unit = maps / peak(maps)
    mean, std = mean_std(unit)
    standard = (unit - mean) / torch.where(std > 0, std, torch.ones_like(std))
    return standard.pow(3).mean(dim=(-2, -1), keepdim=True)


def sort_last(values: Tensor) -> Tensor:
    r"""Sort along the last dimension, ascending.

    On the CPU numpy does it: torch.sort also computes indices that nobody wants here, and takes
    eight times as long on windows of nine values.
    """
    if values.device.type == "cpu":
        return torch.from_numpy(np.sort(values.numpy(), axis=-1))
    return values.sort(dim=-1).values


def percentile(ordered: Tensor, percent: Tensor | float, skip: Tensor) -> Tensor:
    r"""Linearly interpolated percentile of each row of sorted values, without its first ``skip``.

    Non-negative values have their zeros first once sorted, so ``skip`` = number of zeros gives
    the percentile of the non-zero values without a ragged batch.

    Args:
        ordered (Tensor): ascending values (..., n).
        percent (Tensor or float): 0 to 100, one for all rows or one a row (...).
        skip (Tensor): how many values to leave out at the start of each row, integer (...).

    Returns:
        Tensor: (...), and the last value of a row of which nothing is left (0, if it is all 0).
    """
    last = ordered.shape[-1] - 1
    # Apple's GPUs have no fp64; elsewhere it keeps positions exact on maps of millions of pixels.
    precise = torch.float32 if ordered.device.type == "mps" else torch.float64
    # percent * count / 100, not a fraction times a count: where the position is a whole number it
    # comes out whole, and a pixel that equals the threshold stays on its side of it.
    position = skip + percent * (last - skip).to(precise) / 100
    below = position.floor().clamp(0, last)
    above = position.ceil().clamp(0, last)
    lower, upper = (
        ordered.gather(-1, index.long().unsqueeze(-1)).squeeze(-1) for index in (below, above)
    )
    return lower + (upper - lower) * (position - below).to(ordered.dtype)
