r"""The one place where maps, and a refinement's settings, are validated; metrics call it as well.

Every message carries what was given, what is expected, and the next step.
"""

from collections.abc import Callable, Mapping, Sequence
from math import isfinite
from typing import Any

import torch
from torch import Tensor

from captum_dcam.checks import as_real, as_whole, flag
from captum_dcam.errors import InputError, InputTypeError

FLOAT_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
#: raises for a value that does not fit: (value, the public name to blame, the setting's name)
Check = Callable[[Any, str, str], None]


def check_settings(caller: str, checks: Mapping[str, Check], **settings: Any) -> None:
    r"""Check settings by name, in the order of ``checks``."""
    for name, check in checks.items():
        if name in settings:
            check(settings[name], caller, name)


def check_maps(maps: Tensor, caller: str, *, name: str = "maps", non_negative: bool = True) -> None:
    r"""Refuse what is not a finite float tensor (..., H, W), and negatives where told to.

    An empty *batch* (a leading dimension of 0) is let through: no map in, no map out.

    Args:
        maps (Tensor): what the user gave.
        caller (str): the public name to blame in the message.
        name (str, optional): the argument's name. Default: ``"maps"``
        non_negative (bool, optional): also refuse values below zero. Default: True

    Raises:
        TypeError: not a tensor, or not fp16, bf16, fp32 or fp64.
        ValueError: fewer than two dimensions, H or W of 0, NaN or infinite values, negatives.
    """
    if not isinstance(maps, Tensor):
        raise InputTypeError(
            f"{caller}: `{name}` is a {type(maps).__name__}, expected a torch.Tensor of shape "
            "(..., H, W): convert it first, for example with torch.as_tensor(array)."
        )
    if maps.dtype not in FLOAT_DTYPES:
        raise InputTypeError(
            f"{caller}: `{name}` has dtype {maps.dtype} (shape {tuple(maps.shape)}), expected "
            f"one of {', '.join(map(str, FLOAT_DTYPES))}: convert it, for example {name}.float()."
        )
    if maps.dim() < 2:
        raise InputError(
            f"{caller}: `{name}` has shape {tuple(maps.shape)}, expected (..., H, W) with at "
            f"least two dimensions: give a row of token scores its grid, {name}.view(H, W)."
        )
    if 0 in maps.shape[-2:]:
        raise InputError(
            f"{caller}: `{name}` has shape {tuple(maps.shape)}, so its maps have no pixel; "
            "expected H >= 1 and W >= 1: check the image span the maps were cut from."
        )
    if maps.numel():
        _check_values(maps.detach(), caller, name, non_negative)


def _check_values(maps: Tensor, caller: str, name: str, non_negative: bool) -> None:
    # One pass over the data: aminmax carries NaN through, so two scalars tell everything.
    low, high = (float(bound) for bound in torch.aminmax(maps))
    if not (isfinite(low) and isfinite(high)):
        bad = (~torch.isfinite(maps)).nonzero()
        where = tuple(bad[0].tolist())
        raise InputError(
            f"{caller}: `{name}` (shape {tuple(maps.shape)}, {maps.dtype}) holds {len(bad)} NaN or "
            f"infinite values, the first, {float(maps[where])}, at index {where}; expected finite "
            "values: attribute in bf16 or fp32 if fp16 overflowed, or look at the gradients."
        )
    if non_negative and low < 0:
        raise InputError(
            f"{caller}: `{name}` (shape {tuple(maps.shape)}) has negative values down to {low:g}, "
            "expected non-negative maps, as after the paper's ReLU (Eq. 4): pass "
            f"relu_attributions=True to the method, or {name}.relu(), or min_max({name})."
        )


def check_features(features: Tensor, caller: str, name: str = "features") -> None:
    r"""Refuse what is not a finite float tensor (D, H, W) or (R, D, H, W)."""
    check_maps(features, caller, name=name, non_negative=False)
    if features.dim() not in (3, 4):
        raise InputError(
            f"{caller}: `{name}` has shape {tuple(features.shape)}, expected (D, H, W), or (R, D, "
            "H, W) for R rows of maps: captum_dcam.maps.contexts_of(forward) gives them so."
        )


def check_flag(value: bool, caller: str, name: str) -> None:
    r"""Refuse what is neither True nor False."""
    flag(f"{caller}: `{name}`", value)


def check_odd(value: int, caller: str, name: str = "kernel_size") -> None:
    r"""Refuse a window side that is not an odd integer of at least 1."""
    if as_whole(value) is None:
        raise InputTypeError(
            f"{caller}: `{name}` is {value!r} ({type(value).__name__}), expected an odd int "
            "such as 3: a window needs a centre pixel."
        )
    if value < 1 or value % 2 == 0:
        instead = f"{value - 1} or {value + 1}" if value > 1 else "3"
        raise InputError(
            f"{caller}: `{name}` is {value}, expected an odd integer >= 1, because a window needs "
            f"a centre pixel: use {instead}."
        )


def check_number(
    value: float,
    caller: str,
    name: str,
    *,
    low: float = 0.0,
    high: float = float("inf"),
    open_low: bool = False,
) -> None:
    r"""Refuse what is not a finite number in [low, high] (or ]low, high] with ``open_low``)."""
    interval = f"{'above' if open_low else 'at least'} {low:g}"
    interval += f" and at most {high:g}" if isfinite(high) else ""
    if isinstance(value, Tensor) or as_real(value) is None:
        raise InputTypeError(
            f"{caller}: `{name}` is {value!r} ({type(value).__name__}), expected a number "
            f"{interval}: pass a plain int or float."
        )
    if not isfinite(value) or value < low or value > high or (open_low and value == low):
        raise InputError(
            f"{caller}: `{name}` is {value}, expected a finite number {interval}: "
            "leave it out to get the documented default."
        )


def check_numbers(
    values: Sequence[float], caller: str, name: str, *, length: int, high: float = float("inf")
) -> None:
    r"""Refuse what is not a sequence of ``length`` finite numbers in [0, high]."""
    if isinstance(values, str) or not isinstance(values, Sequence) or len(values) != length:
        raise InputError(
            f"{caller}: `{name}` is {values!r}, expected {length} numbers in the order that the "
            "docstring gives: leave it out to get the documented default."
        )
    for index, value in enumerate(values):
        check_number(value, caller, f"{name}[{index}]", high=high)


def check_count(value: int, caller: str, name: str, meaning: str) -> None:
    r"""Refuse what is not an integer of at least 1; numpy's integers are taken too."""
    if as_whole(value) is None:
        raise InputTypeError(
            f"{caller}: `{name}` is {value!r} ({type(value).__name__}), expected an int >= 1 "
            f"({meaning}): pass a plain int."
        )
    if value < 1:
        raise InputError(f"{caller}: `{name}` is {value}, expected an int >= 1: pass {meaning}.")


def check_image_size(value: tuple[int, int], caller: str) -> None:
    r"""Refuse what is not a pair (height, width) of positive integers."""
    if isinstance(value, str) or not isinstance(value, Sequence) or len(value) != 2:
        raise InputError(
            f"{caller}: `image_size` is {value!r}, expected (height, width) in pixels, for "
            "example (480, 640); PIL's Image.size is (width, height): turn it round."
        )
    for side, name in zip(value, ("height", "width"), strict=True):
        check_count(side, caller, f"image_size {name}", "the image's side in pixels")
