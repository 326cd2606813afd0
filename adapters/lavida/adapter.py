r"""LaViDa-LLaDA and LaViDa-Dream, the family on which the paper was validated.

Upstream: ``jacklishufan/LaViDa`` (package ``llava``). An image is a base view of 14×14 tokens and
a mosaic of tiles with a newline token behind every row (high resolution), or one view of 27×27
(low resolution). Caches: ``prefix`` (image and prompt computed once, explained through the
cache) and ``none`` (at every step). One example at a time: attention knows no padding.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from captum_dcam.adapters.common.anyres import Tiling
from captum_dcam.adapters.common.llada import LladaAdapter
from captum_dcam.adapters.common.packing import SYSTEM, Packing, check_tiles, cutting_of, pools
from captum_dcam.adapters.lavida.compat import VARIANTS, repaired
from captum_dcam.adapters.lavida.decoding import LANGUAGES
from captum_dcam.adapters.lavida.facts import LavidaFamily
from captum_dcam.adapters.lavida.loading import loaded
from captum_dcam.errors import InputError, InputTypeError
from captum_dcam.model.adapter import Request, register
from captum_dcam.model.trajectory import Trajectory

#: how packing treats images of a model without tiles
SINGLE = ("tensor", "list")
POOLING = ("bilinear", "average", "max")


@dataclass(frozen=True)
class LavidaPacking(Packing):
    r"""Images of a model.

    Args:
        model, image_processor: as in :class:`~captum_dcam.adapters.common.packing.Packing`.
        single (str): ``tensor`` or ``list``, see :class:`LavidaAdapter`.
    """

    single: str

    def __post_init__(self) -> None:
        if self.single not in SINGLE:
            raise InputError(f"single is {self.single!r}: expected one of {SINGLE}")
        check_tiles(self.model, self.image_processor)

    def tiling(self, pictures: int) -> Tiling:
        """How images are cut: several have no tiles, as in the authors' evaluation."""
        config, tower = self.model.config, self.model.get_vision_tower()
        aspect = getattr(config, "image_aspect_ratio", None)
        tile, patches, patch = tower.image_size, tower.num_patches_per_side, tower.config.patch_size
        pins, most = (), None
        if aspect not in (None, "square") and pictures == 1:
            pins, most = cutting_of(config, tile)
        side, cell = patches, float(patch)
        if pools(self.model) and (pins or self.single == "list"):
            side = self._pooled(patches)
            cell = patch * patches / side if side * 2 > patches else 2.0 * patch
        base = "pad" if aspect == "pad" or pictures > 1 else "stretch"
        return Tiling(tile, side, cell, pins, base, self.fill, most)

    def _pooled(self, patches: int) -> int:
        mode = getattr(self.model.config, "mm_spatial_pool_mode", None)
        if mode not in POOLING:
            raise InputError(
                f"the configuration's mm_spatial_pool_mode is {mode!r}: expected one of {POOLING}, "
                "as the family's checkpoints have (bilinear)"
            )
        return -(-patches // 2) if mode == "bilinear" else patches // 2

    def newline(self, tiling: Tiling) -> bool:
        """A pooled single view is followed by one."""
        merge = getattr(self.model.config, "mm_patch_merge_type", "flat")
        return not tiling.pinpoints and self.single == "list" and "unpad" in merge

    def one_view(self, images: Tensor) -> Any:
        return images if self.single == "tensor" else list(images)


@register
class LavidaAdapter(LavidaFamily, LladaAdapter):
    r"""Adapter of ``LlavaLladaForMaskedDiffusion`` and ``LlavaDreamForMaskedDiffusion``.

    Args:
        model (nn.Module): from upstream's ``load_pretrained_model``.
        processor (tuple): ``(tokenizer, image_processor)``, the first and third of its results, or
            an object with both as attributes.
        cache (str, optional): ``prefix`` or ``none``. Default: ``"prefix"``, as in the authors'
            evaluation
        system (str, optional): system prompt; None for the template's own. Default: the authors'
        single (str, optional): how images without tiles are packed: ``tensor``, unpooled (729
            tokens), as in the authors' low-resolution evaluation, or ``list``, pooled like tiles
            and followed by a newline token, as their ``predict.py`` does. Default: ``"tensor"``
    """

    model_types: ClassVar[tuple[str, ...]] = ("llava_llada", "llava_dream")
    architectures: ClassVar[tuple[str, ...]] = tuple(VARIANTS)
    classes: ClassVar[tuple[str, ...]] = tuple(VARIANTS)
    loader = staticmethod(loaded)
    repaired = staticmethod(repaired)

    def __init__(
        self,
        model: nn.Module,
        processor: Any,
        cache: str | None = None,
        *,
        system: str | None = SYSTEM,
        single: str = "tensor",
    ) -> None:
        kinds = [VARIANTS[c.__name__] for c in type(model).__mro__ if c.__name__ in VARIANTS]
        if not kinds:
            raise InputTypeError(
                f"the model is a {type(model).__name__}: LaViDa's are {' and '.join(VARIANTS)}, "
                "from upstream's load_pretrained_model"
            )
        self.variant = kinds[0]
        packing = partial(LavidaPacking, single=single)
        super().__init__(model, processor, cache, system, packing, LANGUAGES[self.variant])

    def decoding(self, name: str, given: Mapping[str, Any]) -> dict[str, Any]:
        margin = {"alg": "topk_margin"} if (self.variant, name) == ("dream", "paper") else {}
        return super().decoding(name, {**margin, **given})

    @classmethod
    def claims(cls, config: dict[str, Any]) -> bool:
        return "dual_tower" not in config  # LaViDa-O's

    @classmethod
    def owns(cls, model: nn.Module) -> bool:
        # LaViDa-O's class has the same name; its configuration has two towers
        return super().owns(model) and not hasattr(model.config, "dual_tower")

    def generate(
        self, request: Request, *, generator: torch.Generator | None = None, **settings: Any
    ) -> Trajectory:
        r"""Decode with the family's own ``generate`` and record it.

        Args:
            request (Request): from :meth:`prepare`: one image of a high-resolution model is a
                base view and a mosaic; several are padded to squares of 27×27 tokens, one grid
                each, as in the authors' evaluation.
            generator (torch.Generator, optional): for sampled decoding.
            gen_length (int, optional): tokens of the canvas (``max_new_tokens`` is its other name).
                Default: 64, as in the authors' ``predict.py``; their functions have 128 (LLaDA) and
                512 (Dream)
            steps (int, optional): denoising steps in all. LLaDA's own function **ignores** its
                ``steps``; here the number is passed on as ``step_per_block``. Default: one per
                token
            step_ratio (float, optional): steps as a share of tokens, instead of ``steps``. Without
                a schedule Dream then commits at its last step all that is left, about the rest.
            temperature (float, optional): Default: 0; Dream's own function has 0.2, which samples
            schedule (str, optional): ``shift``, ``cosine``, ``logit_normal`` or ``linear``: how
                many tokens each step commits. Default: evenly
            shift (float, optional): of ``shift``. Upstream's default **3 commits most tokens
                late**; its evaluation passes 0.33, which commits most of them early.
            block_length (int, optional): LLaDA's semi-autoregressive block. Default:
                ``gen_length``; upstream's 128 fails for shorter answers
            remasking (str, optional): LLaDA's ``low_confidence``, ``random``, ``entropy`` (spelt
                ``entrophy`` upstream) or ``margin``.
            alg (str, optional): Dream's ``entropy``, ``maskgit_plus``, ``topk_margin`` (the
                authors' evaluation) or ``origin``. Default: ``"entropy"``
            alg_temp (float, optional), top_p (float, optional), top_k (int, optional): Dream's.
                They also change the order of greedy decoding. Default: 0, 0.95 and the 50 that
                transformers 4 filled in without being asked

        Returns:
            Trajectory: of the whole canvas; nothing stops an answer early. Dream's first token
            behind a cached prefix is the prefill's: it counts as committed at step 0, and its
            logits are the prefill's at every step.

        Raises:
            TypeError, ValueError: settings that cannot work.
        """
        return super().generate(request, generator=generator, **settings)
