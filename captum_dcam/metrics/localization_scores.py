r"""Does the map lie on the object? Obj-IoU, contrast, concentration and F3 (Eq. 14-17); pointing.

The four read a map up to its scale: each map is divided by its maximum first. So ε means the same
for every map, huge maps stay finite, and a map that was normalised to [0, 1] by its maximum (as the
paper's are) is read as it stands.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from scipy import ndimage
from torch import Tensor

from captum_dcam.errors import InputError
from captum_dcam.metrics._checks import (
    checked_maps,
    checked_masks,
    result_dtype,
    unit_peak,
    working_dtype,
)
from captum_dcam.metrics.otsu import otsu_region

#: The contrast that counts as perfect in the F3-Score (Eq. 17).
CONTRAST_CAP = 20.0
_EPS = 1e-8


@dataclass(frozen=True, eq=False)
class LocalizationScores:
    r"""The four scores of every map, each of the maps' leading shape (...).

    Attributes:
        obj_iou (Tensor): Eq. 14, in [0, 1].
        contrast (Tensor): Eq. 15, a ratio ≥ 0: 1 is a map that cannot tell object from background.
        concentration (Tensor): Eq. 16, in [0, 1].
        f3 (Tensor): Eq. 17, in [0, 1], map by map.
    """

    obj_iou: Tensor
    contrast: Tensor
    concentration: Tensor
    f3: Tensor


def obj_iou(maps: Tensor, masks: Tensor) -> Tensor:
    r"""Intersection over union of the Otsu region P and the mask, the best of the given classes.

    .. math:: \text{Obj-IoU} = \max_c |P \cap G_c| / |P \cup G_c|

    Degenerate cases: an empty mask scores 0, and so does a constant map, whose region is empty. (An
    empty class among others never wins, so it can serve as padding.)

    Args:
        maps (Tensor): (..., H, W), floating point, finite, non-negative, at mask resolution.
        masks (Tensor): bool (..., H, W), or (..., C, H, W) for C classes or instances per map.

    Returns:
        Tensor: (...), in [0, 1]; float32, or float64 for float64 maps.

    Raises:
        TypeError: maps that are not of floats.
        ValueError: maps that are negative or non-finite; masks that are not boolean or do not fit.

    Source:
        Eq. 14.
    """
    values = checked_maps(maps, "obj_iou")
    return _iou(values, checked_masks(values, masks)).to(result_dtype(maps))


def foreground_background_contrast(maps: Tensor, masks: Tensor, eps: float = _EPS) -> Tensor:
    r"""Mean of the map on the object over its mean on the background.

    .. math:: R_c = E[M_{fg}] / (E[M_{bg}] + \epsilon)

    Degenerate cases: an empty mask or an all-zero map scores 0. A background that is exactly zero
    scores E[M_fg]/ε: large, but finite, so average ``min(R_c, 20)`` or take the median over a data
    set. A mask that covers the whole image leaves nothing to contrast with: 1, as a uniform map.

    Args:
        maps (Tensor): (..., H, W), floating point, finite, non-negative, at mask resolution.
        masks (Tensor): bool (..., H, W), or (..., C, H, W): the union of the C masks counts.
        eps (float): ε, relative to the maximum of each map. Default: 1e-8.

    Returns:
        Tensor: (...), ≥ 0; float32, or float64 for float64 maps.

    Raises:
        ValueError: as in :func:`obj_iou`, or ``eps`` not in [1e-30, 1].

    Source:
        Eq. 15.
    """
    values, epsilon = checked_maps(maps, "foreground_background_contrast"), _checked_eps(eps)
    union = checked_masks(values, masks).any(-3)
    return _contrast(unit_peak(values), union, epsilon).to(result_dtype(maps))


def concentration(maps: Tensor, masks: Tensor, eps: float = _EPS) -> Tensor:
    r"""The share of the map's mass that lies on the object.

    .. math:: C_t = \sum_{(i,j) \in G} M(i,j) / (\sum_{(i,j)} M(i,j) + \epsilon)

    Degenerate cases: an empty mask or an all-zero map scores 0; under a mask that covers the whole
    image every other map scores 1 (up to ε). The floor is the mask's share of the image, which
    a uniform map reaches.

    Args:
        maps (Tensor): (..., H, W), floating point, finite, non-negative, at mask resolution.
        masks (Tensor): bool (..., H, W), or (..., C, H, W): the union of the C masks counts.
        eps (float): ε, relative to the maximum of each map. Default: 1e-8.

    Returns:
        Tensor: (...), in [0, 1]; float32, or float64 for float64 maps.

    Raises:
        ValueError: as in :func:`foreground_background_contrast`.

    Source:
        Eq. 16.
    """
    values, epsilon = checked_maps(maps, "concentration"), _checked_eps(eps)
    union = checked_masks(values, masks).any(-3)
    return _concentration(unit_peak(values), union, epsilon).to(result_dtype(maps))


def f3_score(
    obj_iou: Tensor | float, contrast: Tensor | float, concentration: Tensor | float
) -> Tensor:
    r"""Harmonic mean of Obj-IoU, min(R_c/20, 1) and concentration; 0 if any of them is 0.

    The harmonic mean of averages is not the average of harmonic means. The paper's Tables 1 and 2
    print the former: the F3 of the three means of a row. Its Tables 6 to 9 do not.

    Args:
        obj_iou (Tensor or float): in [0, 1], a fraction, not per cent.
        contrast (Tensor or float): R_c itself, ≥ 0, not divided by 20.
        concentration (Tensor or float): in [0, 1], a fraction.

    Returns:
        Tensor: in [0, 1], of the three arguments' broadcast shape; float32 if one of them is a
        tensor narrower than float64, else float64.

    Raises:
        ValueError: a value that is not finite or outside its range.

    Source:
        Eq. 17.
    """
    given = [x for x in (obj_iou, contrast, concentration) if isinstance(x, Tensor)]
    device = given[0].device if given else torch.device("cpu")
    wide = device.type != "mps" and all(x.dtype == torch.float64 for x in given)
    parts = (
        _checked_score("obj_iou", obj_iou, device, 1.0),
        _checked_score("contrast", contrast, device, None),
        _checked_score("concentration", concentration, device, 1.0),
    )
    return _f3(*parts).to(torch.float64 if wide else torch.float32)


def localization(maps: Tensor, masks: Tensor, eps: float = _EPS) -> LocalizationScores:
    r"""All four scores of every map, each defined as in its own function.

    With a class axis Obj-IoU takes the best class, as Eq. 14 says; contrast and concentration,
    whose equations know one region only, take the union of the classes.

    Args:
        maps (Tensor): (..., H, W), floating point, finite, non-negative, at mask resolution: resize
            the maps before, never the masks.
        masks (Tensor): bool (..., H, W), or (..., C, H, W) for C classes or instances per map.
        eps (float): ε, relative to the maximum of each map. Default: 1e-8.

    Returns:
        LocalizationScores: ``obj_iou``, ``contrast``, ``concentration``, ``f3``, each (...).

    Raises:
        ValueError: as in the single functions.

    Source:
        Eq. 14-17.
    """
    values, epsilon = checked_maps(maps, "localization"), _checked_eps(eps)
    classes = checked_masks(values, masks)
    scaled, union = unit_peak(values), classes.any(-3)
    iou = _iou(values, classes)
    contrast = _contrast(scaled, union, epsilon)
    share = _concentration(scaled, union, epsilon)
    scores = (iou, contrast, share, _f3(iou, contrast, share))
    return LocalizationScores(*(score.to(result_dtype(maps)) for score in scores))


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


def _iou(values: Tensor, classes: Tensor) -> Tensor:
    region = otsu_region(values).unsqueeze(-3)
    both = (region & classes).sum((-2, -1))
    either = (region | classes).sum((-2, -1))
    return (both.to(values.dtype) / either.clamp(min=1)).amax(-1)


def _contrast(scaled: Tensor, mask: Tensor, eps: float) -> Tensor:
    background = ~mask
    bare = background.sum((-2, -1)) == 0
    inside, outside = _mean_on(scaled, mask), _mean_on(scaled, background)
    ratio = inside / (outside + eps)
    return torch.where(bare & (inside > 0), torch.ones_like(ratio), ratio)


def _mean_on(scaled: Tensor, mask: Tensor) -> Tensor:
    r"""Mean of each map on its mask; 0 on an empty mask."""
    return (scaled * mask).sum((-2, -1)) / mask.sum((-2, -1)).clamp(min=1)


def _concentration(scaled: Tensor, mask: Tensor, eps: float) -> Tensor:
    share = (scaled * mask).sum((-2, -1)) / (scaled.sum((-2, -1)) + eps)
    return share.clamp(max=1)  # the two sums may round differently


def _f3(iou: Tensor, contrast: Tensor, share: Tensor) -> Tensor:
    iou, capped, share = torch.broadcast_tensors(iou, (contrast / CONTRAST_CAP).clamp(max=1), share)
    zero = (iou == 0) | (capped == 0) | (share == 0)
    reciprocals = (part.masked_fill(zero, 1).reciprocal() for part in (iou, capped, share))
    return (3 / sum(reciprocals, start=torch.zeros_like(iou))).masked_fill(zero, 0)


def _checked_eps(eps: float) -> float:
    if not 1e-30 <= eps <= 1:
        raise InputError(f"eps is {eps}: expected a number from 1e-30 to 1, by default {_EPS}")
    return float(eps)


def _checked_score(
    name: str, value: Tensor | float, device: torch.device, highest: float | None
) -> Tensor:
    score = torch.as_tensor(value, dtype=working_dtype(device), device=device).detach()
    bound = float("inf") if highest is None else highest + 1e-6
    good = torch.isfinite(score) & (score >= 0) & (score <= bound)
    if not bool(good.all()):
        worst = float(score[~good].flatten()[0])
        span = "a ratio ≥ 0" if highest is None else "a fraction: divide per cent by 100"
        raise InputError(f"{name} of shape {tuple(score.shape)} holds {worst}: expected {span}")
    return score


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
