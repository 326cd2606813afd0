r"""Which weights are these? A hash that tells checkpoints, dtypes and quantisations apart."""

from __future__ import annotations

import hashlib

import numpy as np
import torch


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
