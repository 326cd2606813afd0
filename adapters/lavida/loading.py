r"""Loading LaViDa through its authors' builder, under old transformers and new."""

from __future__ import annotations

import warnings
from typing import Any

import torch

from captum_dcam.adapters.common.loading import (
    built_type,
    folder_of,
    named,
    placed,
    reading,
    typed,
)
from captum_dcam.adapters.lavida.compat import VARIANTS, repaired
from captum_dcam.adapters.lavida.facts import CHECKPOINT
from captum_dcam.errors import RemoteCodeError, WeightsError

#: what the authors' scripts tell the builder of the vision tower, besides its name
VISION = {
    "mm_resampler_type": None,
    "mm_projector_type": "mlp2x_gelu",
    "mm_hidden_size": 1152,
    "use_mm_proj": True,
}


def loaded(
    source: str | None,
    *,
    device: torch.device | str | None = None,
    dtype: torch.dtype | str = torch.bfloat16,
    device_map: Any = None,
    revision: str | None = None,
    trust_remote_code: bool = False,
    vision_tower: str | None = "google/siglip-so400m-patch14-384",
) -> tuple[Any, tuple[Any, Any]]:
    r"""Model and ``(tokenizer, image_processor)`` of a checkpoint.

    Args:
        source (str): folder or hub name.
        device (device, optional): where the model goes. Default: the CPU, or ``device_map``
        dtype (dtype, optional): other than float16 and bfloat16: loaded as bfloat16, which the
            checkpoints are, and converted. Default: bfloat16, as in the authors' scripts
        device_map, revision: as ``from_pretrained`` has them.
        trust_remote_code (bool, optional): LaViDa-Dream's tokenizer is code inside the checkpoint,
            and upstream's builder runs it: refused without. Default: False
        vision_tower (str, optional): folder or hub name of the SigLIP, as the authors' scripts pass
            it; None for the one that the checkpoint's configuration names.

    Raises:
        ImportError: upstream's package is missing.
        WeightsError: files are missing, damaged, or of another model.
        RemoteCodeError: the checkpoint needs remote code.
    """
    source = named("lavida", source, CHECKPOINT)
    wanted, built = built_type(dtype)
    vision = None if vision_tower is None else {"mm_vision_tower": vision_tower, **VISION}
    with repaired() as builder, reading(source, ValueError), warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # upstream's own deprecated arguments
        folder = folder_of(source, revision)
        name = _builder_name(source, folder, trust_remote_code)
        tokenizer, model, image_processor, _ = builder.load_pretrained_model(
            folder,
            None,
            name,
            device_map=_map(device, device_map),
            torch_dtype=built,
            vision_kwargs=vision,
        )
    model = placed(model, "cpu" if device is None else device, device_map)
    return typed(model, wanted), (tokenizer, image_processor)


def _builder_name(source: str, folder: str, trust_remote_code: bool) -> str:
    from transformers import PretrainedConfig

    config, _ = PretrainedConfig.get_config_dict(folder)
    kinds = config.get("architectures") or []
    names = [f"llava_{VARIANTS[k]}" for k in kinds if k in VARIANTS]
    if not names or "dual_tower" in config:
        held = "LaViDa-O" if "dual_tower" in config else " or ".join(kinds) or "no architecture"
        raise WeightsError(
            f"{source} holds {held} (model_type {config.get('model_type')!r}): expected "
            f"{' or '.join(VARIANTS)}; other families with these types are llada_v and lavida_o"
        )
    if names[0] == "llava_dream" and not trust_remote_code:
        raise RemoteCodeError(
            f"{source} has a tokenizer of its own code, which upstream's builder runs: look at it, "
            "then pass trust_remote_code=True; or load it yourself and use captum_dcam.wrap"
        )
    return names[0]


def _map(device: torch.device | str | None, device_map: Any) -> Any:
    """``auto`` keeps the builder from moving the vision tower to a GPU that is not there."""
    if device_map is not None:
        return device_map
    if not torch.cuda.is_available():
        return "auto"
    return {"": "cpu" if device is None else str(device)}
