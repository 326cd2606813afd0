r"""Loading of a Dream-VL checkpoint, whose code comes with it."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from captum_dcam.adapters.common.loading import given, named, placed, reading
from captum_dcam.adapters.dream_vl.compat import repaired
from captum_dcam.adapters.dream_vl.facts import CHECKPOINT
from captum_dcam.errors import RemoteCodeError, WeightsError
from captum_dcam.model.versions import in_type


def loaded(
    source: str | None,
    *,
    device: torch.device | str | None = None,
    dtype: torch.dtype | str = "auto",
    device_map: Any = None,
    revision: str | None = None,
    trust_remote_code: bool = False,
    attn_implementation: str | None = None,
) -> tuple[nn.Module, Any]:
    r"""Model and processor of a Dream-VL checkpoint, repaired for the transformers at hand.

    Args:
        source (str): folder or hub name.
        device (device, optional): where the model goes. Default: the CPU, or ``device_map``
        dtype (dtype, optional): Default: the checkpoint's
        device_map, revision, attn_implementation: as ``from_pretrained`` has them.
        trust_remote_code (bool, optional): the model's code is in the checkpoint, and runs on this
            machine: it must be allowed. Default: False

    Raises:
        RemoteCodeError: remote code is not allowed.
        WeightsError: files are missing, damaged, or of another family.
    """
    source = named("dream_vl", source, CHECKPOINT)
    if not trust_remote_code:
        raise RemoteCodeError(
            f"{source} brings its own code (DreamVLModel is in no version of transformers): read "
            "it, fix its revision, and pass trust_remote_code=True to let it run; or load the "
            "model yourself and wrap(model, processor)"
        )
    from transformers import AutoConfig, AutoProcessor
    from transformers.dynamic_module_utils import get_class_from_dynamic_module

    hub = given(revision=revision)
    options = given(device_map=device_map, attn_implementation=attn_implementation)
    with reading(source), repaired():
        config = AutoConfig.from_pretrained(source, trust_remote_code=True, **hub)
        place = getattr(config, "auto_map", {}).get("AutoModel")
        if config.model_type not in ("dream-vl", "dream-vla", "dimple") or place is None:
            raise WeightsError(
                f"{source} holds a {config.model_type}: expected dream-vl, dream-vla or dimple, "
                "with its code"
            )
        cls = get_class_from_dynamic_module(place, source, **hub)
        model = cls.from_pretrained(source, config=config, **in_type(dtype), **hub, **options)
        processor = AutoProcessor.from_pretrained(source, trust_remote_code=True, **hub)
    return placed(model, device, device_map), processor
