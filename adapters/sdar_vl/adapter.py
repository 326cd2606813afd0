r"""SDAR-VL: block diffusion behind a causal prefix, images in tiles of any resolution.

Upstream: ``JetAstra/SDAR-VL``, a script, and checkpoints that bring their code: the language model
SDAR behind a LLaVA-OneVision-type tower. Blocks are counted from the sequence's start, so the
prompt's tail is decoded inside the first. The decoding loop is the script's.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from captum_dcam.adapters.common.block import BlockAdapter, BlockLog, length_of, stored
from captum_dcam.adapters.common.block_loop import LOOP, SEQUENTIAL, written
from captum_dcam.adapters.common.holes import check_over
from captum_dcam.adapters.common.onevision import OneVision
from captum_dcam.adapters.common.remote import remote
from captum_dcam.adapters.common.settings import Settings
from captum_dcam.adapters.sdar_vl.facts import CHECKPOINT, SDARVLFamily
from captum_dcam.errors import InputError
from captum_dcam.model.adapter import Request, register
from captum_dcam.model.trajectory import Given


class SDARVLPictures(OneVision):
    """LLaVA-OneVision's images."""

    model_types: ClassVar[tuple[str, ...]] = ("sdar_vl",)
    mask: ClassVar[str | None] = "<|MASK|>"


@register
class SDARVLAdapter(SDARVLFamily, BlockAdapter):
    r"""Adapter of SDAR-VL.

    Args:
        model (nn.Module): as ``AutoModelForImageTextToText`` loads it.
        processor (object): the checkpoint's, or its
            :class:`~captum_dcam.adapters.common.loading.Parts`.
        cache (str, optional): ``prefix`` is the only one. Default: ``"prefix"``
        block_length (int, optional): L, positions of a block. Default: 8, as in the authors' script

    Its settings: ``gen_length`` (or ``max_new_tokens``; 128), ``denoising_steps`` (or ``steps``) of
    a block (one per token), ``temperature`` (0, greedy), ``top_k`` (all), ``top_p`` (1.0),
    ``remasking_strategy`` (``low_confidence_dynamic``, which commits all above
    ``confidence_threshold``, 0.9; ``low_confidence_static``; ``sequential``).

    Raises:
        TypeError, ValueError: a model of another family, a processor that does not fit it.
    """

    model_types: ClassVar[tuple[str, ...]] = SDARVLPictures.model_types
    loader = staticmethod(remote("sdar_vl", CHECKPOINT))
    pictures = SDARVLPictures
    settings = Settings("SDAR-VL", LOOP)

    def __init__(
        self,
        model: nn.Module,
        processor: Any,
        cache: str | None = None,
        *,
        block_length: int = 8,
    ) -> None:
        self._length = length_of(block_length)
        super().__init__(model, processor, cache)

    @classmethod
    def owns(cls, model: nn.Module) -> bool:
        """Whether it is SDAR behind a tower whose rows end in a newline."""
        text = getattr(getattr(model, "config", None), "text_config", None)
        rows = any(name.endswith("image_newline") for name, _ in model.named_parameters())
        return rows and getattr(text, "model_type", None) == "sdar"

    def _found(self, model: nn.Module) -> Sequence[Any]:
        """Wherever they are: versions of LLaVA-OneVision's classes nest them differently."""
        named = dict(model.named_modules())
        words = ("layers", "embed_tokens", "norm")
        decoder = next(m for m in named.values() if all(hasattr(m, n) for n in words))
        head = next(m for name, m in named.items() if name.split(".")[-1] == "lm_head")
        return decoder, head, None

    @property
    def block_length(self) -> int:
        return self._length

    @property
    def mask_id(self) -> int:
        return int(self._tokenizer.convert_tokens_to_ids(self.pictures.mask))

    def masked(self, seen: Tensor, dtype: torch.dtype) -> Tensor:
        return seen[None].float()

    def inputs(self, pixels: Tensor, extras: Sequence[Tensor]) -> dict[str, Any]:
        own = self._family.inputs(pixels, extras[0], self._named(extras))
        return {"input_ids": extras[0], **own}

    def check_given(self, given: Given, made: Mapping[str, Any]) -> None:
        steps = made["denoising_steps"] or self.block_length
        check_over(given, steps, self.block_length, "denoising_steps", "SDAR-VL")

    def decode(self, request: Request, made: dict[str, Any], log: BlockLog) -> Tensor:
        """The script's loop; raises where a step could write over the prompt's tail."""
        steps, blocks = made["denoising_steps"] or self.block_length, log.blocks
        over = steps < blocks.length and made["remasking_strategy"] != SEQUENTIAL
        if over and blocks.tail:
            raise InputError(
                f"denoising_steps is {steps} for blocks of {blocks.length} tokens, and the "
                f"prompt's last {blocks.tail} stand in the first: a step may write over them; "
                f"give denoising_steps={blocks.length}, or remasking_strategy={SEQUENTIAL!r}"
            )
        memory = self.prefill(self.embed(request.pixels, *request.extras))
        cache, tail = stored(memory), memory.embeds[:, blocks.stored :]

        def run(number: int, ids: Tensor, store: bool) -> Tensor:
            words = self.decoder.embed_tokens(ids)
            words = words if number else torch.cat((tail.to(words.dtype), words), 1)
            start = blocks.stored + number * blocks.length
            return self.head(self.run(words, blocks, cache, start, store=store))

        made = {**made, "denoising_steps": steps}
        log.canvas = log.canvas.to(memory.embeds.device)
        ends = super(BlockAdapter, self).stop_ids  # not every special token
        return written(log, run, made, ends)
