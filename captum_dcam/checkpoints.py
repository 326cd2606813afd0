"""Whose a checkpoint is: its ``config.json``, and the family that claims it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from captum_dcam.adapter import Adapter
from captum_dcam.errors import UnknownNameError, WeightsError


def read_config(source: str, revision: str | None = None) -> dict[str, Any] | None:
    r"""``config.json`` of a folder or of a name on the hub.

    Returns:
        dict: or None where ``source`` is neither a folder with that file nor like ``owner/name``.

    Raises:
        WeightsError: the file is damaged, or the hub did not give it.
    """
    folder = Path(source)
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            return None
        path: str | Path = folder / "config.json"
    elif source.count("/") == 1 and not folder.exists():
        path = _from_hub(source, revision)
    else:
        return None
    try:
        config = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise WeightsError(f"{path} is damaged: {error}") from error
    if not isinstance(config, dict):
        raise WeightsError(
            f"{path} is damaged: it holds a {type(config).__name__}, expected an object"
        )
    return config


def _from_hub(source: str, revision: str | None) -> str:
    from transformers.utils import cached_file

    try:
        found = cached_file(source, "config.json", revision=revision)
    except (OSError, ValueError) as error:  # ValueError: a name that the hub cannot have
        raise WeightsError(
            f"{source} is no folder here, and the hub gave no config.json of it: {error}"
        ) from error
    return str(found)


def family_of(
    source: str, config: Mapping[str, Any], known: Mapping[str, type[Adapter]]
) -> str | None:
    r"""The family that claims a configuration: by its ``architectures``, else by ``model_type``.

    A family that declares architectures is not asked about configurations that name others.

    Raises:
        UnknownNameError: several families claim it.
    """
    kinds = set(config.get("architectures") or ())
    kind = config.get("model_type")
    named = [n for n, c in known.items() if kinds & set(c.architectures)]
    typed = [
        n for n, c in known.items() if kind in c.model_types and not (kinds and c.architectures)
    ]
    claimed = [n for n in named or typed if known[n].claims(dict(config))]
    if len(claimed) > 1:
        raise UnknownNameError(
            f"{source} holds a {' or '.join(sorted(kinds)) or 'model'} of type {kind!r}, which "
            f"several families know: say which with family=…: {', '.join(claimed)}"
        )
    return claimed[0] if claimed else None
