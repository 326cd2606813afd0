r"""Does the map's highest point, or its energy, fall on the object?"""

from __future__ import annotations

import torch
from scipy import ndimage
from torch import Tensor

from captum_dcam.errors import InputError
from captum_dcam.metrics._checks import checked_maps, checked_masks, result_dtype
from captum_dcam.metrics.localization_scores import concentration


def pointing_game(maps: Tensor, masks: Tensor, tolerance: float = 0.0) -> Tensor:
    r"""1 where the map's maximum lies on the mask, or not farther than ``tolerance`` from it.

    Ties: the share of the tied maxima that hit, which is the expected value of choosing one of them
    at random. So a constant map scores the mask's share of the image (grown by the tolerance),
    which is what chance gives.

    Degenerate cases: an all-zero map points nowhere and scores 0, and so does an empty mask.

    Args:
        maps (Tensor): (..., H, W), floating point, finite, non-negative, at mask resolution.
        masks (Tensor): bool (..., H, W), or (..., C, H, W): the union of the C masks counts.
        tolerance (float, optional): Euclidean distance in pixels, between pixel centres; the
            original uses 15 on images of some 500 pixels. Default: 0

    Returns:
        Tensor: (...), in [0, 1]; its mean over words is the pointing accuracy.

    Raises:
        ValueError: a tolerance below 0; maps and masks as in :func:`obj_iou`.

    Source:
        Zhang et al., Top-down neural attention by excitation backprop, 2018, section 4.2.
    """
    if not 0 <= tolerance < float("inf"):
        raise InputError(f"tolerance is {tolerance}: expected a distance in pixels, at least 0")
    values = checked_maps(maps, "pointing_game")
    union = _grown(checked_masks(values, masks).any(-3), float(tolerance))
    peak = values.amax((-2, -1), keepdim=True)
    tied = (values == peak) & (peak > 0)
    hits = (tied & union).sum((-2, -1)).to(values.dtype)
    return (hits / tied.sum((-2, -1)).clamp(min=1)).to(result_dtype(maps))


def bounding_boxes(masks: Tensor) -> Tensor:
    r"""The smallest upright box around each mask, filled; an empty mask stays empty.

    Args:
        masks (Tensor): bool (..., H, W).

    Returns:
        Tensor: bool (..., H, W).
    """
    if not isinstance(masks, Tensor) or masks.dtype != torch.bool or masks.ndim < 2:
        what = masks.dtype if isinstance(masks, Tensor) else type(masks).__name__
        raise InputError(f"masks are {what}: expected a tensor of torch.bool (..., H, W)")
    rows, columns = masks.any(-1, keepdim=True), masks.any(-2, keepdim=True)
    return _between(rows, -2) & _between(columns, -1)


def energy_pointing_game(maps: Tensor, masks: Tensor) -> Tensor:
    r"""The share of the map's energy that lies in the objects' bounding boxes.

    On masks instead of boxes this is :func:`concentration` (Eq. 16 of Diffusion-CAM), which it
    calls; several classes count by the union of their boxes. Degenerate cases as there: an empty
    mask or an all-zero map scores 0.

    Args:
        maps (Tensor): (..., H, W), floating point, finite, non-negative, at mask resolution.
        masks (Tensor): bool (..., H, W), or (..., C, H, W), each with a box of its own.

    Returns:
        Tensor: (...), in [0, 1].

    Source:
        Wang et al., Score-CAM, 2020, section 4.3.
    """
    return concentration(maps, bounding_boxes(masks))


def _between(line: Tensor, dim: int) -> Tensor:
    """True from the first to the last True along an axis."""
    count = line.long()
    return (count.cumsum(dim) > 0) & (count.flip(dim).cumsum(dim).flip(dim) > 0)


def _grown(mask: Tensor, radius: float) -> Tensor:
    """Pixels (..., H, W) not farther than ``radius`` from the mask."""
    if radius < 1:  # no other pixel is so near
        return mask
    flat = mask.cpu().reshape(mask.shape[:-2].numel(), *mask.shape[-2:])
    grown = torch.zeros_like(flat)
    for out, one in zip(grown, flat, strict=True):
        if bool(one.any()):
            out |= torch.from_numpy(ndimage.distance_transform_edt(~one.numpy()) <= radius)
    return grown.reshape(mask.shape).to(mask.device)
