r"""Plain JSON: one way of writing a value, and what differs between two."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from captum_dcam.errors import SettingError, UnknownNameError, near
from captum_dcam.files import canonical, plain

Record = dict[str, Any]
_NAMED = ("variants", "metrics")


def filled(
    kind: str, known: Mapping[str, Callable[..., Any]], value: str | Mapping[str, Any], given: int
) -> Record:
    r"""The record of a registered function: its name and all its settings.

    Args:
        kind (str): what it is, for messages.
        known (dict): name → function.
        value (str or dict): a name, or a record ``{"name": …, **settings}``.
        given (int): how many of the function's first arguments are no settings.

    Raises:
        UnknownNameError: no such name, with near ones.
        SettingError: a setting it does not have, with those it has.
    """
    record = {"name": value} if isinstance(value, str) else dict(value)
    name = str(record.pop("name", ""))
    if name not in known:
        raise UnknownNameError(f"unknown {kind} {name!r}{near(name, known)}")
    settings = list(inspect.signature(known[name]).parameters.values())[given:]
    unknown = sorted(record.keys() - {p.name for p in settings})
    if unknown:
        raise SettingError(
            f"{kind} {name!r} has no setting {', '.join(map(repr, unknown))}; it has "
            f"{', '.join(p.name for p in settings) or 'none'}"
        )
    return plain({"name": name, **{p.name: record.get(p.name, p.default) for p in settings}})


def differences(there: Any, here: Any, path: str) -> Iterator[str]:
    r"""What two JSON values do not have in common: ``"plan.seed is 0 there and 1 here"``.

    Variants and metrics are compared by their names, in whatever order they stand.
    """
    if path.rsplit(".", 1)[-1] in _NAMED and isinstance(there, list) and isinstance(here, list):
        there, here = ({_name(one): one for one in side} for side in (there, here))
    if isinstance(there, Mapping) and isinstance(here, Mapping):
        for key in sorted(there.keys() | here.keys()):
            at = f"{path}.{key}"
            if key not in there:
                yield f"{at} is here only"
            elif key not in here:
                yield f"{at} is there only"
            else:
                yield from differences(there[key], here[key], at)
    elif there != here:
        yield f"{path} is {canonical(there)} there and {canonical(here)} here"


def _name(record: Mapping[str, Any]) -> str:
    return str(record.get("label") or record["name"])
