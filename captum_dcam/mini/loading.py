"""Loading the embedded model: its weights lie inside the package."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import PreTrainedTokenizerFast

from captum_dcam.mini.modeling import MiniForMaskedDiffusion
from captum_dcam.mini.processing import MiniImageProcessor, MiniProcessor

WEIGHTS = Path(__file__).parent / "weights"


def load_mini(
    folder: str | Path | None = None,
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> tuple[MiniForMaskedDiffusion, MiniProcessor]:
    r"""Model (eval mode, parameters frozen) and processor of the embedded model.

    Args:
        folder (path, optional): a folder written by ``save_pretrained``. Default: the packaged one
        device (torch.device, optional): Default: ``"cpu"``
        dtype (torch.dtype, optional): Default: ``torch.float32``

    Raises:
        FileNotFoundError: the folder lacks a file; the message lists what is expected.
    """
    folder = WEIGHTS if folder is None else Path(folder)
    expected = ("config.json", "model.safetensors", "tokenizer.json", "preprocessor_config.json")
    missing = [name for name in expected if not (folder / name).is_file()]
    if missing:
        raise FileNotFoundError(
            f"{folder} is not a folder of the embedded model: {', '.join(missing)} missing "
            f"(expected {', '.join(expected)})"
        )
    model = MiniForMaskedDiffusion.from_pretrained(folder, dtype=dtype, local_files_only=True)
    model = model.to(device).eval().requires_grad_(False)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder, local_files_only=True)
    images = MiniImageProcessor.from_pretrained(folder, local_files_only=True)
    return model, MiniProcessor(images, tokenizer, model.config.grid)
