r"""Adapters from other packages, found by entry point.

A package that brings a family says so in its ``pyproject.toml``::

    [project.entry-points."captum_dcam.adapters"]
    my_family = "my_package.adapter"

The name is the family's; importing the module registers its class. Nothing is imported before a
family is asked for or looked for.
"""

from __future__ import annotations

import warnings
from importlib.metadata import EntryPoint, entry_points

GROUP = "captum_dcam.adapters"

#: entry points that were loaded already, or could not be: (name, value) → the error, if any
_seen: dict[tuple[str, str], Exception | None] = {}


def plugins() -> dict[str, EntryPoint]:
    """Entry points of the group by name; nothing is imported."""
    return {point.name: point for point in entry_points(group=GROUP)}


def load_plugin(point: EntryPoint) -> Exception | None:
    """Import what an entry point names, once; the error where that fails, after a warning."""
    key = (point.name, point.value)
    if key not in _seen:
        _seen[key] = None
        try:
            point.load()
        except Exception as error:  # noqa: BLE001  another package's import may raise anything
            _seen[key] = error
            package = point.dist.name if point.dist is not None else "an unknown package"
            warnings.warn(
                f"the adapter {point.name!r} of {package} ({point.value}) cannot be imported and "
                f"is left out: {type(error).__name__}: {error}",
                stacklevel=3,
            )
    return _seen[key]


def load_plugins() -> None:
    """Import all of them; a broken one is a warning that names it."""
    for point in plugins().values():
        load_plugin(point)
