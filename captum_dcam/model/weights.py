r"""Which weights are these? A hash that tells checkpoints, dtypes and quantisations apart, and the
name and revision that they were loaded by."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

if TYPE_CHECKING:
    from captum_dcam.model.adapter import Adapter


def fingerprint(model: torch.nn.Module, samples: int = 16) -> str:
    r"""A hash of a model's parameters: names, shapes, types, and a few values of each."""
    found = hashlib.sha256()
    for name, parameter in model.named_parameters():
        found.update(f"{name} {tuple(parameter.shape)} {parameter.dtype}".encode())
        if parameter.is_meta or not parameter.numel():
            continue  # offloaded by accelerate: its values are not here
        flat = parameter.detach().flatten()
        at = torch.linspace(0, len(flat) - 1, min(samples, len(flat))).long().to(flat.device)
        found.update(np.ascontiguousarray(flat[at].cpu().double().numpy()).tobytes())
    return found.hexdigest()[:16]


def identity(adapter: Adapter) -> dict[str, str | None]:
    r"""Which model an adapter holds, as every result's settings keep it.

    Returns:
        dict: ``model``, what :func:`captum_dcam.load` was told, or where the authors' code loaded
        it from; ``revision``, the commit on the hub; ``weights``, :func:`fingerprint`. None for
        what is not known.
    """
    config = getattr(adapter.model, "config", None)
    name = adapter.source or getattr(config, "_name_or_path", None) or None
    revision = getattr(config, "_commit_hash", None)
    parts = Path(str(name)).parts
    if "snapshots" in parts[:-1]:  # the hub's cache: models--OWNER--NAME/snapshots/COMMIT
        at = parts.index("snapshots")
        name = parts[at - 1].removeprefix("models--").replace("--", "/")
        revision = parts[at + 1]
    return {
        "model": None if name is None else str(name),
        "revision": None if revision is None else str(revision),
        "weights": fingerprint(adapter.model),
    }
