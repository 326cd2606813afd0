r"""LLaDA-V: the whole sequence at every step, images as a base view and a mosaic of tiles.

Upstream: ``ML-GSAI/LLaDA-V`` (package ``llava`` under ``train/``), checkpoint ``GSAI-ML/LLaDA-V``.
One example at a time; every call is feasible. What surprises in upstream's defaults:
``max_new_tokens`` is ignored (``gen_length`` counts), nothing stops the answer unless
``stopping_criteria`` says so, EOS cannot be generated, and on CUDA decoding runs in float16
whatever the weights' type. Of its caches Fast-dLLM can stay registered (its part-length steps are
infeasible, as the table of calls shows, and are explained through its cache); dLLM-Cache cannot.

``jiyt17/ReDiff`` is this package and this architecture with other weights (``jiyatai/ReDiff``) and
a decoder that edits, ``revise=True``. ``ziHoHe/VidLaDA`` is a class of its own in a package of the
same name, for videos; its decoder computes logits of the current block only.
"""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, ClassVar

import torch
from PIL import Image
from torch import Tensor, nn

from captum_dcam.adapters.common.holes import started
from captum_dcam.adapters.common.packing import SYSTEM, PackedAdapter
from captum_dcam.adapters.common.prefix import Prefix
from captum_dcam.adapters.common.recording import seeded
from captum_dcam.adapters.common.text import LLADA, SpecialIds
from captum_dcam.adapters.llada_v import decoding
from captum_dcam.adapters.llada_v.facts import LladaVFamily
from captum_dcam.adapters.llada_v.loading import loaded, repaired
from captum_dcam.adapters.llada_v.packing import LladaVPacking, VideoPacking, unnoted
from captum_dcam.errors import InputTypeError
from captum_dcam.model.adapter import Request, register
from captum_dcam.model.prompts import Video
from captum_dcam.model.trajectory import Given, Trajectory


@register
class LladaVAdapter(LladaVFamily, PackedAdapter):
    r"""Adapter of ``LlavaLLaDAModelLM``, and of VidLaDA's ``LlavaLLaDAVideoModelLM``.

    Args:
        model (nn.Module): from upstream's ``load_pretrained_model``.
        processor (tuple): ``(tokenizer, image_processor)``, as that function returns them.
        cache (str, optional): ``none``, the family's only one.
        system (str, optional): system prompt; None for the template's own. Default: that of the
            authors' conversation template ``llava_llada``
    """

    model_types: ClassVar[tuple[str, ...]] = ("llava_llada", "llava_llada_video")
    # LaViDa's configuration has the same model_type: only the class tells them apart
    architectures: ClassVar[tuple[str, ...]] = ("LlavaLLaDAModelLM", "LlavaLLaDAVideoModelLM")
    unfillable: ClassVar[str] = ""
    classes: ClassVar[tuple[str, ...]] = architectures
    loader = staticmethod(loaded)
    repaired = staticmethod(repaired)
    #: upstream's decoder has them by number, whatever the tokenizer says
    ids: SpecialIds = LLADA

    def __init__(
        self,
        model: nn.Module,
        processor: Any,
        cache: str | None = None,
        *,
        system: str | None = SYSTEM,
    ) -> None:
        if not self.owns(model):
            raise InputTypeError(
                f"the model is a {type(model).__name__}: expected LlavaLLaDAModelLM, as upstream's "
                "load_pretrained_model(…, 'llava_llada') returns it"
            )
        #: VidLaDA alone
        self.takes_video = getattr(model.config, "model_type", None) == "llava_llada_video"
        packing = VideoPacking if self.takes_video else LladaVPacking
        super().__init__(model, processor, cache, system, packing)

    @property
    def blocks(self) -> Sequence[nn.Module]:
        return list(self.model.model.layers)

    @property
    def stop_ids(self) -> frozenset[int]:
        return frozenset(self.ids)

    @property
    def mask_id(self) -> int:
        return self.ids.mask

    @property
    def fast(self) -> bool:
        """Whether Fast-dLLM is registered on the model."""
        return decoding.is_fast(self.blocks)

    @property
    def revises(self) -> bool:
        """Whether the model's ``generate`` is ReDiff's."""
        return "revise" in inspect.signature(self.model.generate).parameters

    @property
    def _markers(self) -> frozenset[int]:
        return super()._markers | self.stop_ids

    def prepare_again(self, request: Request, pictures: Sequence[Image.Image]) -> Request:
        if not self.takes_video:
            return super().prepare_again(request, pictures)
        left = iter(pictures)
        shown = [
            Video(tuple(itertools.islice(left, frames))) if frames else next(left)
            for *_, frames in request.extras[1][0].tolist()
        ]
        return self.prepare([shown], list(request.prompts))

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
            given (Given, optional): tokens that stand in the canvas from the start; where some do,
                nothing stops the answer.
            gen_length (int, optional): tokens of the canvas. Default: 128
            block_length (int, optional), steps (int, optional): Default: ``gen_length`` both
            temperature (float, optional), cfg_scale (float, optional): Default: 0 both
            remasking (str, optional): ``low_confidence`` or ``random``.
            stopping_criteria (list of str, optional): strings that end the answer. Default:
                ``["<|eot_id|>"]``, as in the authors' demo; upstream's function has none
            generation_suffix (str, optional): text at the canvas's end, seen at every step.
            prefix_refresh_interval (int, optional): of Fast-dLLM. Default: upstream's 32
            revise (bool, optional): ReDiff's decoding, which also writes the tokens of a block anew
                that stand already; only where the model is of ReDiff's package. Default: False
            revise_start (float, optional): share of a block's steps that do, its last ones.
                Default: upstream's 1, all
            revise_topk (float, optional): share of these tokens, the surest. Default: all

        Returns:
            Trajectory: over the whole canvas. Positions behind the stop, and the suffix, which
            nobody generated, hold EOS in ``tokens`` and are never explained; the states hold what
            the model saw there. ``confidence`` counts the ids that the decoder rules out as such.

        Raises:
            MethodError: dLLM-Cache is registered, or Fast-dLLM where accelerate empties its cache.
            TypeError, ValueError: settings that cannot work.
        """
        decoding.refuse_feature_cache(self.blocks)
        if fast := self.fast:
            decoding.refuse_copied_cache(self.blocks)
        options = decoding.checked(settings, generator, fast, self.revises)
        decoding.check_given(given, options, settings, fast)
        model, tokenizer, text = self.model, self.tokenizer, options["generation_suffix"]
        suffix = tokenizer.encode(text, add_special_tokens=False) if text else []
        length = options["gen_length"] + len(suffix)
        canvas = torch.full((1, length), self.ids.mask, device=self.device)
        canvas[0, options["gen_length"] :] = torch.tensor(suffix, device=self.device)
        if given is not None:
            canvas = given.canvas(self.ids.mask)
        scale = options["cfg_scale"]
        prefix = request.layout.prefix_length
        recorder = decoding.CanvasRecorder(prefix, canvas, scale, self.ids)
        views = self._packing.arguments(request.pixels, request.extras[1])
        words = model.model.embed_tokens
        with (
            seeded(generator, self.device),
            unnoted(model.model),
            recorder.watching(model),
            started(given, prefix, self.ids.mask, words),
        ):
            result = model.generate(request.extras[0], tokenizer=tokenizer, **views, **options)
        recorder.finish(result[:, : result.shape[1] - len(suffix)])
        steps = recorder.steps
        states, final = decoding.states_of(steps, scale, fast, recorder.canvas)
        if self.takes_video:
            states, final = decoding.by_block(states, final, options["block_length"])
        own_calls = fast or scale > 0  # the part behind a cache, or twice the rows
        found = self.recorded(
            request,
            settings,
            recorder,
            states,
            final,
            lengths=[s.length for s in steps] if own_calls else (),
            read_at=decoding.runs(steps) if fast else None,
        )
        edits = self.takes_video and (given is None or not bool(given.at.any()))
        if not options.get("revise") and not edits:
            return found
        late = decoding.unsettled(steps, found.commit_step, self.ids.mask, options)
        return replace(found, unsettled=late)

    def confidence_of(self, logits: Tensor, tokens: Tensor, *state: Tensor) -> Tensor:
        """Without the ids that the decoder rules out."""
        rows = decoding.ruled_out(logits.float(), self.ids)
        return super().confidence_of(rows, tokens, *state)

    def embed(self, pixels: Tensor, *extras: Tensor) -> Prefix:
        with unnoted(self.model.model):
            return super().embed(pixels, *extras)

    def denoise(self, memory: Prefix, *state: Tensor) -> Tensor:
        block = None
        if self.takes_video:
            state, block = decoding.split_block(state)
        return decoding.step_logits(self.model, memory.embeds, self.ids.mask, *state, block=block)

    def unembed(self, hidden: Tensor) -> Tensor:
        return self.model.lm_head(self.model.model.norm(hidden))
