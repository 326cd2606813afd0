r"""Nemotron-Labs-Diffusion-VLM: Ministral turned into block diffusion on a causal context.

The checkpoint brings its code, which could not be read here. What this adapter knows is in the
model card (``nvidia/Nemotron-Labs-Diffusion-VLM-8B``) and in code that others have published to run
and to train it: a Pixtral tower, four patches to an image token, a row's tokens behind each other
and a break between rows; layers whose attention is causal or sees everything, by an attribute.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate
from transformers import DynamicCache

from captum_dcam.adapters.common.block import BlockLog, length_of
from captum_dcam.adapters.common.causal_block import CausalBlockAdapter
from captum_dcam.adapters.common.compat import swapped
from captum_dcam.adapters.common.fitting import misfit
from captum_dcam.adapters.common.loading import Parts
from captum_dcam.adapters.common.settings import (
    TEMPERATURE,
    Setting,
    Settings,
    count,
    length,
    share,
)
from captum_dcam.adapters.common.visuals import Family, Seen, Visual, region
from captum_dcam.adapters.nemotron_diffusion_vlm.facts import NemotronDiffusionVLMFamily
from captum_dcam.adapters.nemotron_diffusion_vlm.loading import (
    CLASSES,
    MODEL_TYPE,
    loaded,
    repaired,
)
from captum_dcam.errors import InputError
from captum_dcam.model.adapter import Request, register

#: pixels of an image's longer side at most
LONGEST = 1400
#: of the images, as CLIP has them
MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


class NemotronPictures(Family):
    """Rows of image tokens, a break behind each but the last; the prompt is the template's."""

    model_types: ClassVar[tuple[str, ...]] = (MODEL_TYPE,)
    any_size: ClassVar[bool] = True
    extra_names: ClassVar[tuple[str, ...]] = ("image_sizes",)
    image_token: ClassVar[str] = "<|image_pad|>"
    sign: ClassVar[str] = "<|image_start|>"
    placeholders: ClassVar[tuple[str, str]] = ("<|image_start|>", "")

    @property
    def image_id(self) -> int:
        found = self.tokenizer.convert_tokens_to_ids(self.image_token)
        if found in (None, self.tokenizer.unk_token_id):
            raise misfit(f"the tokenizer has no {self.image_token}", "the model replaces such")
        return int(found)

    @property
    def needed(self) -> dict[str, int]:
        return {"mask": int(self.config.mask_token_id)}

    def check(self) -> None:
        if getattr(self.tokenizer, "chat_template", None) is None:
            raise misfit("the tokenizer has no chat template", "the model's is published with it")

    def spare(self) -> dict[str, tuple[int, ...]]:
        return {"image_sizes": (0, 2)}

    def see(self, visual: Visual) -> Seen:
        side = self.config.vision_config.patch_size * self.config.spatial_merge_size
        most = LONGEST // side
        scale = max(1.0, max(visual.size) / (most * side))
        high, wide = (-(-int(n / scale) // side) for n in visual.size)
        image = torch.from_numpy(np.asarray(visual.frames[0], dtype=np.float32))
        size = (high * side, wide * side)
        # cv2's cubic, which does not smooth where it makes an image smaller
        pixels = interpolate(image.permute(2, 0, 1)[None], size, mode="bicubic") / 255
        pixels = (pixels - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1)
        rows, columns = (torch.arange(n) // side for n in size)
        owners = (rows[:, None] * wide + columns).expand(pixels.shape)
        text = "<|image_break|>".join([self.image_token * wide] * high)
        where = (region(visual, (high, wide)),)
        extras = {"image_sizes": torch.tensor([size])}
        return Seen(pixels, owners, where, f"<|image_start|>{text}<|image_end|>", extras)

    def turn(self, role: str, content: str) -> str:
        raise NotImplementedError  # there is a template

    frame = turn

    def inputs(self, pixels: Tensor, input_ids: Tensor, extras: dict[str, Tensor]) -> dict:
        sizes = extras["image_sizes"].flatten(0, 1)
        return {"pixel_values": pixels.flatten(0, 1), "image_sizes": sizes}


@register
class NemotronDiffusionVLMAdapter(NemotronDiffusionVLMFamily, CausalBlockAdapter):
    r"""Adapter of ``NemotronLabsDiffusionVLMModel`` in its diffusion mode.

    Args:
        model (nn.Module): as ``AutoModel`` loads it.
        processor (object): the checkpoint's tokenizer.
        cache (str, optional): ``prefix`` is the only one. Default: ``"prefix"``
        block_length (int, optional): L, positions of a block. Default: the configuration's
            ``block_size``, 32

    Its settings: ``gen_length`` (or ``max_new_tokens``; 128), ``steps`` of the whole answer (one
    per token), ``threshold`` (none: a fixed number per step), ``temperature`` (0, greedy).

    Raises:
        TypeError, ValueError: a model of another family, a tokenizer that does not fit it.
    """

    model_types: ClassVar[tuple[str, ...]] = (MODEL_TYPE,)
    classes: ClassVar[tuple[str, ...]] = CLASSES
    any_size: ClassVar[bool] = True
    loader = staticmethod(loaded)
    repaired = staticmethod(repaired)
    parts = ("encoder", "diffusion_head", "")
    prompt_name = "prompt_ids"
    pictures = NemotronPictures
    settings = Settings(
        "Nemotron-Labs-Diffusion-VLM",
        {
            "gen_length": Setting(128, length, also="max_new_tokens"),
            "steps": Setting(None, count),
            "threshold": Setting(None, share),
            **TEMPERATURE,
        },
        refused={
            "causal_context": "the context is causal, as upstream has it by default",
            "shift_logits": "the checkpoint predicts a token at its own position",
        },
    )

    def __init__(
        self,
        model: nn.Module,
        processor: Any,
        cache: str | None = None,
        *,
        block_length: int | None = None,
    ) -> None:
        if not hasattr(processor, "tokenizer"):  # it is the tokenizer: there is nothing else
            processor = Parts(processor, LONGEST)
        own = getattr(getattr(model, "config", None), "block_size", 32)
        self._length = length_of(own if block_length is None else block_length)
        super().__init__(model, processor, cache)

    @property
    def block_length(self) -> int:
        return self._length

    @property
    def mask_id(self) -> int:
        return int(self.model.config.mask_token_id)

    def checked(
        self, given: Mapping[str, Any], generator: torch.Generator | None
    ) -> dict[str, Any]:
        made = super().checked(given, generator)
        blocks = -(-made["gen_length"] // self.block_length)
        if made["steps"] is not None and made["steps"] % blocks:
            raise InputError(
                f"steps is {made['steps']}: expected a multiple of the {blocks} blocks (gen_length "
                f"{made['gen_length']} / block_length {self.block_length}), which share them"
            )
        return made

    def options(self, made: Mapping[str, Any]) -> dict[str, Any]:
        sampled = {"temperature": made["temperature"]} if self.drawn(made) else {}
        return {
            "max_new_tokens": made["gen_length"],
            "steps": made["steps"] or made["gen_length"],
            "block_length": self.block_length,
            "threshold": made["threshold"],
            "shift_logits": False,
            "eos_token_id": self._tokenizer.eos_token_id,
            **sampled,
        }

    def stores(self, ids: Tensor, options: Mapping[str, Any]) -> bool:
        return bool(options.get("use_cache"))

    def masked(self, seen: Tensor, dtype: torch.dtype) -> Tensor:
        lowest = torch.finfo(dtype).min
        return torch.zeros_like(seen, dtype=dtype).masked_fill(~seen, lowest)[:, None]

    @contextmanager
    def _layers(self, causal: bool = False) -> Iterator[None]:
        """Layers in their causal mode, or as they are; as they are now behind the context."""
        with ExitStack() as open_:
            for attention in (layer.self_attn for layer in self.decoder.layers):
                mode = not causal and attention.diffusion_lm
                open_.enter_context(swapped(attention, diffusion_lm=mode))
            yield

    def decode(self, request: Request, made: dict[str, Any], log: BlockLog) -> Tensor:
        with self._layers():  # upstream changes them, and an error would leave them so
            return super().decode(request, made, log)

    def call(
        self, embeds: Tensor, seen: Tensor, places: Tensor, cache: DynamicCache, **options: Any
    ) -> Tensor:
        """In the layers' causal mode, which takes a mask; the other one takes none."""
        own = {"cache_position": places[0], "use_causal_mask": True}
        with self._layers(causal=True):
            return super().call(embeds, seen, places, cache, **own, **options)

    def inputs(self, pixels: Tensor, extras: Sequence[Tensor]) -> dict[str, Any]:
        own = self._family.inputs(pixels, extras[0], self._named(extras))
        return {"input_ids": extras[0], **own}
