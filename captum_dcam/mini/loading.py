"""Loading the embedded model: its weights lie inside the package."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import PreTrainedTokenizerFast

from captum_dcam.errors import MissingFileError, WeightsError
from captum_dcam.mini.configuration import MiniConfig
from captum_dcam.mini.modeling import MiniForMaskedDiffusion
from captum_dcam.mini.processing import MiniImageProcessor, MiniProcessor

WEIGHTS = Path(__file__).parent / "weights"


def load_mini(
    folder: str | Path | None = None,
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    device_map: Any = None,
) -> tuple[MiniForMaskedDiffusion, MiniProcessor]:
    r"""Model (eval mode, parameters frozen) and processor of the embedded model.

    Args:
        folder (path, optional): a folder written by ``save_pretrained``. Default: the packaged one
        device (torch.device, optional): Default: ``"cpu"``
        dtype (torch.dtype, optional): Default: ``torch.float32``
        device_map (optional): in place of ``device``, as ``from_pretrained`` has it.

    Raises:
        FileNotFoundError: the folder lacks a file; the message lists what is expected.
        WeightsError: the folder's files are damaged or belong to another model.
    """
    folder = WEIGHTS if folder is None else Path(folder)
    expected = ("config.json", "model.safetensors", "tokenizer.json", "preprocessor_config.json")
    missing = [name for name in expected if not (folder / name).is_file()]
    if missing:
        raise MissingFileError(
            f"{folder} is not a folder of the embedded model: {', '.join(missing)} missing "
            f"(expected {', '.join(expected)})"
        )
    model = _read_model(folder, dtype, device_map).eval().requires_grad_(False)
    if device_map is None:
        model = model.to(device)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder, local_files_only=True)
    images = MiniImageProcessor.from_pretrained(folder, local_files_only=True)
    return model, MiniProcessor(images, tokenizer, model.config.grid)


def _read_model(folder: Path, dtype: torch.dtype, device_map: Any) -> MiniForMaskedDiffusion:
    """The model of a folder, every weight of which came from its file."""
    try:
        kind = json.loads((folder / "config.json").read_text(encoding="utf-8"))["model_type"]
    except (ValueError, KeyError, TypeError) as error:
        raise WeightsError(
            f"{folder / 'config.json'} is damaged or not a model's configuration ({error})"
        ) from error
    if kind != MiniConfig.model_type:
        raise WeightsError(
            f"{folder} holds a model of type {kind!r}: expected {MiniConfig.model_type!r}; load it "
            "with its own family"
        )
    path = folder / "model.safetensors"
    try:
        model, info = MiniForMaskedDiffusion.from_pretrained(
            folder,
            dtype=dtype,
            device_map=device_map,
            local_files_only=True,
            output_loading_info=True,
        )
    except (SafetensorError, RuntimeError) as error:
        raise WeightsError(
            f"{path} is damaged or does not fit config.json beside it: {error}"
        ) from error
    strange = sorted(map(str, (*info["missing_keys"], *info["unexpected_keys"])))
    if strange:
        raise WeightsError(
            f"{path} does not fit the model: {len(strange)} tensors missing or too many, such as "
            f"{', '.join(strange[:3])}"
        )
    return model
