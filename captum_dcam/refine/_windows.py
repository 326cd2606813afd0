r"""Sliding windows over batches of maps, and the two kernels that run on them.

Nothing here validates; the public functions in ``filters`` and in the modules do.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from captum_dcam.refine._maps import sort_last

# Window values held at once: k = 11 windows on one 1024 x 1024 map are 127 million, which blocks
# of rows keep out of memory. On a CPU a block should also fit its cache; a GPU wants it large.
_CPU_BLOCK_VALUES = 2**18
_GPU_BLOCK_VALUES = 2**24

# Weights below this count as zero. It changes no digit of the result, and exp() of what
# underflows is ten times as slow as of what does not.
_LEAST_WEIGHT = 2e-35
_LEAST_EXPONENT = -80.0


def _padded_index(size: int, pad: int, device: torch.device) -> Tensor:
    r"""Source index of every padded position: mirrored without repeating the edge pixel.

    Replicates the edge where ``size <= pad``, for a mirror needs ``pad`` pixels beside the edge.
    """
    index = torch.arange(-pad, size + pad, device=device)
    if size > pad:
        index = index.abs()
        return torch.where(index < size, index, 2 * (size - 1) - index)
    return index.clamp(0, size - 1)


def pad_axis(maps: Tensor, pad: int, dim: int) -> Tensor:
    r"""Pad one axis by ``pad`` on both sides: reflect, or replicate where the axis is too short."""
    return maps.index_select(dim, _padded_index(maps.shape[dim], pad, maps.device))


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
