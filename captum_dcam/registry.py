r"""What is looked up by name: families, methods, refinements, metrics, data sets, suites, tables.

>>> from dataclasses import dataclass
>>> SHAPES: Registry[type] = Registry("shape")
>>> @SHAPES.register("disc")
... @dataclass(frozen=True)
... class Disc:
...     radius: int = 3
>>> SHAPES.get("disc", radius=5)
Disc(radius=5)
>>> SHAPES.get("disc", size=5)
Traceback (most recent call last):
captum_dcam.errors.SettingError: shape 'disc' has no setting 'size'; it has radius
>>> SHAPES["disk"]
Traceback (most recent call last):
captum_dcam.errors.UnknownNameError: unknown shape 'disk'; did you mean 'disc'? Known: disc
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import is_dataclass
from importlib import import_module
from pkgutil import iter_modules
from types import NoneType, UnionType
from typing import Any, Generic, TypeVar, Union, get_args, get_origin, get_type_hints

from captum_dcam.checks import as_real, as_whole
from captum_dcam.errors import (
    DcamError,
    InputTypeError,
    RegistrationError,
    SettingError,
    UnknownNameError,
    folded,
    near,
)

T = TypeVar("T", bound=Callable[..., Any])
E = TypeVar("E", bound=Callable[..., Any])


class Registry(Generic[T]):
    r"""Classes or functions by name, in the order in which they were entered.

    Args:
        kind (str): what they are, for messages: ``"method"``.
        given (int, optional): number of an entry's first arguments that are no settings, because
            its caller gives them, as for metrics. Default: 0
        named (bool, optional): an entered class gets its name as attribute ``name``.
            Default: False
        aliases (mapping, optional): other names → the names that are entered. Where there are
            any, a name is also found however its parts are joined: ``LayerGradCam``. Default: none
        listed (str, optional): the command that lists the names, for messages. Default: none
    """

    def __init__(
        self,
        kind: str,
        given: int = 0,
        named: bool = False,
        aliases: Mapping[str, str] | None = None,
        listed: str = "",
    ) -> None:
        self.kind, self.given, self.named = kind, given, named
        self.aliases, self.listed = dict(aliases or {}), listed
        self._entries: dict[str, T] = {}
        self._checks: dict[str, Callable[..., None] | None] = {}

    def register(self, name: str, check: Callable[..., None] | None = None) -> Callable[[E], E]:
        r"""Decorator that enters a class or function.

        The same definition again, by a notebook cell or an autoreload, replaces the earlier one.

        Args:
            name (str): lower case, words joined by underscores.
            check (callable, optional): receives all settings by name when :meth:`record` makes
                a record, before any work, and raises for those out of range. Default: none

        Raises:
            RegistrationError: the name belongs to something else.
        """

        def enter(entry: E) -> E:
            owner: Any = self._entries.get(name, entry)
            mine: Any = entry
            if (owner.__module__, owner.__qualname__) != (mine.__module__, mine.__qualname__):
                raise RegistrationError(
                    f"{self.kind} {name!r} belongs to {owner.__module__}.{owner.__qualname__} "
                    f"already, so {mine.__qualname__} was not entered: choose another name"
                )
            if self.named:
                mine.name = name
            self._entries[name], self._checks[name] = mine, check
            return entry

        return enter

    def remove(self, name: str) -> None:
        """Remove an entry that a test or a notebook has made for itself."""
        del self._entries[name], self._checks[name]

    def names(self) -> tuple[str, ...]:
        """All names, sorted."""
        return tuple(sorted(self))

    def settings(self, name: str) -> dict[str, inspect.Parameter]:
        """The settings of an entry by name, without its caller's arguments."""
        parameters = list(inspect.signature(self[name]).parameters.values())[self.given :]
        return {p.name: p for p in parameters}

    def check(self, name: str, settings: Mapping[str, Any]) -> None:
        r"""Refuse settings that an entry does not have.

        Raises:
            UnknownNameError: no such name, with near ones.
            SettingError: a setting it does not have, with those it has.
        """
        known = self.settings(name)
        unknown = sorted(settings.keys() - known.keys())
        if unknown and all(p.kind is not p.VAR_KEYWORD for p in known.values()):
            raise SettingError(
                f"{self.kind} {name!r} has no setting {', '.join(map(repr, unknown))}; it has "
                f"{', '.join(known) or 'none'}"
            )

    def get(self, name: str, **settings: Any) -> Any:
        """What the entry makes of ``settings``; raises as :meth:`check`, and SettingError for a
        value of another type than declared."""
        self.check(name, settings)
        self._check_types(name, settings)
        return self[name](**settings)

    def _check_types(self, name: str, settings: Mapping[str, Any]) -> None:
        """SettingError for a text, number or truth value of another type than declared."""
        entry = self[name]
        plain = isinstance(entry, type) and not is_dataclass(entry)
        try:
            hints = get_type_hints(entry.__init__ if plain else entry)  # of a dataclass its fields
        except NameError:  # of an entry that names what is imported for types alone
            return
        for setting, value in settings.items():
            hint = hints.get(setting, Any)
            if not _fits(value, hint):
                raise SettingError(
                    f"{self.kind} {name!r}: {setting} is {repr(value)[:80]}, a "
                    f"{type(value).__name__}: expected {_said(hint)}"
                )

    def record(self, value: str | Mapping[str, Any]) -> dict[str, Any]:
        r"""A name, or ``{"name": …, **settings}``, as a record of the name and all settings.

        Raises:
            UnknownNameError, SettingError: as :meth:`check`, or a setting without a default is
                missing.
            ValueError, TypeError: what the entry's own check raises.
        """
        if not isinstance(value, str | Mapping):
            raise InputTypeError(
                f"{self.kind} {value!r} is a {type(value).__name__}: expected a name, or a record "
                '{"name": …}'
            )
        settings = {"name": value} if isinstance(value, str) else dict(value)
        name = self.own(settings.pop("name", ""))
        self.check(name, settings)
        known = [p for p in self.settings(name).values() if p.kind is not p.VAR_KEYWORD]
        own = {p.name: p.default for p in known} | settings
        if missing := [key for key, value in own.items() if value is inspect.Parameter.empty]:
            raise SettingError(f"{self.kind} {name!r} needs {', '.join(map(repr, missing))}")
        self._check_types(name, settings)
        if check := self._checks[name]:
            try:
                check(**own)
            except DcamError:
                raise
            except (TypeError, ValueError, AttributeError) as error:
                raise SettingError(
                    f"{self.kind} {name!r} cannot work with {str(settings)[:200]}: {error}"
                ) from error
        return {"name": name, **own}

    def own(self, name: str) -> str:
        """The name under which something is entered, of it or of an alias; UnknownNameError with
        near names otherwise."""
        if (found := self._found(name)) is None:
            hint = near(str(name), self, self.listed)
            raise UnknownNameError(f"unknown {self.kind} {name!r}{hint}")
        return found

    def _found(self, name: object) -> str | None:
        if not isinstance(name, str) or name in self._entries or not self.aliases:
            return name if isinstance(name, str) and name in self._entries else None
        key = folded(name)
        named = self.aliases.get(key)
        return named or next((one for one in self._entries if folded(one) == key), None)

    def __getitem__(self, name: str) -> T:
        """The entry itself; UnknownNameError with near names otherwise."""
        return self._entries[self.own(name)]

    def __contains__(self, name: object) -> bool:
        return self._found(name) is not None

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)

    def items(self) -> Iterator[tuple[str, T]]:
        """Names with their entries, in the order of entering."""
        return iter(self._entries.items())


#: types whose values are plain: whether one fits is told by its type alone
_PLAIN = (str, int, float, bool, NoneType)


def _parts(hint: Any) -> tuple[Any, ...]:
    """The types of a union; of another type that type."""
    return get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)


def _items(hint: Any) -> Any:
    """What a sequence holds; None for what is none."""
    origin, inner = get_origin(hint), get_args(hint)
    fixed = origin is tuple and inner[1:] != (...,)
    return inner[0] if origin in (list, tuple, Sequence) and inner and not fixed else None


def _fits(value: Any, hint: Any) -> bool:
    """Whether a value is of a type, as far as that is a plain one or a sequence of these."""
    return any(_fits_one(value, one) for one in _parts(hint))


def _fits_one(value: Any, hint: Any) -> bool:
    if hint in _PLAIN:
        return _is_plain(value, hint)
    inner = _items(hint)
    if inner is None:
        return True  # of a type that its own code knows
    several = hasattr(value, "__len__") and not isinstance(value, str | bytes | Mapping)
    return several and all(_fits(one, inner) for one in value)


def _is_plain(value: Any, kind: type) -> bool:
    """A whole number of any library is an int, and a float too; True is no number."""
    if kind is int:
        return as_whole(value) is not None
    return as_real(value) is not None if kind is float else isinstance(value, kind)


def _said(hint: Any) -> str:
    """A type in words."""
    names = []
    for one in _parts(hint):
        inner = _items(one)
        name = "None" if one is NoneType else getattr(one, "__name__", str(one))
        names.append(name if inner is None else f"a list of {_said(inner)}")
    return " or ".join(names)


def import_modules(package: str, path: Iterable[str]) -> None:
    """Import every module of a package's folder, so that each enters what it defines.

    A new entry needs nothing but a file in the folder. Called at the end of the
    package: ``import_modules(__name__, __path__)``.
    """
    for module in iter_modules(path):
        import_module(f"{package}.{module.name}")
