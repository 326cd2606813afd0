r"""What the metrics accept: checked once, at the boundary, and turned into one strict form."""

from __future__ import annotations

import torch
from torch import Tensor

from captum_dcam.errors import InputError, InputTypeError


def working_dtype(device: torch.device) -> torch.dtype:
    r"""The dtype of the arithmetic: float64, or float32 on Apple's GPUs, which have no float64."""
    return torch.float32 if device.type == "mps" else torch.float64


def result_dtype(values: Tensor) -> torch.dtype:
    r"""The dtype of a result: float64 for float64 input, float32 for everything narrower."""
    return torch.float64 if values.dtype == torch.float64 else torch.float32


def checked_maps(maps: Tensor) -> Tensor:
    r"""Returns the maps, detached and in the working dtype.

    Args:
        maps (Tensor): (..., H, W), floating point, finite, non-negative; H and W at least 1.

    Returns:
        Tensor: the same values, (..., H, W), in :func:`working_dtype`.

    Raises:
        TypeError: not a tensor.
        ValueError: another dtype, shape or value; the message says what to do.
    """
    if not isinstance(maps, Tensor):
        raise InputTypeError(
            f"maps is a {type(maps).__name__}: expected a torch tensor (..., H, W)"
        )
    shape = tuple(maps.shape)
    if not maps.is_floating_point():
        raise InputError(f"maps of shape {shape} are {maps.dtype}: expected floats: maps.float()")
    if maps.ndim < 2 or 0 in shape[-2:]:
        raise InputError(
            f"maps have shape {shape}: expected (..., H, W) with H and W of at least 1; "
            f"a flat list of tokens becomes a map with maps.reshape(h, w)"
        )
    values = maps.detach().to(working_dtype(maps.device))
    if not bool(torch.isfinite(values).all()):
        count = int((~torch.isfinite(values)).sum())
        raise InputError(
            f"maps of shape {shape} hold {count} values that are NaN or infinite: expected finite "
            f"maps; look for the step that made them (half precision overflows above 65504)"
        )
    if bool((values < 0).any()):
        raise InputError(
            f"maps of shape {shape} hold negative values, the lowest is {float(values.min()):.4g}: "
            f"expected non-negative maps; take maps.relu() (evidence for the target only) or "
            f"maps.abs() of a signed attribution first"
        )
    return values


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
        raise InputError(_resolution_message(maps, masks))
    if masks.shape == maps.shape:
        return masks.to(maps.device).unsqueeze(-3)
    if masks.ndim != maps.ndim + 1 or masks.shape[:-3] != maps.shape[:-2]:
        height, width = maps.shape[-2:]
        before = "".join(f"{n}, " for n in maps.shape[:-2])
        raise InputError(
            f"masks have shape {tuple(masks.shape)} and maps {tuple(maps.shape)}: expected "
            f"({before}{height}, {width}), one mask a map, or ({before}C, {height}, {width}), "
            f"C classes a map; repeat one mask for many maps with masks.expand(maps.shape)"
        )
    if masks.shape[-3] == 0:
        raise InputError(f"masks have shape {tuple(masks.shape)}: expected at least one class")
    return masks.to(maps.device)


def _resolution_message(maps: Tensor, masks: Tensor) -> str:
    r"""The error of maps and masks of different size, with the call that resizes the maps."""
    size = tuple(masks.shape[-2:])
    return (
        f"maps have shape {tuple(maps.shape)} and masks {tuple(masks.shape)}: expected the same "
        f"(H, W); bring the maps to the masks' resolution first, for example "
        f"torch.nn.functional.interpolate(maps.reshape(-1, 1, *maps.shape[-2:]), size={size}, "
        f"mode='bilinear').reshape(*maps.shape[:-2], *{size})"
    )
