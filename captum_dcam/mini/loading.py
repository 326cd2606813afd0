r"""Processor of the embedded model, in Hugging Face's habits, and the loading of both.

The weights lie inside the package.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import numpy as np
import torch
from PIL import Image
from safetensors import SafetensorError
from transformers import BatchFeature, PreTrainedTokenizerBase, PreTrainedTokenizerFast
from transformers.image_processing_utils import ImageProcessingMixin

from captum_dcam.errors import InputError, MissingFileError, WeightsError
from captum_dcam.mini.causal import MiniForCausalLM
from captum_dcam.mini.modeling import MiniForMaskedDiffusion
from captum_dcam.model.images import as_image
from captum_dcam.model.versions import in_type

WEIGHTS = Path(__file__).parent / "weights"
#: where the packaged weights of a class of models lie
PACKAGED = {MiniForMaskedDiffusion: WEIGHTS, MiniForCausalLM: WEIGHTS.with_name("weights_ar")}
M = TypeVar("M", bound=MiniForMaskedDiffusion)
#: how many times the shorter side the longer one may be
MAX_ASPECT = 100.0


class MiniImageProcessor(ImageProcessingMixin):
    """Resizes an image to a square (aspect distorted, nothing cropped), scales it to [-1, 1]."""

    model_input_names: ClassVar[list[str]] = ["pixel_values"]

    def __init__(self, size: int = 192, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.size = size

    def preprocess(self, images: Sequence[Image.Image], **_: Any) -> BatchFeature:
        """Images to ``pixel_values`` (N, 3, size, size) float32."""
        return BatchFeature({"pixel_values": torch.stack([self._one(i) for i in images])})

    __call__ = preprocess

    def _one(self, image: Image.Image) -> torch.Tensor:
        image = as_image(image)
        w, h = image.size
        if max(w, h) > MAX_ASPECT * min(w, h):
            raise InputError(
                f"image is {w}×{h} px: an aspect ratio above {MAX_ASPECT:.0f} leaves nothing to "
                f"see at {self.size}×{self.size}; crop it first"
            )
        square = image.resize((self.size, self.size), Image.Resampling.BICUBIC)
        return torch.from_numpy(np.asarray(square, dtype=np.float32) / 127.5 - 1).permute(2, 0, 1)


class MiniProcessor:
    """Tokenizer and image processor together: images and prompts to model inputs."""

    def __init__(
        self, image_processor: MiniImageProcessor, tokenizer: PreTrainedTokenizerBase, grid: int
    ) -> None:
        self.image_processor = image_processor
        self.tokenizer = tokenizer
        self.grid = grid

    def __call__(
        self, images: Sequence[Sequence[Image.Image]], text: Sequence[str]
    ) -> BatchFeature:
        r"""Prepare a batch.

        Args:
            images (sequence): the images of every example; the same number for each.
            text (sequence of str): one prompt per example; may be empty.

        Returns:
            BatchFeature: pixel_values (B, images, 3, S, S), input_ids and attention_mask (B, P):
            per image ``grid²`` ``<image>`` tokens, then the prompt, then ``<answer>``; shorter
            prompts are padded on their left.
        """
        counts = {len(own) for own in images}
        if len(images) != len(text) or len(counts) != 1 or 0 in counts:
            raise InputError(
                f"{len(images)} examples with {sorted(counts)} images and {len(text)} prompts: "
                "every example of a batch needs one prompt and the same number (≥ 1) of images"
            )
        pixels = torch.stack([self.image_processor(p)["pixel_values"] for p in images])
        convert = self.tokenizer.convert_tokens_to_ids
        image = [convert("<image>")] * (self.grid**2 * counts.pop())
        prompts = [self.tokenizer(t)["input_ids"] + [convert("<answer>")] for t in text]
        longest = max(map(len, prompts))
        ids, mask = [], []
        for prompt in prompts:
            gap = longest - len(prompt)
            ids.append(image + [self.tokenizer.pad_token_id] * gap + prompt)
            mask.append([1] * len(image) + [0] * gap + [1] * len(prompt))
        inputs = {"input_ids": torch.tensor(ids), "attention_mask": torch.tensor(mask)}
        return BatchFeature({"pixel_values": pixels, **inputs})


def load_mini(
    folder: str | Path | None = None,
    *,
    kind: type[M] = MiniForMaskedDiffusion,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    device_map: Any = None,
) -> tuple[M, MiniProcessor]:
    r"""Model (eval mode, parameters frozen) and processor of the embedded model, or of its twin.

    Args:
        folder (path, optional): a folder written by ``save_pretrained``. Default: the packaged one
        kind (type, optional): ``MiniForMaskedDiffusion``, or its autoregressive twin
            ``MiniForCausalLM``. Default: the former
        device (torch.device, optional): Default: ``"cpu"``
        dtype (torch.dtype, optional): Default: ``torch.float32``
        device_map (optional): in place of ``device``, as ``from_pretrained`` has it.

    Raises:
        FileNotFoundError: the folder lacks a file; the message lists what is expected.
        WeightsError: the folder's files are damaged or belong to another model.
    """
    folder = PACKAGED[kind] if folder is None else Path(folder)
    expected = ("config.json", "model.safetensors", "tokenizer.json", "preprocessor_config.json")
    missing = [name for name in expected if not (folder / name).is_file()]
    if missing:
        raise MissingFileError(
            f"{folder} is not a folder of the embedded model: {', '.join(missing)} missing "
            f"(expected {', '.join(expected)})"
        )
    model = _read_model(folder, kind, dtype, device_map).eval().requires_grad_(False)
    if device_map is None:
        model = model.to(device)
    tokenizer = _read(folder / "tokenizer.json", tokenizer_of)
    images = _read(folder / "preprocessor_config.json", _images_of)
    return model, MiniProcessor(images, tokenizer, model.config.grid)


def tokenizer_of(folder: str | Path) -> PreTrainedTokenizerBase:
    """The tokenizer of a folder, whichever version of transformers wrote it."""
    # version 5 writes a list of extra tokens, in which older ones look for keys
    return PreTrainedTokenizerFast.from_pretrained(
        folder, local_files_only=True, extra_special_tokens={}
    )


def _images_of(folder: Path) -> MiniImageProcessor:
    return MiniImageProcessor.from_pretrained(folder, local_files_only=True)


def _read(path: Path, function: Callable[[Path], Any]) -> Any:
    """What a function of transformers makes of the folder of a file, which errors name."""
    try:
        return function(path.parent)
    except Exception as error:  # tokenizers raises plain Exceptions
        raise WeightsError(
            f"{path} is damaged, or does not fit what lies beside it: {error!r}"
        ) from error


def _read_model(folder: Path, kind: type[M], dtype: torch.dtype, device_map: Any) -> M:
    """The model of a folder, every weight of which came from its file."""
    try:
        found = json.loads((folder / "config.json").read_text(encoding="utf-8"))["model_type"]
    except (ValueError, KeyError, TypeError) as error:
        raise WeightsError(
            f"{folder / 'config.json'} is damaged or not a model's configuration ({error})"
        ) from error
    wanted = kind.config_class.model_type
    if found != wanted:
        raise WeightsError(
            f"{folder} holds a model of type {found!r}: expected {wanted!r}; load it with its own "
            "family"
        )
    path = folder / "model.safetensors"
    try:
        model, info = kind.from_pretrained(
            folder,
            device_map=device_map,
            local_files_only=True,
            output_loading_info=True,
            **in_type(dtype),
        )
    except (SafetensorError, RuntimeError, ValueError, TypeError, ArithmeticError) as error:
        if device_map is not None and isinstance(error, ValueError):
            raise  # about the map, not about the files
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
