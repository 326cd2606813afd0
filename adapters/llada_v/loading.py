r"""Loading LLaDA-V through its authors' package, under old transformers and new."""

from __future__ import annotations

import importlib
from typing import Any

import torch

from captum_dcam.adapters.common import compat as _compat
from captum_dcam.errors import MissingPackageError, WeightsError

CHECKPOINT = "GSAI-ML/LLaDA-V"
INSTALL = (
    "git clone https://github.com/ML-GSAI/LLaDA-V && pip install requests einops, and put its "
    "folder LLaDA-V/train on PYTHONPATH (the package is called llava)"
)


def package() -> Any:
    r"""Upstream's module ``llava.model.language_model.llava_llada``, repaired.

    Raises:
        ImportError: no such package, or that of another LLaVA-type project (they share the name).
    """
    _compat.moved_names()
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
    _compat.llada_v_classes(module)
    return module


def loaded(
    source: str | None,
    *,
    device: torch.device | str | None = None,
    dtype: torch.dtype | str = torch.float16,
    device_map: Any = None,
    revision: str | None = None,
    trust_remote_code: bool = False,
) -> tuple[Any, tuple[Any, Any]]:
    r"""Model and ``(tokenizer, image_processor)`` of a checkpoint.

    Args:
        source (str): folder or hub name.
        device (device, optional): where the model goes. Default: the CPU, or ``device_map``
        dtype (dtype, optional): Default: float16, as upstream's builder
        device_map, revision, trust_remote_code: as ``from_pretrained`` has them. Remote code is
            off: the model's code is the installed package's.

    Raises:
        ImportError: upstream's package is missing.
        WeightsError: files are missing, damaged, or of another model.
    """
    if source is None:
        raise WeightsError(
            f"llada_v has no weights of its own: name a checkpoint or a folder, as {CHECKPOINT}"
        )
    from safetensors import SafetensorError
    from transformers import AutoTokenizer

    module = package()
    hub = {"revision": revision} if revision is not None else {}
    options = {"device_map": device_map} if device_map is not None else {}
    try:
        config = module.LlavaLLaDAConfig.from_pretrained(source, **hub)
    except (OSError, ValueError) as error:
        raise WeightsError(f"{source} cannot be loaded: {error}") from error
    _check_kind(source, config)
    _compat.plain_rope(config)
    config.use_cache = False  # the model has no key-value cache and asserts so
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            source, use_fast=False, trust_remote_code=trust_remote_code, **hub
        )
        with _compat.empty_tower():
            model, info = module.LlavaLLaDAModelLM.from_pretrained(
                source,
                config=config,
                attn_implementation="sdpa",
                torch_dtype=dtype,
                output_loading_info=True,
                **hub,
                **options,
            )
    except (OSError, RuntimeError, ValueError, SafetensorError) as error:
        raise WeightsError(f"{source} cannot be loaded: {error}") from error
    missing = sorted(info["missing_keys"])
    if missing:
        raise WeightsError(
            f"{source} lacks {len(missing)} of the model's tensors ({', '.join(missing[:3])}, …): "
            "they would be random; expected a whole LLaDA-V checkpoint, vision tower included"
        )
    _compat.rotary_frequencies(model)
    _compat.position_ids(model)
    if device is not None and device_map is None:
        model = model.to(device)
    return model.eval(), (tokenizer, model.get_vision_tower().image_processor)


def _check_kind(source: str, config: Any) -> None:
    kinds = getattr(config, "architectures", None) or []
    if kinds and "LlavaLLaDAModelLM" not in kinds:
        raise WeightsError(
            f"{source} holds a {' or '.join(kinds)}: expected LlavaLLaDAModelLM; other families "
            "with model_type llava_llada are LaViDa's, family='lavida' or 'lavida_o'"
        )
