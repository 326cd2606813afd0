r"""LaViDa-LLaDA and LaViDa-Dream, the family on which the paper was validated.

Upstream: ``jacklishufan/LaViDa`` (package ``llava``). A picture is a base view of 14×14 tokens and
a mosaic of tiles with a newline token behind every row (high resolution), or one view of 27×27
(low resolution). Regimes: ``prefix`` (picture and prompt computed once, explained through the
cache) and ``full`` (at every step). One example at a time: attention knows no padding.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import nn

from captum_dcam.adapters.common import llava
from captum_dcam.adapters.common.llada import LladaAdapter
from captum_dcam.adapters.lavida.compat import INSTALL
from captum_dcam.adapters.lavida.decoding import LANGUAGES
from captum_dcam.adapters.lavida.loading import CHECKPOINT, VARIANTS, loaded
from captum_dcam.adapters.lavida.packing import LavidaPacking
from captum_dcam.errors import InputTypeError
from captum_dcam.model.adapter import Checkpoint, FamilyFacts, Request, register
from captum_dcam.model.trajectory import Trajectory

FACTS = FamilyFacts(
    checkpoints=(
        Checkpoint(CHECKPOINT, blocks=32),
        Checkpoint("jacklishufan/lavida-dream-v1.0-instruct", blocks=28),
        Checkpoint("jacklishufan/lavida-llada-1.0-lowres", blocks=32),
        Checkpoint("jacklishufan/lavida-llada-1.0-fim", blocks=32),
        Checkpoint("hbXNov/lavida-llada-reason", blocks=32),
    ),
    package="llava",
    install=INSTALL,
    notes=(
        "schedule='shift' has shift=3 by default and commits late; the authors evaluate with 0.33",
        "LLaDA's own generate ignores steps (here they are passed on) and do_sample",
        "Dream's own generate samples (temperature 0.2); here the default is greedy",
        "a low-resolution checkpoint wants NOT_ALWASY_DO_2DPOOL=1 before its package is imported",
    ),
)


@register
class LavidaAdapter(LladaAdapter):
    r"""Adapter of ``LlavaLladaForMaskedDiffusion`` and ``LlavaDreamForMaskedDiffusion``.

    Args:
        model (nn.Module): from upstream's ``load_pretrained_model``.
        processor (tuple): ``(tokenizer, image_processor)``, the first and third of its results, or
            an object with both as attributes.
        cache (str, optional): ``prefix`` or ``none``. Default: ``"prefix"``, as in the authors'
            evaluation
        system (str, optional): system prompt; None for the template's own. Default: the authors'
        single (str, optional): how pictures without tiles are packed: ``tensor``, unpooled (729
            tokens), as in the authors' low-resolution evaluation, or ``list``, pooled like tiles
            and followed by a newline token, as their ``predict.py`` does. Default: ``"tensor"``
    """

    family: ClassVar[str] = "lavida"
    model_types: ClassVar[tuple[str, ...]] = ("llava_llada", "llava_dream")
    architectures: ClassVar[tuple[str, ...]] = tuple(VARIANTS)
    facts: ClassVar[FamilyFacts | None] = FACTS

    def __init__(
        self,
        model: nn.Module,
        processor: Any,
        cache: str | None = None,
        *,
        system: str | None = llava.SYSTEM,
        single: str = "tensor",
    ) -> None:
        self.variant = variant_of(model)
        language = LANGUAGES[self.variant]
        super().__init__(model, processor, cache, system, LavidaPacking, language, single=single)

    @classmethod
    def load(
        cls,
        source: str | None = None,
        *,
        cache: str | None = None,
        system: str | None = llava.SYSTEM,
        single: str = "tensor",
        **options: Any,
    ) -> LavidaAdapter:
        """Load a checkpoint through upstream's builder; options: those of
        :func:`~captum_dcam.adapters.lavida.loading.loaded`."""
        model, processor = loaded(source, **options)
        return cls(model, processor, cache, system=system, single=single)

    @classmethod
    def claims(cls, config: dict[str, Any]) -> bool:
        return "dual_tower" not in config  # LaViDa-O's

    @staticmethod
    def owns(model: nn.Module) -> bool:
        # LaViDa-O's class has the same name; its configuration has two towers
        named = any(c.__name__ in VARIANTS for c in type(model).__mro__)
        return named and not hasattr(model.config, "dual_tower")

    def generate(
        self, request: Request, *, generator: torch.Generator | None = None, **settings: Any
    ) -> Trajectory:
        r"""Decode with the family's own ``generate`` and record it.

        Args:
            request (Request): from :meth:`prepare`: one picture of a high-resolution model is a
                base view and a mosaic; several are padded to squares of 27×27 tokens, a grid each,
                as in the authors' evaluation.
            generator (torch.Generator, optional): for sampled decoding.
            gen_length (int, optional): tokens of the canvas (``max_new_tokens`` is its other name).
                Default: 64, as in the authors' ``predict.py``; their functions have 128 (LLaDA) and
                512 (Dream)
            steps (int, optional): denoising steps in all. LLaDA's own function **ignores** its
                ``steps``; here the number is passed on as ``step_per_block``. Default: one a token
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


def variant_of(model: nn.Module) -> str:
    """``llada`` or ``dream``; TypeError for other models."""
    for cls in type(model).__mro__:
        if cls.__name__ in VARIANTS:
            return VARIANTS[cls.__name__]
    raise InputTypeError(
        f"the model is a {type(model).__name__}: LaViDa's are {' and '.join(VARIANTS)}, from "
        "upstream's load_pretrained_model"
    )
