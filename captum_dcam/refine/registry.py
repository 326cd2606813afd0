r"""Refinements by name: a plain dict, filled by a one-line decorator."""

from collections.abc import Callable
from dataclasses import fields
from difflib import get_close_matches
from typing import Any, TypeVar

from captum_dcam.errors import InputError, SettingError
from captum_dcam.refine.base import NamedRefinement

_Class = TypeVar("_Class", bound=type[NamedRefinement])

_REGISTRY: dict[str, type[NamedRefinement]] = {}


def register_refinement(name: str) -> Callable[[_Class], _Class]:
    r"""Class decorator that enters a refinement under ``name``.

    Put it above ``@dataclass(frozen=True)`` on a subclass of ``NamedRefinement``.

    Args:
        name (str): the name to look it up by; lower case with underscores.

    Raises:
        ValueError: the name belongs to another class.
    """

    def enter(cls: _Class) -> _Class:
        owner = _REGISTRY.get(name, cls)
        # The same class defined again, by a notebook cell or an autoreload, takes its own place.
        if (owner.__module__, owner.__qualname__) != (cls.__module__, cls.__qualname__):
            raise InputError(
                f"register_refinement: the name {name!r} already belongs to "
                f"{owner.__module__}.{owner.__qualname__}, so {cls.__name__} was not entered: "
                "choose another name."
            )
        cls.name = name
        _REGISTRY[name] = cls
        return cls

    return enter


def registered_refinements() -> tuple[str, ...]:
    r"""The names that :func:`refinement` knows, sorted."""
    return tuple(sorted(_REGISTRY))


def refinement(name: str, **settings: Any) -> NamedRefinement:
    r"""Build the refinement of that name.

    Args:
        name (str): one of :func:`registered_refinements`.
        **settings: fields of the class; left out, they keep their defaults.

    Returns:
        NamedRefinement: a new object; ``refinement(**other.describe())`` equals ``other``.

    Raises:
        ValueError: no such name; the message has the nearest ones.
        SettingError: a setting the class does not have.

    Examples::

        >>> refinement("rank_gaussian", kernel_size=5)
        RankGaussian(kernel_size=5)
    """
    if name not in _REGISTRY:
        near = get_close_matches(str(name).lower(), _REGISTRY, n=3)
        hint = f"did you mean {' or '.join(map(repr, near))}? " if near else ""
        raise InputError(
            f"refinement: no refinement is called {name!r}; {hint}Known: "
            f"{', '.join(registered_refinements())}. To add one, decorate its class with "
            f"@register_refinement({name!r})."
        )
    cls = _REGISTRY[name]
    own = [field.name for field in fields(cls)]  # type: ignore[arg-type]  # dataclasses all
    unknown = sorted(settings.keys() - set(own))
    if unknown:
        raise SettingError(
            f"refinement: {name!r} has no setting {', '.join(map(repr, unknown))}; it has "
            f"{', '.join(own) or 'none'}."
        )
    return cls(**settings)
