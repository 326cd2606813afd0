r"""Loading of MMaDA through its authors' package."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from captum_dcam.adapters.common.loading import given, named, placed, reading
from captum_dcam.adapters.mmada.compat import repaired
from captum_dcam.adapters.mmada.facts import CHECKPOINT
from captum_dcam.model.adapter import device_of
from captum_dcam.model.versions import in_type


def loaded(
    source: str | None,
    *,
    vq: str = "showlab/magvitv2",
    device: torch.device | str | None = None,
    dtype: torch.dtype | str = "auto",
    device_map: Any = None,
    revision: str | None = None,
    trust_remote_code: bool = False,
) -> tuple[nn.Module, tuple[Any, Any]]:
    r"""Model, tokenizer and VQ model of a checkpoint, through the upstream package.

    Args:
        source (str): folder or hub name.
        vq (str, optional): folder or hub name of the VQ model; it stays in float32, as upstream has
            it. Default: ``"showlab/magvitv2"``
        device, dtype, device_map, revision: of the language model.
        trust_remote_code (bool, optional): for the tokenizer; the model's code is the upstream
            package's. Default: False

    Raises:
        ImportError: the upstream package is not importable; gives the install lines.
        WeightsError: files are missing or damaged.
    """
    from transformers import AutoTokenizer

    source = named("mmada", source, CHECKPOINT)
    hub, options = given(revision=revision), given(device_map=device_map)
    with repaired() as upstream, reading(source):
        tokenizer = AutoTokenizer.from_pretrained(
            source, trust_remote_code=trust_remote_code, **hub
        )
        model = upstream.MMadaModelLM.from_pretrained(source, **in_type(dtype), **hub, **options)
        vq_model = upstream.MAGVITv2.from_pretrained(vq)
    model = placed(model, device, device_map)
    vq_model = vq_model.to(device_of(model)).eval().requires_grad_(False)
    return model, (tokenizer, vq_model)
