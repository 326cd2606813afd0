r"""LaViDa-LLaDA and LaViDa-Dream, the family on which the paper was validated.

Upstream: ``jacklishufan/LaViDa`` (package ``llava``). A picture is a base view of 14×14 tokens and
a mosaic of tiles with a newline token behind every row (high resolution), or one view of 27×27
(low resolution). Regimes: ``prefix`` (picture and prompt computed once, explained through the
cache) and ``full`` (at every step). One example at a time: attention knows no padding.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from PIL import Image
from torch import Tensor, nn

from captum_dcam.adapters.common import llava
from captum_dcam.adapters.common.anyres import grids, owners, views
from captum_dcam.adapters.common.recording import seeded
from captum_dcam.adapters.common.text import Words, special_ids
from captum_dcam.adapters.lavida.decoding import (
    Prefix,
    Recorder,
    as_written,
    prefilled,
    step_logits,
    unembedded,
    watched,
)
from captum_dcam.adapters.lavida.facts import FACTS, MASK, STOP, VARIANTS, variant_of
from captum_dcam.adapters.lavida.loading import loaded
from captum_dcam.adapters.lavida.packing import Packing
from captum_dcam.adapters.lavida.settings import arguments, checked
from captum_dcam.errors import InputError
from captum_dcam.model.adapter import Adapter, Facts, Request, register
from captum_dcam.model.layout import Layout
from captum_dcam.model.trajectory import Trajectory


@register
class LavidaAdapter(Adapter):
    r"""Adapter of ``LlavaLladaForMaskedDiffusion`` and ``LlavaDreamForMaskedDiffusion``.

    Args:
        model (nn.Module): from upstream's ``load_pretrained_model``.
        processor (tuple): ``(tokenizer, image_processor)``, the first and third of its results, or
            an object with both as attributes.
        regime (str, optional): ``prefix`` or ``full``. Default: ``"prefix"``, as in the authors'
            evaluation
        system (str, optional): system prompt; None for the template's own. Default: the authors'
        single (str, optional): how pictures without tiles are packed: ``tensor``, unpooled (729
            tokens), as in the authors' low-resolution evaluation, or ``list``, pooled like tiles
            and followed by a newline token, as their ``predict.py`` does. Default: ``"tensor"``
    """

    family: ClassVar[str] = "lavida"
    model_types: ClassVar[tuple[str, ...]] = ("llava_llada", "llava_dream")
    architectures: ClassVar[tuple[str, ...]] = tuple(VARIANTS)
    batches: ClassVar[bool] = False
    facts: ClassVar[Facts | None] = FACTS
    model: Any

    def __init__(
        self,
        model: nn.Module,
        processor: Any,
        regime: str | None = None,
        *,
        system: str | None = llava.SYSTEM,
        single: str = "tensor",
    ) -> None:
        super().__init__(model, processor, regime)
        self.variant = variant_of(model)
        self.tokenizer, image_processor = llava.parts_of(processor)
        self._packing = Packing(model, image_processor, single)
        self._system = system
        self._words = Words(self.tokenizer)

    @classmethod
    def load(
        cls,
        source: str | None = None,
        *,
        regime: str | None = None,
        system: str | None = llava.SYSTEM,
        single: str = "tensor",
        **options: Any,
    ) -> LavidaAdapter:
        """Load a checkpoint through upstream's builder; options: those of
        :func:`~captum_dcam.adapters.lavida.loading.loaded`."""
        model, processor = loaded(source, **options)
        return cls(model, processor, regime, system=system, single=single)

    @classmethod
    def claims(cls, config: dict[str, Any]) -> bool:
        return "dual_tower" not in config  # LaViDa-O's

    @staticmethod
    def owns(model: nn.Module) -> bool:
        # LaViDa-O's class has the same name; its configuration has two towers
        named = any(c.__name__ in VARIANTS for c in type(model).__mro__)
        return named and not hasattr(model.config, "dual_tower")

    # -- what the family declares -----------------------------------------------------------------

    @property
    def _dream(self) -> bool:
        return self.variant == "dream"

    @property
    def blocks(self) -> Sequence[nn.Module]:
        inner = self.model.model
        return list(inner.layers if self._dream else inner.transformer.blocks)

    @property
    def mask_id(self) -> int:
        own = getattr(self.model.config, "mask_token_id", None)
        return MASK[self.variant] if own is None else int(own)

    @property
    def stop_ids(self) -> frozenset[int]:
        own = (self.tokenizer.eos_token_id, self.tokenizer.pad_token_id)
        found = (*STOP[self.variant], self.mask_id, *own)
        return frozenset(int(i) for i in found if i is not None)

    def attention_module(self, block: nn.Module) -> nn.Module:
        return block.get_submodule("self_attn" if self._dream else "attn_out")

    def query_position(self, layout: Layout, position: int) -> int:
        return layout.prefix_length + position - self._dream

    def encode(self, text: str) -> list[int]:
        return self._words.encode(text)

    def pieces(self, ids: Sequence[int]) -> list[str]:
        return self._words.pieces(ids)

    # -- requests ---------------------------------------------------------------------------------

    def prepare(self, images: Sequence[Sequence[Image.Image]], prompts: Sequence[Any]) -> Request:
        r"""Pictures and prompt of one example to a request.

        Args:
            images (sequence): one list of pictures. One picture of a high-resolution model becomes
                a base view and a mosaic, two grids of the layout; several are padded to squares of
                27×27 tokens, a grid each, as in the authors' evaluation.
            prompts (sequence): one string or conversation; it may place its pictures by
                ``<image>``, otherwise they stand in front, a line each.

        Returns:
            Request: pixels (1, K, 3, S, S), all views of all pictures; extras: ids (1, L) with
            -200 for pictures, and the pictures' (W, H) (1, n, 2).

        Raises:
            TypeError, ValueError: no picture, several examples, a video, or more tokens than the
                family's context, which upstream would cut off without a word.
        """
        visuals = llava.pictures_of(self.family, images, prompts)
        pictures = [v.frames[0] for v in visuals]
        written = llava.asked(self.tokenizer, prompts[0], visuals, self._system)
        ids = llava.ids_of(self.tokenizer, written)
        sizes = [p.size for p in pictures]
        place = self._packing.place(ids, sizes)
        llava.check_length(self.family, place.length, self.model.config, sizes)
        tiling = self._packing.tiling(len(pictures))
        read = self._packing.image_processor.preprocess
        cut = [view for p in pictures for view in views(p, tiling)]
        pixels = torch.stack([read(v, return_tensors="pt")["pixel_values"][0] for v in cut])
        return Request(
            pixels[None].to(self.device, self.dtype),
            (torch.tensor([ids], device=self.device), torch.tensor([sizes], device=self.device)),
            Layout(self._packing.grids(sizes, place.starts), place.length),
            (llava.summary(prompts[0]),),
            (tuple(pictures),),
        )

    def pixel_tokens(self, request: Request) -> Tensor:
        tiling = self._packing.tiling(len(request.images[0]))
        parts, first = [], 0
        for picture in request.images[0]:
            own = owners(picture.size, tiling)
            parts.append(torch.where(own >= 0, own + first, -1))
            first += sum(g.positions.numel() for g in grids(picture.size, 0, tiling))
        return torch.cat(parts)[None, :, None].expand(-1, -1, 3, -1, -1)

    def prompt_tokens(self, request: Request, example: int = 0) -> tuple[Tensor, Tensor]:
        ids, sizes = (e[example].tolist() for e in request.extras)
        place = self._packing.place(ids, [(w, h) for w, h in sizes])
        words = ~torch.isin(place.ids, torch.tensor(sorted(special_ids(self.tokenizer))))
        return place.positions[words], place.ids[words]

    # -- decoding ---------------------------------------------------------------------------------

    def generate(
        self, request: Request, *, generator: torch.Generator | None = None, **settings: Any
    ) -> Trajectory:
        r"""Decode with the family's own ``generate`` and record it.

        Args:
            request (Request): from :meth:`prepare`.
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
        cached = self.regime == "prefix"
        made = checked(settings, self.variant, cached, generator)
        log = Recorder(self.mask_id, length=made.gen_length, dream=self._dream)
        options = arguments(made, self.variant, cached)
        if not self._dream:
            options["mask_id"] = self.mask_id
        views_of = self._packing.arguments(request.pixels, request.extras[1])
        with (
            seeded(generator, self.device),
            as_written(self.model),
            log.watching(*watched(self.model, self._dream)),
        ):
            result = self.model.generate(request.extras[0], **views_of, **options)
        result = getattr(result, "sequences", result)
        tokens = result[:, -made.gen_length :].clone()
        log.finish(tokens)
        # Dream's cache is one object that all blocks fill: their outputs cannot stand in for it
        keeps = not (self._dream and cached)
        behind = (request.layout.prefix_length, *[made.gen_length] * len(log.canvases))
        return Trajectory(
            tokens=tokens,
            states=(log.states,),
            final_state=(tokens,),
            commit_step=log.steps_of_commits(),
            confidence=log.sureness(tokens),
            regime=self.regime,
            lengths=() if keeps else behind,
            image_end=request.layout.image_end,
            settings=settings,
        )

    # -- replay -----------------------------------------------------------------------------------

    def embed(self, pixels: Tensor, *extras: Tensor) -> Prefix:
        """Embeddings (B, P, D) of the prefix, packed by the family's own code."""
        ids, sizes = extras
        views_of = self._packing.arguments(pixels, sizes)
        pack = self.model.prepare_inputs_labels_for_multimodal
        embeds = pack(ids, None, None, None, None, **views_of)[4]
        expected = self._packing.place(ids[0].tolist(), views_of["image_sizes"][: sizes.shape[1]])
        if embeds.shape[1] != expected.length:
            raise InputError(
                f"the model's packing makes {embeds.shape[1]} tokens of {views_of['image_sizes']} "
                f"(width × height) where {expected.length} were expected: its configuration or "
                "NOT_ALWASY_DO_2DPOOL has changed since the request was prepared, or its code is "
                "not that of LaViDa"
            )
        return Prefix(embeds)

    def prefill(self, embedded: Prefix) -> Prefix:
        if self.regime == "full":
            return embedded
        with as_written(self.model):
            return prefilled(self.model, embedded, self._dream)

    def rows(self, memory: Prefix, index: Tensor) -> Prefix:
        return memory.rows(index)

    def memory_tensors(self, memory: Prefix) -> list[Tensor]:
        return memory.tensors

    def replace_memory(self, memory: Prefix, tensors: Sequence[Tensor]) -> Prefix:
        return memory.replaced(tensors)

    def denoise(self, memory: Prefix, *state: Tensor) -> Tensor:
        with as_written(self.model):
            return step_logits(self.model, memory, state[0], self._dream)

    def unembed(self, hidden: Tensor) -> Tensor:
        return unembedded(self.model, hidden, self._dream)
