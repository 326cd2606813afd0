r"""LaViDa-O: the understanding path, an image and a question in, text out.

Upstream: ``adobe-research/LaVida-O`` (package ``llava``, under Adobe's research licence: it is
imported where it is installed, nothing of it is here), checkpoint ``jacklishufan/LaViDa-O-v1.0``.
An image is a base view of 13×13 tokens in a padded square and a mosaic of such tiles. Caches:
``prefix`` (``prefix_lm=True``, as in the authors' demo) and ``none``; in the latter
``use_fast_dlm=True`` decodes with a cache that every block makes anew, so that lengths vary by
step.

Supported: text answers to images. Not supported: making and editing images and grounding by box
tokens (``text_to_image``, ``predict_grounding``), ``draft_tokens``, and ``cfg_scale`` > 0, with
which upstream fails on text.

Of its relatives, Sparse-LaViDa (arXiv 2512.14008) feeds a subset of the masked tokens and register
tokens behind a cache of what is decoded, and LaViDa-R1 (arXiv 2602.14147) is trained further by
reinforcement learning. No code of either is published: Sparse-LaViDa's decoder has no adapter, and
its checkpoints are not claimed by this one; a LaViDa-R1 checkpoint in the format of LaViDa or
LaViDa-O would load as one of them, and its own sampling is not reproduced.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from captum_dcam.adapters.common.anyres import BASES, Tiling
from captum_dcam.adapters.common.llada import LladaAdapter, steps_of
from captum_dcam.adapters.common.packing import SYSTEM, Packing, check_tiles, cutting_of, pools
from captum_dcam.adapters.common.prefix import Prefix
from captum_dcam.adapters.common.recording import seeded
from captum_dcam.adapters.lavida_o.decoding import (
    FastLog,
    fast_arguments,
    fast_logits,
    fast_settings,
)
from captum_dcam.adapters.lavida_o.facts import LavidaOFamily
from captum_dcam.adapters.lavida_o.loading import loaded, repaired
from captum_dcam.errors import InputError, InputTypeError
from captum_dcam.model.adapter import Request, register
from captum_dcam.model.trajectory import Given, Trajectory


@dataclass(frozen=True)
class LavidaOPacking(Packing):
    r"""Images of LaViDa-O: every one becomes a base view and a mosaic.

    Args:
        model, image_processor: as in :class:`~captum_dcam.adapters.common.packing.Packing`.
        base (str): ``pad``, the image in a padded square (the authors set DEBUG_FIX_PADDING), or
            ``stretch``
    """

    base: str

    def __post_init__(self) -> None:
        check_tiles(self.model, self.image_processor)
        if self.base not in BASES:
            raise InputError(f"base is {self.base!r}: expected one of {BASES}")
        if pools(self.model):
            raise InputError(
                "upstream pools images a second time and fails, unless the environment has "
                "NOT_ALWASY_DO_2DPOOL=1 when its package llava is imported: set it and start anew"
            )

    def tiling(self, pictures: int) -> Tiling:
        inner, tower = self.model.model, self.model.get_vision_tower()
        tile, patches, patch = tower.image_size, tower.num_patches_per_side, tower.config.patch_size
        stride = int(getattr(inner.vision_resampler, "stride", 1))
        pinpoints, most = cutting_of(self.model.config, tile)
        base = self.base if pinpoints else "pad"
        side, cell = patches // stride, float(patch * stride)
        return Tiling(tile, side, cell, pinpoints, base, self.fill, most)

    def newline(self, tiling: Tiling) -> bool:
        """A single view is followed by one."""
        return not tiling.pinpoints and "unpad" in getattr(
            self.model.config, "mm_patch_merge_type", "flat"
        )


@register
class LavidaOAdapter(LavidaOFamily, LladaAdapter):
    r"""Adapter of LaViDa-O's ``LlavaLladaForMaskedDiffusion`` (two towers in its configuration).

    Args:
        model (nn.Module): as upstream's ``build_model`` or ``load_pretrained_model`` returns it.
        processor (tuple): ``(tokenizer, image_processor)``.
        cache (str, optional): ``prefix`` or ``none``. Default: ``"prefix"``
        system (str, optional): system prompt; None for the template's own. Default: the authors'
        base (str, optional): base view in a square that is ``pad`` (the authors'
            DEBUG_FIX_PADDING=1) or ``stretch``. Default: ``"pad"``
    """

    model_types: ClassVar[tuple[str, ...]] = ("llava_llada",)
    architectures: ClassVar[tuple[str, ...]] = ("LlavaLladaForMaskedDiffusion",)
    classes: ClassVar[tuple[str, ...]] = architectures
    loader = staticmethod(loaded)
    repaired = staticmethod(repaired)

    def __init__(
        self,
        model: nn.Module,
        processor: Any,
        cache: str | None = None,
        *,
        system: str | None = SYSTEM,
        base: str = "pad",
    ) -> None:
        if not self.owns(model):
            raise InputTypeError(
                f"the model is a {type(model).__name__}: expected LaViDa-O's "
                "LlavaLladaForMaskedDiffusion, with dual_tower in its configuration"
            )
        super().__init__(model, processor, cache, system, partial(LavidaOPacking, base=base))

    @classmethod
    def claims(cls, config: dict[str, Any]) -> bool:
        return "dual_tower" in config

    @classmethod
    def owns(cls, model: nn.Module) -> bool:
        return super().owns(model) and hasattr(model.config, "dual_tower")

    def generate(
        self,
        request: Request,
        *,
        generator: torch.Generator | None = None,
        given: Given | None = None,
        **settings: Any,
    ) -> Trajectory:
        r"""Decode with the family's own ``generate`` and record it.

        Args:
            request (Request): from :meth:`prepare`.
            generator (torch.Generator, optional): for sampled decoding.
            given (Given, optional): tokens that stand in the canvas from the start.
            gen_length, block_length, steps, step_ratio, temperature, schedule, shift, remasking: as
                LaViDa-LLaDA's.
            use_fast_dlm (bool, optional): decode with a cache per block (``cache="none"`` only).
                Default: False
            factor (float, optional), threshold (float, optional): its bar of confidence. Default:
                upstream's factor 1; ``threshold`` or ``factor=None`` switch it off

        Raises:
            TypeError, ValueError: settings that cannot work.
        """
        rest = dict(settings)
        fast = fast_settings(rest, self.cache)
        if fast is None:
            return super().generate(request, generator=generator, given=given, **rest)
        if given is not None:
            raise InputError(
                "use_fast_dlm takes no draft of an answer, says its own code: leave it out to fill "
                "the holes of an answer"
            )
        language = self._language
        made = language.checked(rest, False, generator)
        prefix = request.layout.prefix_length
        if made["block_length"] >= request.layout.image_end:
            raise InputError(
                f"block_length {made['block_length']} with an image span that ends at "
                f"{request.layout.image_end}: a block alone would pass for the whole sequence; "
                "give shorter blocks"
            )
        log = FastLog(self.mask_id, prefix=prefix, block=made["block_length"])
        options = language.arguments(made, False, self.mask_id)
        options = fast_arguments(options, fast, steps_of(made))
        views = self._packing.arguments(request.pixels, request.extras[1])
        inner = self.model.model
        with seeded(generator, self.device), language.as_written(), log.watching(inner):
            result, _ = self.model.generate(request.extras[0], **views, **options)
        log.finish(result[:, -made["gen_length"] :].clone())
        states, final = log.all_states()
        return self.recorded(
            request, settings, log, states, final, lengths=log.lengths, read_at=log.runs()
        )

    def denoise(self, memory: Prefix, *state: Tensor) -> Tensor:
        if len(state) == 1:
            return super().denoise(memory, *state)
        with self._language.as_written():
            return fast_logits(self.model, memory.embeds, *state)
