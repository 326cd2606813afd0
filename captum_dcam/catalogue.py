"""What ``captum-dcam models`` lists: families, checkpoints, which calls and blocks can be used."""

from __future__ import annotations

from typing import Any

from captum_dcam.adapter import Adapter, Checkpoint, Facts
from captum_dcam.hub import families, importable

#: which calls of a generation hold the image, by regime
FEASIBLE = {"prefix": "the prefill (1 of S + 1 calls)", "full": "every step (S of S calls)"}


def list_models() -> list[dict[str, Any]]:
    r"""One record a family, JSON-able; no model is loaded.

    Returns:
        list of dict: ``family``, ``class``, ``regimes``, ``feasible`` (regime → calls),
        ``checkpoints`` (name and depths of each), ``transformers``, ``package``, ``install``,
        ``installed``, ``remote_code``, ``notes``, and the first checkpoint's ``blocks``,
        ``deepest_usable_block`` and ``recommended_block`` (None where none is known).
    """
    return [_record(name, cls) for name, cls in families().items()]


def _record(name: str, cls: type[Adapter]) -> dict[str, Any]:
    facts = Facts() if cls.facts is None else cls.facts
    checkpoints = [_depths(c) for c in facts.checkpoints]
    unknown = {"name": None, **_no_depths()}
    first = checkpoints[0] if checkpoints else unknown
    return {
        "family": name,
        "class": f"{cls.__module__}.{cls.__qualname__}",
        "regimes": list(cls.regimes),
        "feasible": {r: facts.feasible or FEASIBLE[r] for r in cls.regimes},
        "default_checkpoint": first["name"],
        **{key: first[key] for key in _no_depths()},
        "checkpoints": checkpoints,
        "batches": cls.batches,
        "several_images": cls.several_images,
        "video": bool(cls.takes_video),
        "transformers": facts.transformers,
        "package": facts.package,
        "install": facts.install,
        "installed": facts.package is None or importable(facts.package),
        "remote_code": facts.remote_code,
        "notes": list(facts.notes),
    }


def _no_depths() -> dict[str, None]:
    return dict.fromkeys(("blocks", "deepest_usable_block", "recommended_block"))


def _depths(checkpoint: Checkpoint) -> dict[str, Any]:
    return {
        "name": checkpoint.name,
        "blocks": checkpoint.blocks,
        "deepest_usable_block": checkpoint.deepest_block,
        "recommended_block": checkpoint.recommended_block,
    }
