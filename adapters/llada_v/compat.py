r"""Repairs that LLaDA-V's code needs under newer transformers."""

from __future__ import annotations

import importlib
from typing import Any

from captum_dcam.adapters.common.compat import (
    moved_names,
    parents_constructor,
    siglip_token,
    tied_by_map,
    transformers_major,
)
from captum_dcam.errors import MissingPackageError

INSTALL = (
    "git clone https://github.com/ML-GSAI/LLaDA-V && pip install requests einops, and put its "
    "folder LLaDA-V/train on PYTHONPATH (the package is called llava)"
)


def package() -> Any:
    r"""Upstream's module ``llava.model.language_model.llava_llada``, repaired.

    Raises:
        ImportError: no such package, or that of another LLaVA-type project (they share the name).
    """
    moved_names()
    try:
        module = importlib.import_module("llava.model.language_model.llava_llada")
    except ImportError as error:
        raise MissingPackageError(
            f"LLaDA-V's own code is needed and cannot be imported ({error}): {INSTALL}"
        ) from error
    if not hasattr(module, "LlavaLLaDAModelLM"):
        raise MissingPackageError(
            f"the package llava in {module.__file__} has no LlavaLLaDAModelLM: another project's "
            f"is in front; {INSTALL}"
        )
    if transformers_major() >= 5:
        parents_constructor(module.LlavaLLaDAConfig, module.LLaDAConfig)
        tied_by_map(module.LLaDAModelLM, module.LlavaLLaDAModelLM)
        siglip_token()
    return module


def plain_rope(config: Any) -> None:
    r"""``rope_scaling`` None where the checkpoint has none.

    transformers 5 turns None into ``{"rope_type": "default", …}``, in which upstream looks for
    ``type`` and ``factor``.
    """
    scaling = getattr(config, "rope_scaling", None)
    if isinstance(scaling, dict) and "factor" not in scaling:
        theta = scaling.get("rope_theta", getattr(config, "rope_theta", None))
        config.rope_scaling = None
        if theta is not None:
            config.rope_theta = theta
