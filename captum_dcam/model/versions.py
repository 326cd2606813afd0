"""What has another name in older or newer versions of torch and transformers."""

from __future__ import annotations

from typing import Any

import torch
from packaging.version import Version


def transformers_major() -> int:
    """The major version of transformers; 5 for the candidates of 5.0 too."""
    import transformers

    return Version(transformers.__version__).major


def in_type(dtype: Any) -> dict[str, Any]:
    """``from_pretrained``'s argument for a type: ``torch_dtype`` until transformers 4.56."""
    import transformers

    old = Version(transformers.__version__) < Version("4.56")
    return {"torch_dtype" if old else "dtype": dtype}


def autocast_type(device: str) -> torch.dtype | None:
    """The type in which autocast computes on a kind of device; None where it is off."""
    try:
        return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
    except (AttributeError, TypeError):  # torch before 2.4 asks for each kind by a function
        if device == "cpu":
            return torch.get_autocast_cpu_dtype() if torch.is_autocast_cpu_enabled() else None
        return torch.get_autocast_gpu_dtype() if torch.is_autocast_enabled() else None
