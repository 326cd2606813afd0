r"""DiffusionVL: Qwen2.5-VL turned into block diffusion behind a causal prefix.

Upstream: ``hustvl/DiffusionVL``; the checkpoints bring their code, and the repository has the same
model as package ``llava``. Blocks of 4 tokens are counted from the sequence's start, so the
prompt's tail is decoded inside the first. An image is Qwen2.5-VL's, one id (-200) in the family's
own ids; positions are those of text.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from captum_dcam.adapters.common.block import BlockAdapter
from captum_dcam.adapters.common.qwen import Stills
from captum_dcam.adapters.common.settings import (
    TEMPERATURE,
    Setting,
    Settings,
    count,
    length,
    one_of,
    share,
)
from captum_dcam.adapters.diffusion_vl.facts import DiffusionVLFamily
from captum_dcam.adapters.diffusion_vl.loading import CLASSES, MODEL_TYPE, loaded, repaired
from captum_dcam.model.adapter import register

#: what stands for an image in the family's own ids
IMAGE = -200
#: the mask token, an embedding that no token of Qwen2.5's has
MASK = 151671
STRATEGIES = ("low_confidence_static", "low_confidence_dynamic")


class DiffusionVLPictures(Stills):
    """Qwen2.5-VL's images; without a chat template the prompt is that of the repository's
    evaluation."""

    model_types: ClassVar[tuple[str, ...]] = (MODEL_TYPE,)
    placeholders: ClassVar[tuple[str, str]] = ("<|image_pad|>\n", "")

    @property
    def image_id(self) -> int:
        """The tokenizer's: the family's own ids have another, its configuration may have none."""
        return int(self.tokenizer.convert_tokens_to_ids(self.image_token))


@register
class DiffusionVLAdapter(DiffusionVLFamily, BlockAdapter):
    r"""Adapter of DiffusionVL on Qwen2.5-VL.

    Args:
        model (nn.Module): as ``AutoModelForCausalLM`` or the repository's builder loads it.
        processor (object): the checkpoint's, or its
            :class:`~captum_dcam.adapters.common.loading.Parts`.
        cache (str, optional): ``prefix`` is the only one. Default: ``"prefix"``

    Its settings: ``gen_length`` (or ``max_new_tokens``; 128), ``steps`` of a block (one per token),
    ``temperature`` (0, greedy), ``top_k`` (all), ``top_p`` (1.0), ``remasking_strategy``
    (``low_confidence_static``, or ``low_confidence_dynamic``, which commits all above
    ``confidence_threshold``, 0.85).

    Raises:
        TypeError, ValueError: a model of another family, a processor that does not fit it.
    """

    model_types: ClassVar[tuple[str, ...]] = (MODEL_TYPE,)
    classes: ClassVar[tuple[str, ...]] = CLASSES
    any_size: ClassVar[bool] = True
    loader = staticmethod(loaded)
    repaired = staticmethod(repaired)
    parts = ("model", "lm_head", "")
    loop = "generate_with_bd3lm"
    pictures = DiffusionVLPictures
    block_advice = "it is the model's own (bd3lm_block_size); leave it out"
    settings = Settings(
        "DiffusionVL",
        {
            "gen_length": Setting(128, length, also="max_new_tokens"),
            "steps": Setting(None, count),
            **TEMPERATURE,
            "top_k": Setting(None, count),
            "top_p": Setting(1.0, share),
            "remasking_strategy": Setting("low_confidence_static", one_of(*STRATEGIES)),
            "confidence_threshold": Setting(0.85, share),
        },
        unknown="upstream's generate would ignore it without a word",
    )

    @property
    def block_length(self) -> int:
        return int(self.decoder.bd3lm_block_size)

    @property
    def mask_id(self) -> int:
        return int(getattr(self.decoder, "mask_token_id", MASK))

    def masked(self, seen: Tensor, dtype: torch.dtype) -> dict[str, Tensor]:
        added = torch.zeros_like(seen, dtype=dtype).masked_fill(~seen, -torch.inf)[None, None]
        return {"full_attention": added, "sliding_attention": added}

    def options(self, made: Any) -> dict[str, Any]:
        return {**made, "steps": made["steps"] or self.block_length, "top_k": made["top_k"] or 0}

    def inputs(self, pixels: Tensor, extras: Sequence[Tensor]) -> dict[str, Any]:
        ids, own = extras[0], self._family.inputs(pixels, extras[0], self._named(extras))
        grid = own["image_grid_thw"]
        merge = self.model.config.vision_config.spatial_merge_size**2
        at = (ids[0] == self._family.image_id).nonzero()[:, 0]
        kept, whole = torch.ones_like(ids[0], dtype=torch.bool), ids[0].clone()
        for part in at.split((grid.prod(-1) // merge).tolist()):
            kept[part[1:]] = False
            whole[part[0]] = IMAGE
        return {
            "inputs": whole[kept][None],
            "images": own["pixel_values"],
            "image_grid_thws": grid,
        }
