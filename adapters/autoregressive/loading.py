"""Loading of a checkpoint: which of the architectures a model is, and who prepares its images."""

from __future__ import annotations

from typing import Any

from torch import nn

from captum_dcam.adapters.autoregressive import internvl_chat
from captum_dcam.adapters.autoregressive.facts import CHECKPOINT
from captum_dcam.adapters.autoregressive.gemma import Gemma4
from captum_dcam.adapters.autoregressive.internvl import InternVL
from captum_dcam.adapters.autoregressive.llava import Llava
from captum_dcam.adapters.autoregressive.llava_onevision import LlavaOnevision
from captum_dcam.adapters.autoregressive.qwen import Qwen2, Qwen3, Qwen25, Qwen35
from captum_dcam.adapters.common.loading import image_text_model, named
from captum_dcam.adapters.common.visuals import Family
from captum_dcam.model.hub import read_config

#: ``model_type`` → what prepares its images
FAMILIES: dict[str, type[Family]] = {
    kind: cls
    for cls in (Qwen2, Qwen25, Qwen3, Qwen35, Llava, LlavaOnevision, InternVL, Gemma4)
    for kind in cls.model_types
}


def loaded(source: str | None, **options: Any) -> tuple[nn.Module, Any]:
    r"""Model and processor of a checkpoint.

    Args:
        source (str): folder or hub name.
        **options: those of :func:`~captum_dcam.adapters.common.loading.image_text_model`.

    Raises:
        WeightsError: files are missing, damaged, or of another kind of model.
    """
    source = named("autoregressive", source, CHECKPOINT)
    config = read_config(source, options.get("revision"))
    if config is not None and config.get("model_type") == internvl_chat.MODEL_TYPE:
        return internvl_chat.loaded(source, **options)
    return image_text_model(source, FAMILIES, **options)
