r"""What the metrics accept: checked once, at the boundary, and turned into one strict form."""

from __future__ import annotations

import torch
from torch import Tensor

from captum_dcam.errors import InputError, InputTypeError
from captum_dcam.refine.checks import check_maps


def working_dtype(device: torch.device) -> torch.dtype:
    """The dtype of the arithmetic: float64, or float32 on Apple's GPUs, which have no float64."""
    return torch.float32 if device.type == "mps" else torch.float64


def result_dtype(values: Tensor) -> torch.dtype:
    """The dtype of a result: float64 for float64 input, float32 for everything narrower."""
    return torch.float64 if values.dtype == torch.float64 else torch.float32


def checked_maps(maps: Tensor, caller: str, name: str = "maps") -> Tensor:
    r"""Returns the maps (..., H, W), detached and in :func:`working_dtype`.

    Raises:
        TypeError, ValueError: as :func:`captum_dcam.refine.checks.check_maps`, which refinements
            call as well: finite, non-negative floats, H and W at least 1.
    """
    check_maps(maps, caller, name=name)
    return maps.detach().to(working_dtype(maps.device))


def unit_peak(values: Tensor) -> Tensor:
    """Maps (..., H, W), each divided by its maximum; an all-zero map stays zero."""
    peak = values.amax((-2, -1), keepdim=True)
    return values / peak.masked_fill(peak == 0, 1)


def stretched(values: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """Values on a scale with ``low`` at 0 and ``high`` at 1; 0 where the two are equal."""
    # halves, so that the span of the largest floats does not overflow
    spread = high / 2 - low / 2
    return (values / 2 - low / 2) / spread.masked_fill(spread == 0, 1)


def checked_masks(maps: Tensor, masks: Tensor) -> Tensor:
    r"""Returns the masks as (..., C, H, W) on the maps' device; C is 1 without a class axis.

    Args:
        maps (Tensor): (..., H, W), already checked.
        masks (Tensor): bool, (..., H, W) or (..., C, H, W) with the leading shape of ``maps``.

    Raises:
        TypeError: not a tensor.
        ValueError: not boolean, or of a shape that does not fit; the message says what to do.
    """
    if not isinstance(masks, Tensor):
        raise InputTypeError(f"masks is a {type(masks).__name__}: use torch.as_tensor(masks)")
    if masks.dtype != torch.bool:
        raise InputError(f"masks are {masks.dtype}: expected torch.bool, for example masks > 0.5")
    if masks.ndim < 2 or masks.shape[-2:] != maps.shape[-2:]:
        size = tuple(masks.shape[-2:])
        raise InputError(
            f"maps have shape {tuple(maps.shape)} and masks {tuple(masks.shape)}: expected the "
            "same (H, W); bring the maps to the masks' resolution first, for example torch.nn."
            f"functional.interpolate(maps.reshape(-1, 1, *maps.shape[-2:]), size={size}, "
            f"mode='bilinear').reshape(*maps.shape[:-2], *{size})"
        )
    if masks.shape == maps.shape:
        return masks.to(maps.device).unsqueeze(-3)
    if masks.ndim != maps.ndim + 1 or masks.shape[:-3] != maps.shape[:-2]:
        height, width = maps.shape[-2:]
        before = "".join(f"{n}, " for n in maps.shape[:-2])
        raise InputError(
            f"masks have shape {tuple(masks.shape)} and maps {tuple(maps.shape)}: expected "
            f"({before}{height}, {width}), one mask per map, or ({before}C, {height}, {width}), "
            f"C classes per map; repeat one mask for many maps with masks.expand(maps.shape)"
        )
    if masks.shape[-3] == 0:
        raise InputError(f"masks have shape {tuple(masks.shape)}: expected at least one class")
    return masks.to(maps.device)
