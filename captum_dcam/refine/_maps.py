r"""Arithmetic that refinements share: working precision, statistics, quantiles, sliding windows.

Two habits keep the results finite. Half precision is worked on in fp32, and sums are taken over
maps divided by their own maximum, so that neither 1e30 nor fp16's 65504 overflows when squared.
Nothing here validates; the public functions do.
"""

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

# Window values held at once: k = 11 windows on one 1024 x 1024 map are 127 million, which blocks
# of rows keep out of memory. On a CPU a block should also fit its cache; a GPU wants it large.
_CPU_BLOCK_VALUES = 2**18
_GPU_BLOCK_VALUES = 2**24

# Weights below this count as zero: exp() of what underflows is ten times as slow as of what does
# not. The filtered map changes by less than its rounding; but values that would be tiny become 0,
# and statistics over what is not 0, DACG's and CBA's, jump with the number of such values.
_LEAST_WEIGHT = 2e-35
_LEAST_EXPONENT = -80.0


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
        percent (Tensor or float): 0 to 100, one for all rows or one per row (...).
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


def pad_axis(maps: Tensor, pad: int, dim: int) -> Tensor:
    r"""Pad one axis by ``pad`` on both sides: mirrored without repeating the edge pixel.

    Replicates the edge where the axis is too short: a mirror needs ``pad`` pixels beside the edge.
    """
    last = maps.shape[dim] - 1
    index = torch.arange(-pad, last + 1 + pad, device=maps.device)
    if last >= pad:
        index = last - (last - index.abs()).abs()
    return maps.index_select(dim, index.clamp(0, last))


def over_sorted_windows(
    maps: Tensor, kernel_size: int, reduce: Callable[[Tensor], Tensor]
) -> Tensor:
    r"""Apply ``reduce`` (..., H, W, k*k) -> (..., H, W) to the sorted values of every window."""
    pad = kernel_size // 2
    padded = pad_axis(pad_axis(maps, pad, -2), pad, -1)
    windows = padded.unfold(-2, kernel_size, 1).unfold(-2, kernel_size, 1)
    per_row = max(1, windows[..., :1, :, :, :].numel())
    block = _CPU_BLOCK_VALUES if maps.device.type == "cpu" else _GPU_BLOCK_VALUES
    blocks = torch.split(windows, max(1, block // per_row), dim=-4)
    return torch.cat([reduce(sort_last(block.flatten(-2))) for block in blocks], dim=-2)


def rank_gaussian_weighted(ordered: Tensor) -> Tensor:
    r"""TAM Eq. 7 on sorted windows (..., k*k): Gaussian in rank, centred on the median.

    The weights are symmetric about the centre rank, so ranks at the same distance are added
    first: half the exponentials. The mean is taken as the median plus a correction, so that a
    window whose other weights vanish returns its median bit for bit: constant windows (where the
    formula has 0 / 0), and calm regions, which stay plateaus instead of plateaus with rounding
    noise, over which a later threshold would scatter.
    """
    centre = ordered.shape[-1] // 2
    largest = ordered[..., -1:]
    scale = torch.where(largest > 0, largest, torch.ones_like(largest))
    unit = ordered / scale
    mean = unit.mean(dim=-1, keepdim=True)
    variance = (unit - mean).square_().mean(dim=-1, keepdim=True)
    # 1 / (2 cv^2); infinite, thus weight 0 beside the median, where nothing varies.
    precision = torch.where(
        variance > 0, mean.square() / (2 * variance), torch.full_like(mean, float("inf"))
    )
    distance = torch.arange(1, centre + 1, device=unit.device, dtype=unit.dtype)
    weights = (precision * -distance.square()).clamp_(min=_LEAST_EXPONENT).exp_()
    weights = torch.nn.functional.threshold(weights, _LEAST_WEIGHT, 0.0)
    pairs = unit[..., :centre].flip(-1) + unit[..., centre + 1 :]
    excess = pairs.sub_(2 * unit[..., centre : centre + 1]).mul_(weights).sum(dim=-1)
    correction = excess / (1 + 2 * weights.sum(dim=-1))
    return ordered[..., centre] + correction * scale.squeeze(-1)


def gaussian_blurred(maps: Tensor, kernel_size: int, sigma: float) -> Tensor:
    r"""Separable spatial Gaussian blur with reflected edges."""
    offset = torch.arange(kernel_size, device=maps.device, dtype=maps.dtype) - kernel_size // 2
    kernel = torch.softmax(-(offset.square()) / (2 * sigma**2), dim=0)
    blurred = maps
    for dim in (-2, -1):
        windows = pad_axis(blurred, kernel_size // 2, dim).unfold(dim, kernel_size, 1)
        blurred = (windows * kernel).sum(dim=-1)
    low, high = torch.aminmax(maps.flatten(-2), dim=-1)
    return blurred.clamp(low[..., None, None], high[..., None, None])
