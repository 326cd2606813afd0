r"""MinerU-Diffusion: reads documents by block diffusion behind a prompt that is prefilled whole.

Upstream: ``opendatalab/MinerU-Diffusion``, whose code the checkpoint brings: a Qwen2-VL tower in
front of SDAR (Qwen3 turned into block diffusion). The prompt's own blocks are counted back from its
end, so that no tail of it is decoded. A step commits all tokens above a threshold, at least a fixed
number; where masks are fewer than that number it writes over visible tokens.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from captum_dcam.adapters.common.block import BlockAdapter, length_of
from captum_dcam.adapters.common.holes import check_over
from captum_dcam.adapters.common.qwen import Stills
from captum_dcam.adapters.common.settings import (
    Setting,
    Settings,
    count,
    length,
    real,
    share,
)
from captum_dcam.adapters.mineru_diffusion.facts import MinerUDiffusionFamily
from captum_dcam.adapters.mineru_diffusion.loading import CLASSES, MODEL_TYPE, loaded, repaired
from captum_dcam.model.adapter import register
from captum_dcam.model.trajectory import Given

ABOVE = real(
    lambda value: 0 < value < 2**63,
    "a finite number above 0, which upstream divides by; it has no greedy mode",
)
#: what ends an answer in the authors' runner
STOPS = ("<|endoftext|>", "<|im_end|>")


class MinerUPictures(Stills):
    """Qwen2-VL's images, placed by the checkpoint's chat template."""

    model_types: ClassVar[tuple[str, ...]] = (MODEL_TYPE,)

    @property
    def needed(self) -> dict[str, int]:
        return {"mask": int(self.config.mask_token_id)}


@register
class MinerUDiffusionAdapter(MinerUDiffusionFamily, BlockAdapter):
    r"""Adapter of ``MinerUDiffusionForConditionalGeneration``.

    Args:
        model (nn.Module): as ``AutoModel`` loads it.
        processor (object): the checkpoint's, or its
            :class:`~captum_dcam.adapters.common.loading.Parts`.
        cache (str, optional): ``prefix`` is the only one. Default: ``"prefix"``
        block_length (int, optional): L, positions of a block. Default: 32, as the authors' runner

    Its settings: ``gen_length`` (or ``max_new_tokens``; 128), ``denoising_steps`` (or ``steps``) of
    a block (one per token), ``temperature`` (1.0, never 0), ``top_k`` (all), ``top_p`` (1.0),
    ``dynamic_threshold`` (0.85), above which all tokens are committed.

    Raises:
        TypeError, ValueError: a model of another family, a processor that does not fit it.
    """

    model_types: ClassVar[tuple[str, ...]] = (MODEL_TYPE,)
    classes: ClassVar[tuple[str, ...]] = CLASSES
    any_size: ClassVar[bool] = True
    loader = staticmethod(loaded)
    repaired = staticmethod(repaired)
    parts = ("language_model.model", "language_model.lm_head", "language_model")
    loop = "generate_with_embeds"
    whole_prompt = True
    pictures = MinerUPictures
    settings = Settings(
        "MinerU-Diffusion",
        {
            "gen_length": Setting(128, length, also="max_new_tokens"),
            "denoising_steps": Setting(None, count, also="steps"),
            "temperature": Setting(1.0, ABOVE),
            "top_k": Setting(None, count),
            "top_p": Setting(1.0, share),
            "dynamic_threshold": Setting(0.85, share),
        },
        refused={"remasking_strategy": "upstream has low_confidence_dynamic alone"},
        unknown="upstream's generate would ignore it without a word",
    )

    def __init__(
        self,
        model: nn.Module,
        processor: Any,
        cache: str | None = None,
        *,
        block_length: int = 32,
    ) -> None:
        self._length = length_of(block_length)
        super().__init__(model, processor, cache)

    @property
    def block_length(self) -> int:
        return self._length

    @property
    def mask_id(self) -> int:
        return int(self.model.config.mask_token_id)

    def masked(self, seen: Tensor, dtype: torch.dtype) -> Tensor:
        return seen[None, None]

    def options(self, made: Mapping[str, Any]) -> dict[str, Any]:
        return {
            **made,
            "denoising_steps": made["denoising_steps"] or self.block_length,
            "top_k": made["top_k"] or 0,
            "block_length": self.block_length,
            "mask_token_id": self.mask_id,
            "tokenizer": self._tokenizer,
            "stopping_criteria": list(STOPS),
        }

    def check_given(self, given: Given, made: Mapping[str, Any]) -> None:
        steps = made["denoising_steps"] or self.block_length
        check_over(given, steps, self.block_length, "denoising_steps", "MinerU-Diffusion")

    def inputs(self, pixels: Tensor, extras: Sequence[Tensor]) -> dict[str, Any]:
        own = self._family.inputs(pixels, extras[0], self._named(extras))
        return {"input_ids": extras[0], **own}
