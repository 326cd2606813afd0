r"""Loading of MMaDA through its authors' package."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from captum_dcam.adapters.common.loading import given, named, placed, reading, upstream
from captum_dcam.adapters.mmada.compat import has_rows, package, rows_package
from captum_dcam.adapters.mmada.facts import CHECKPOINT, LUMINA, ROWS_INSTALL
from captum_dcam.model.adapter import device_of
from captum_dcam.model.versions import in_type


def loaded(
    source: str | None,
    *,
    vq: str | None = None,
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
            it. Default: ``"showlab/magvitv2"``; Lumina-DiMOO: the checkpoint, whose folder
            ``vqvae`` it is
        device, dtype, device_map, revision: of the language model.
        trust_remote_code (bool, optional): for the tokenizer; the model's code is the upstream
            package's. Default: False

    Raises:
        ImportError: the upstream package is not importable; gives the install lines.
        WeightsError: files are missing or damaged.
    """
    from transformers import AutoTokenizer, PretrainedConfig

    source = named("mmada", source, CHECKPOINT)
    hub, options = given(revision=revision), given(device_map=device_map)
    with reading(source):
        found = None if has_rows() else package()  # what is missing, before the hub is asked
        config, _ = PretrainedConfig.get_config_dict(source, **hub)
        if rows := LUMINA in (config.get("architectures") or ()):
            found = rows_package()
        elif found is None:
            found = package()
        tokenizer = AutoTokenizer.from_pretrained(
            source, trust_remote_code=trust_remote_code, **hub
        )
        cls = getattr(found, LUMINA if rows else "MMadaModelLM")
        model = cls.from_pretrained(source, **in_type(dtype), **hub, **options)
        if rows:
            (diffusers,) = upstream("Lumina-DiMOO", ROWS_INSTALL, "diffusers")
            vq_model = diffusers.VQModel.from_pretrained(vq or source, subfolder="vqvae")
        else:
            vq_model = found.MAGVITv2.from_pretrained(vq or "showlab/magvitv2")
    model = placed(model, device, device_map)
    vq_model = vq_model.to(device_of(model)).eval().requires_grad_(False)
    return model, (tokenizer, vq_model)
