r"""Otsu's threshold, for many maps at once.

Counts and index sums stay integers, so the criterion is exactly flat across an empty gap of the
histogram and the first bin of the gap wins on every device, as it does in scikit-image.
"""

from __future__ import annotations

import torch
from torch import Tensor

from captum_dcam.metrics._checks import checked_maps, result_dtype

#: Bins of the histogram, over the range of each map.
OTSU_BINS = 256
#: Pixels per histogram call: many small maps, or one map of an image.
_PIXELS = 2**16


def otsu_threshold(maps: Tensor) -> Tensor:
    r"""The value that splits each map into two classes with the largest variance between them.

    The histogram has 256 bins from the lowest to the highest value of the map; the threshold is the
    centre of the last bin of the lower class, as in scikit-image's ``threshold_otsu``, from which
    it differs by one bin at most, unless two splits are exactly as good: here the lowest wins.

    A constant map has no split: its threshold is its own value, so nothing lies above it.

    Args:
        maps (Tensor): (..., H, W), floating point, finite, non-negative.

    Returns:
        Tensor: (...), in the units of the map; float32, or float64 for float64 maps.

    Raises:
        TypeError: no tensor, or not of floats.
        ValueError: negative or non-finite values, or another shape.

    Source:
        Section 3.3 ("obtained via Otsu thresholding") and 4.1; N. Otsu, 1979.
    """
    values = checked_maps(maps, "otsu_threshold")
    _, cut = levels_and_cut(values)
    low, high = values.amin((-2, -1)), values.amax((-2, -1))
    return (low + cut * (high - low)).to(result_dtype(maps))


def binarize_otsu(maps: Tensor) -> Tensor:
    r"""The region above Otsu's threshold of each map: the P of Eq. 14.

    A constant map (also an all-zero or a one-pixel map) has an empty region.

    Args:
        maps (Tensor): (..., H, W), floating point, finite, non-negative.

    Returns:
        Tensor: (..., H, W), bool.

    Raises:
        TypeError: no tensor, or not of floats.
        ValueError: negative or non-finite values, or another shape.

    Source:
        Section 3.3 and 4.1.
    """
    return otsu_region(checked_maps(maps, "binarize_otsu"))


def otsu_region(values: Tensor) -> Tensor:
    r""":func:`binarize_otsu` for maps that have been checked already."""
    levels, cut = levels_and_cut(values)
    # Compared in levels, not in units of the map: a range of a few ulps would round the threshold
    # onto one of the two classes.
    return levels > cut[..., None, None]


def levels_and_cut(values: Tensor) -> tuple[Tensor, Tensor]:
    r"""Each map scaled to [0, 1], and its threshold on that scale; a constant map is 0 and 0."""
    low, high = values.amin((-2, -1), keepdim=True), values.amax((-2, -1), keepdim=True)
    spread = high - low
    flat = spread == 0
    levels = (values - low) / spread.masked_fill(flat, 1)
    best = _best_bin(_histogram(levels)).to(values.dtype)
    cut = (best + 0.5) / OTSU_BINS
    return levels, cut.masked_fill(flat[..., 0, 0], 0)


def _histogram(levels: Tensor) -> Tensor:
    r"""Counts (..., 256) int64 of levels (..., H, W) in [0, 1]; the last bin holds 1 as well."""
    leading, pixels = levels.shape[:-2], levels.shape[-2:].numel()
    counts = []
    for part in levels.reshape(leading.numel(), pixels).split(max(1, _PIXELS // pixels)):
        index = (part * OTSU_BINS).long().clamp_(max=OTSU_BINS - 1)
        index += OTSU_BINS * torch.arange(len(part), device=levels.device)[:, None]
        # One bincount for many maps: deterministic on GPUs too, which scatter_add is not.
        counts.append(torch.bincount(index.flatten(), minlength=len(part) * OTSU_BINS))
    return torch.cat(counts).reshape(*leading, OTSU_BINS)


def _best_bin(counts: Tensor) -> Tensor:
    r"""Index (...) of the last bin of the lower class, from counts (..., 256)."""
    index = torch.arange(OTSU_BINS, device=counts.device)
    pixels = counts.sum(-1, keepdim=True)
    total = (counts * index).sum(-1, keepdim=True)
    below = counts.cumsum(-1)[..., :-1]
    below_sum = (counts * index).cumsum(-1)[..., :-1]
    # n1·n2·(m1 - m2)², the m being mean bin indices, equals (s1·N - S·n1)² / (n1·n2).
    floats = torch.float32 if counts.device.type == "mps" else torch.float64
    shift = (below_sum * pixels - total * below).to(floats) / pixels
    weight = below.to(floats) * (pixels - below).to(floats)
    # Both classes hold a pixel at every cut, unless the map is constant: its answer is not used.
    return (shift.square() / weight.clamp(min=1)).argmax(-1)
