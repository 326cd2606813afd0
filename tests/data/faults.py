"""Faults for readers' tests: a JSON table with one value replaced, for every place in it."""

import copy
from collections.abc import Iterator
from typing import Any

ODD = (None, [], {}, "x", -5, 2.5, [[]], True)


def _places(value: Any, path: tuple = ()) -> Iterator[tuple]:
    if path:
        yield path
    if isinstance(value, (dict, list)):
        items = value.items() if isinstance(value, dict) else list(enumerate(value))[:2]
        for key, part in items:
            yield from _places(part, (*path, key))


def replaced(table: Any) -> Iterator[tuple[tuple, Any, Any]]:
    """(place, odd value, table with it), one odd value a place, all of them in turn."""
    for number, path in enumerate(_places(table)):
        for odd in (ODD[number % len(ODD)], ODD[(number + 3) % len(ODD)]):
            changed = copy.deepcopy(table)
            owner = changed
            for key in path[:-1]:
                owner = owner[key]
            owner[path[-1]] = odd
            yield path, odd, changed
