r"""The model that a command's options ask for."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from captum_dcam.adapter import Adapter
from captum_dcam.cli_options import UsageError
from captum_dcam.hub import load

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
            raise ValueError(f"{option} {text!r}: expected name=value, such as split=val2014")
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
