r"""Loading of DiffusionGemma, which transformers has."""

from __future__ import annotations

from typing import Any

from torch import nn

from captum_dcam.adapters.common.loading import image_text_model, named
from captum_dcam.adapters.diffusion_gemma.facts import CHECKPOINT

MODEL_TYPE = "diffusion_gemma"


def loaded(source: str | None, **options: Any) -> tuple[nn.Module, Any]:
    r"""Model and processor of a checkpoint.

    Args:
        source (str): folder or hub name.
        **options: those of :func:`~captum_dcam.adapters.common.loading.image_text_model`.

    Raises:
        WeightsError: files are missing, damaged, or of another kind of model.
    """
    return image_text_model(named("diffusion_gemma", source, CHECKPOINT), (MODEL_TYPE,), **options)
