r"""Loading LaViDa through its authors' builder, under old transformers and new."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from captum_dcam.adapters.common import compat as _compat
from captum_dcam.adapters.lavida.facts import VARIANTS
from captum_dcam.errors import RemoteCodeError, WeightsError

CHECKPOINT = "jacklishufan/lavida-llada-v1.0-instruct"
#: the only two that the builder knows; at others it stops in a debugger
BUILT = {torch.float16: "float16", torch.bfloat16: "bfloat16"}


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
    if source is None:
        raise WeightsError(
            f"lavida has no weights of its own: name a checkpoint or a folder, such as {CHECKPOINT}"
        )
    from safetensors import SafetensorError

    builder = _compat.lavida_package()
    dtype = getattr(torch, dtype) if isinstance(dtype, str) else dtype
    try:
        folder = _folder(source, revision)
        name = _builder_name(source, folder, trust_remote_code)
        with _quiet(), _compat.lavida_loading(_classes(builder)) as missing:
            tokenizer, model, image_processor, _ = builder.load_pretrained_model(
                folder,
                None,
                name,
                device_map=_map(device, device_map),
                torch_dtype=BUILT.get(dtype, "bfloat16"),
                vision_kwargs=None if vision_tower is None else _sight(vision_tower),
            )
        lost = _compat.lavida_tower(model.get_vision_tower(), missing)
    except (RemoteCodeError, WeightsError):
        raise
    except (OSError, RuntimeError, ValueError, SafetensorError) as error:
        raise WeightsError(f"{source} cannot be loaded: {error}") from error
    if lost:
        raise WeightsError(
            f"{source} lacks {len(lost)} of the model's tensors ({', '.join(sorted(lost)[:3])}, …):"
            " they would be random; expected a whole LaViDa checkpoint"
        )
    _compat.lavida_buffers(model)
    if device_map is None:
        model = model.to("cpu" if device is None else device)
    return model.to(dtype).eval(), (tokenizer, image_processor)


def _classes(builder: Any) -> list[Any]:
    return [getattr(builder, name) for name in VARIANTS]


def _folder(source: str, revision: str | None) -> str:
    """The checkpoint's folder; the builder cannot be told a revision."""
    if revision is None or Path(source).is_dir():
        return source
    from huggingface_hub import snapshot_download

    return snapshot_download(source, revision=revision)


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


def _sight(vision_tower: str) -> dict[str, Any]:
    """What the authors' scripts tell the builder of the vision tower."""
    return {
        "mm_vision_tower": vision_tower,
        "mm_resampler_type": None,
        "mm_projector_type": "mlp2x_gelu",
        "mm_hidden_size": 1152,
        "use_mm_proj": True,
    }


@contextmanager
def _quiet() -> Iterator[None]:
    """Upstream's own deprecated arguments are not the user's concern."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        yield
