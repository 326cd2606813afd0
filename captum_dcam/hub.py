"""``load`` a model by name, or ``wrap`` one that is loaded already."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import nn

from captum_dcam.adapter import ADAPTERS, Adapter, find
from captum_dcam.errors import UnknownNameError, WeightsError, near


def families() -> dict[str, type[Adapter]]:
    """All registered families by name."""
    import captum_dcam.adapters  # noqa: F401  registers them

    return dict(sorted(ADAPTERS.items()))


def load(source: str | Path = "mini", family: str | None = None, **options: Any) -> Adapter:
    r"""Load a model and its adapter.

    Args:
        source (str or path, optional): ``"mini"`` for the embedded model, or a folder that holds a
            model of a known family. Default: ``"mini"``
        family (str, optional): family name. Default: found from the folder's ``config.json``
        **options: the family's (``regime``, ``device``, ``dtype``, …).

    Raises:
        UnknownNameError: neither a known name nor a folder of a known family.
        WeightsError: the folder's files are damaged or belong to another model.
    """
    known = families()
    if family is None:
        family = str(source) if str(source) in known else _family_of(Path(source))
    if family is None:
        raise UnknownNameError(
            f"unknown model {str(source)!r}{near(str(source), known)}. Or give a folder that "
            "save_pretrained wrote; another family is added as CONTRIBUTING.md says"
        )
    return find(family).load(None if str(source) in known else str(source), **options)


def wrap(model: nn.Module, processor: Any, family: str | None = None, **options: Any) -> Adapter:
    r"""Adapter of a loaded model.

    Args:
        model (nn.Module): as its authors load it.
        processor (object): the family's processor.
        family (str, optional): Default: the family that recognises the model
        **options: the family's (``regime``, …).
    """
    if family is not None:
        return find(family)(model, processor, **options)
    for cls in families().values():
        if cls.owns(model):
            return cls(model, processor, **options)
    raise UnknownNameError(
        f"no family recognises a {type(model).__name__}; known: {', '.join(families())}. Name one "
        "with family=…, or write an adapter (CONTRIBUTING.md, 'A family')"
    )


def _family_of(folder: Path) -> str | None:
    """The family whose config type a folder's ``config.json`` names."""
    import json

    config = folder / "config.json"
    if not config.is_file():
        return None
    try:
        kind = json.loads(config.read_text(encoding="utf-8")).get("model_type")
    except (ValueError, AttributeError) as error:
        raise WeightsError(f"{config} is damaged: {error}") from error
    return next((name for name, cls in families().items() if kind in cls.model_types), None)
