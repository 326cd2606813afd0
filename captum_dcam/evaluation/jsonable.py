r"""Plain JSON: one way of writing a value, and what differs between two."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from captum_dcam.files import canonical

Record = dict[str, Any]
_NAMED = ("variants", "metrics")


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
