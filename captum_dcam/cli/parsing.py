r"""Methods as a command line writes them: ``quick``, ``tam``, ``tam:eci=false,filter=5``."""

from __future__ import annotations

import json
import types
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import fields
from typing import Any, Union, get_args, get_origin, get_type_hints

import torch

from captum_dcam.comparing import QUICK
from captum_dcam.errors import InputError, UnknownNameError, UsageError, near
from captum_dcam.methods import METHODS, Method, method, method_names
from captum_dcam.model.adapter import Adapter
from captum_dcam.model.hub import load

#: names that stand for several methods
GROUPS = ("all", "quick")
_TRUE, _FALSE = ("true", "yes", "on", "1"), ("false", "no", "off", "0")


def parse_methods(texts: Sequence[str]) -> tuple[Method, ...]:
    r"""Methods of one or several comma lists, without repeats.

    A name, a colon and settings, ``name:setting=value,setting=value``; what follows a comma and
    has an equals sign is one more setting of the method before. ``quick`` is
    :data:`captum_dcam.comparing.QUICK`, ``all`` is every method.

    Raises:
        UnknownNameError: no such method, with near names.
        ValueError: a setting that the method does not have, or a value of another type.
    """
    found: list[tuple[str, dict[str, str]]] = []
    for part in ",".join(texts).split(","):
        name, colon, setting = part.partition(":")
        if not colon and "=" in part:
            name, setting = "", part
        name = name.strip()
        if name:
            found += _begun(name)
        elif not found or not setting:
            raise InputError(f"--methods {','.join(texts)}: there is no name before {part!r}")
        if setting.strip() or colon:
            _enter(found, setting)
    out: list[Method] = []
    for name, settings in found:
        one = built(name, settings)
        if one not in out:
            out.append(one)
    return tuple(out)


def _begun(name: str) -> list[tuple[str, dict[str, str]]]:
    """The method or methods of a name, without settings so far."""
    if name not in METHODS and name not in GROUPS:
        raise UnknownNameError(f"unknown method {name!r}{near(name, [*METHODS, *GROUPS])}")
    names = {"all": method_names(), "quick": QUICK}.get(name, (name,))
    return [(one, {}) for one in names]


def _enter(found: list[tuple[str, dict[str, str]]], setting: str) -> None:
    name, equals, value = setting.partition("=")
    if not equals or not name.strip():
        raise InputError(
            f"setting {setting!r} of {found[-1][0]}: expected name=value, as in tam:filter=5"
        )
    found[-1][1][name.strip()] = value.strip()


def built(name: str, settings: dict[str, str]) -> Method:
    """A method with settings that are written as text."""
    if name not in METHODS:
        raise UnknownNameError(f"unknown method {name!r}{near(name, METHODS)}")
    cls = METHODS[name]
    known = [f.name for f in fields(cls)]  # type: ignore[arg-type]  # dataclasses all
    hints = get_type_hints(cls)
    values = {}
    for key, text in settings.items():
        if key not in known:
            hint = near(key, known) if known else "; it has none"
            raise InputError(f"method {name!r} has no setting {key!r}{hint}")
        values[key] = value_of(text, hints[key], f"{name}:{key}")
    return method(name, **values)


def value_of(text: str, kind: Any, where: str) -> Any:
    r"""A setting's value by the type of its field; ``none`` for None, ``+`` between items.

    Args:
        text (str): ``"5"``, ``"false"``, ``"0.5+1"``, ``"none"``.
        kind: bool, int, float, str, a tuple of these, or one of these or None.
        where (str): named in the error.
    """
    origin, inner = get_origin(kind), get_args(kind)
    if origin in (Union, types.UnionType):
        if text.lower() == "none" and type(None) in inner:
            return None
        kinds = [k for k in inner if k is not type(None)]
        if len(kinds) == 1:
            return value_of(text, kinds[0], where)
        kind = str if str in kinds else kinds
    if origin is tuple:
        return tuple(value_of(item, inner[0], where) for item in text.split("+"))
    if kind is str:
        return text
    if kind is bool and text.lower() in (*_TRUE, *_FALSE):
        return text.lower() in _TRUE
    if kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            pass
    wanted = {bool: "true or false", int: "a whole number", float: "a number"}.get(kind)
    if wanted is None:
        raise InputError(f"{where} cannot be set on the command line: use the library")
    raise InputError(f"{where} is {text!r}: expected {wanted}")


# The model that a command's options ask for.


DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

#: what has an option of its own
OWN = frozenset(("device", "dtype", "regime"))


def load_model(
    source: str,
    settings: Mapping[str, Any],
    *,
    regime: str | None,
    device: torch.device | None,
    dtype: str,
) -> Adapter:
    r"""Load ``--model``.

    Args:
        source (str): a family's name, a folder, or a name on the hub.
        settings (mapping): of ``--load``: what :func:`captum_dcam.load` and the family take. With
            a ``device_map`` the device is left to it.
        regime, device, dtype: as in :func:`captum_dcam.load`; the dtype by its name.

    Raises:
        UsageError: a setting that the family does not take, or a package that is missing.
        ValueError, OSError, UnknownNameError: as :func:`captum_dcam.load` has them.
    """
    for name in OWN & settings.keys():
        raise UsageError(f"--load {name}={settings[name]}: give it as --{name}")
    given = {"device": device, "dtype": DTYPES[dtype], "regime": regime, **settings}
    if settings.get("device_map") is not None:
        del given["device"]
    try:
        with quiet_transformers():
            return load(source, **given)
    except ImportError as error:
        raise UsageError(str(error)) from error
    except TypeError as error:
        if settings and "unexpected keyword argument" in str(error):
            raise UsageError(f"--load {', '.join(settings)}: {error}") from error
        raise


def setting_pairs(option: str, texts: Sequence[str] | None) -> dict[str, Any]:
    """``name=value`` settings; values as JSON writes them, anything else is a text."""
    out: dict[str, Any] = {}
    for text in texts or ():
        name, equals, value = text.partition("=")
        if not equals or not name:
            raise InputError(f"{option} {text!r}: expected name=value, such as split=val2014")
        try:
            out[name] = json.loads(value)
        except json.JSONDecodeError:
            out[name] = value
    return out


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """No bars of its own beside ours, as before afterwards."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()
