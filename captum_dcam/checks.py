r"""What a setting may be: the one place where single values are validated.

Whole numbers are taken as Python takes indices (``operator.index``): numpy's integers and tensors
without dimensions too; ``True`` is none. What comes back is Python's own type, so that it can be
written into a file. Maps are checked by :mod:`captum_dcam.refine.checks`.

>>> whole("steps", 4), real("temperature", 0.5), flag("center", True)
(4, 0.5, True)
>>> whole("steps", True)
Traceback (most recent call last):
captum_dcam.errors.WrongTypeError: steps is True: expected a whole number of at least 1
"""

from __future__ import annotations

import math
import operator
from collections.abc import Collection
from contextlib import suppress
from numbers import Real
from typing import TYPE_CHECKING, Any

from captum_dcam.errors import InputError, WrongTypeError

if TYPE_CHECKING:
    from torch import Generator


def _no_number(value: Any) -> bool:
    """Truth values of any library, and what has dimensions. Told without importing a library: the
    command line comes here before torch is needed."""
    kind = str(getattr(value, "dtype", ""))
    return isinstance(value, bool) or kind.endswith("bool") or bool(getattr(value, "ndim", 0))


def as_whole(value: Any) -> int | None:
    """The Python integer that a value stands for; None if it stands for none."""
    if _no_number(value):
        return None
    with suppress(TypeError, RuntimeError):  # RuntimeError: a tensor on the meta device
        return operator.index(value)
    return None


def as_real(value: Any) -> float | None:
    """The Python float that a value stands for; None if it stands for none."""
    if _no_number(value):
        return None
    with suppress(RuntimeError):
        value = plain(value)
    return float(value) if isinstance(value, Real) else None


def plain(value: Any) -> Any:
    """Numbers of numpy and tensors without dimensions as Python's own; other values as they are."""
    return value.item() if getattr(value, "ndim", None) == 0 else value


def whole(name: str, value: Any, least: int | None = 1, why: str = "") -> int:
    """A whole number of at least ``least``, or any; ``why`` ends the message."""
    found = as_whole(value)
    wanted = "a whole number" if least is None else f"a whole number of at least {least}"
    if found is None:
        raise WrongTypeError(f"{name} is {value!r}: expected {wanted}{why}")
    if least is not None and found < least:
        raise InputError(f"{name} is {found}: expected {wanted}{why}")
    return found


def real(
    name: str, value: Any, low: float = 0.0, high: float = math.inf, *, above: bool = False
) -> float:
    """A finite number in [low, high]; ``above``: the lower end is not included."""
    found = as_real(value)
    wanted = f"a finite number {'above' if above else 'of at least'} {low:g}"
    wanted += f" and at most {high:g}" if high < math.inf else ""
    if found is None:
        raise WrongTypeError(f"{name} is {value!r}: expected {wanted}")
    inside = math.isfinite(found) and low <= found <= high and not (above and found == low)
    if not inside:
        raise InputError(f"{name} is {found}: expected {wanted}")
    return found


def flag(name: str, value: Any) -> bool:
    """True or False, and nothing that merely counts as one of them."""
    numpys = str(getattr(value, "dtype", "")) == "bool" and not getattr(value, "ndim", 0)
    if not (isinstance(value, bool) or numpys):
        raise WrongTypeError(f"{name} is {value!r}: expected True or False")
    return bool(value)


def choice(name: str, value: Any, known: Collection[Any]) -> None:
    """One of the known values."""
    if not any(value is one or (type(value) is type(one) and value == one) for one in known):
        raise InputError(f"{name} is {value!r}: expected one of {tuple(known)}")


def text(name: str, value: str) -> str:
    """A text that a file in UTF-8 can hold: what a command line gives may be any bytes."""
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise InputError(f"{name} is {value[:80]!r}: expected text in UTF-8") from error
    return value


def draws(name: str, value: Any) -> Generator | None:
    """A generator, or None."""
    from torch import Generator

    if value is not None and not isinstance(value, Generator):
        raise WrongTypeError(
            f"{name} is {value!r}, a {type(value).__name__}: expected a torch.Generator, "
            "torch.Generator().manual_seed(0), or None"
        )
    return value
