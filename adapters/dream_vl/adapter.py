r"""Dream-VL: the whole sequence at every step, logits shifted by one, images of any size.

Upstream: ``DreamLM/Dream-VLX`` (package ``dreamvl``), checkpoint ``Dream-org/Dream-VL-7B``, loaded
as the hub's remote code. Every call is feasible: the prompt cache is broken upstream and stays off.

What surprises in upstream's defaults: temperature 1.0 and top_k 50 (transformers 4 derives them
from the model's configuration), 512 steps whatever ``max_new_tokens``, and ``alg="origin"``, which
draws the positions it fills. Here: greedy ``maskgit_plus`` with a step per token. A step fills
int(m (1 - s/t)) of m masks, so that the first step may fill none; nothing ends an answer early.
With several examples upstream ranks the positions of all of them together, so that an answer
depends on its batch; here examples of a batch are decoded one by one.

``yu-rp/Dimple`` (``rp-yu/Dimple-7B``) is the same language model behind Qwen2-VL's tower and
format, with settings of its own; which it is, the model's class says. Dream-VLA
(``Dream-org/Dream-VLA-7B``) inherits from Dream-VL's class: the words that it writes are explained,
its actions (``predict_action``) are none.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from captum_dcam.adapters.common.conversations import ConversationAdapter
from captum_dcam.adapters.common.loading import Parts
from captum_dcam.adapters.common.recording import CanvasLog, seeded
from captum_dcam.adapters.common.text import special_ids
from captum_dcam.adapters.dream_vl import decoding
from captum_dcam.adapters.dream_vl.compat import CLASSES, is_dimple, repaired
from captum_dcam.adapters.dream_vl.facts import DreamVLFamily
from captum_dcam.adapters.dream_vl.loading import loaded
from captum_dcam.adapters.dream_vl.packing import Dimple, DreamVL, Prompt, embedded, joined
from captum_dcam.errors import InputError, MethodError
from captum_dcam.model.adapter import Request, register
from captum_dcam.model.layout import Layout
from captum_dcam.model.trajectory import Given, Trajectory


@register
class DreamVLAdapter(DreamVLFamily, ConversationAdapter):
    r"""Adapter of ``DreamVLModel``, and of Dimple's ``DimpleModel``.

    Args:
        model (nn.Module): as ``AutoModel`` loads it.
        processor (object): the checkpoint's, or its
            :class:`~captum_dcam.adapters.common.loading.Parts`.
        cache (str, optional): ``none``, the family's only one.

    Raises:
        TypeError, ValueError: a processor that does not fit the model.
    """

    model_types: ClassVar[tuple[str, ...]] = ("dream-vl", "dream-vla", "dimple")
    unfillable: ClassVar[str] = ""
    classes: ClassVar[tuple[str, ...]] = CLASSES
    loader = staticmethod(loaded)
    repaired = staticmethod(repaired)
    any_size: ClassVar[bool] = True

    def __init__(self, model: nn.Module, processor: Any, cache: str | None = None) -> None:
        super().__init__(model, processor, cache)
        self.takes_video = not self.dimple  # its authors' code for them raises

    def _family_of(self, parts: Parts) -> DreamVL:
        kind = Dimple if self.dimple else DreamVL
        return kind(self.model.config, parts.tokenizer, parts.image_processor)

    @property
    def dimple(self) -> bool:
        """Whether the model is Dimple's."""
        return is_dimple(type(self.model))

    @property
    def blocks(self) -> Sequence[nn.Module]:
        return list(self.model.model.layers)

    @property
    def stop_ids(self) -> frozenset[int]:
        return super().stop_ids | special_ids(self._tokenizer) | {self.mask_id}

    @property
    def mask_id(self) -> int:
        return int(self.model.config.mask_token_id)

    def query_position(self, layout: Layout, position: int) -> int:
        return layout.prefix_length + position - 1

    def _example(self, pixels: Tensor, extras: Sequence[Tensor], number: int) -> Any:
        """Ids, mask, the family's own tensors, and the arguments of images of one example."""
        one = slice(number, number + 1)
        own = [e[one] for e in extras]
        named = self._named(own)
        return own[0], own[1], named, self._family.inputs(pixels[one], own[0], named)

    def generate(
        self,
        request: Request,
        *,
        generator: torch.Generator | None = None,
        given: Given | None = None,
        **settings: Any,
    ) -> Trajectory:
        r"""Decode with the family's own ``diffusion_generate``, example by example, and record it.

        Args:
            request (Request): from :meth:`prepare`.
            generator (torch.Generator, optional): for sampled decoding.
            given (Given, optional): tokens that stand in the canvas from the start; Dimple's loop
                takes none.
            max_new_tokens (int, optional): tokens of the canvas; ``gen_length`` means the same.
                Default: 128
            steps (int, optional): Default: ``max_new_tokens``; upstream's own: 512
            alg (str, optional): ``maskgit_plus``, ``topk_margin``, ``entropy`` or ``origin``.
                Default: ``maskgit_plus``, as in the authors' example; upstream's own: ``origin``
            temperature (float, optional): Default: 0, greedy; the authors' example has 0.1
            alg_temp, top_p, top_k, eps, eos_penalty (optional): upstream's, at its class's
                defaults: None, None, None, 0.001, 0.
            alg_p_threshold, use_original_confidence, decoding_pipeline (optional): Dimple's, which
                has no eos_penalty and two more ``alg``, ``origin-ratio`` and ``autoregressive``.
                Default: None, True, ``dim``

        Returns:
            Trajectory: over the whole canvas.

        Raises:
            TypeError, ValueError: settings that cannot work, ``use_cache=True`` among them.
            MethodError: given tokens, of Dimple.
        """
        if self.dimple and given is not None:
            raise MethodError(
                "Dimple cannot fill the holes of an answer: its decoding loop takes no given "
                "tokens; give a whole answer, or load Dream-VL"
            )
        options = decoding.checked(settings, generator, self.dimple)
        config = decoding.generation_config(self.model, options)
        logs = []
        with seeded(generator, bits=31):
            for b in range(request.batch):
                ids, mask, _, parts = self._example(request.pixels, request.extras, b)
                inputs = {**parts, "attention_mask": mask}
                logs.append(decoding.generated(self.model, ids, config, inputs, given))
        if len({len(log.canvases) for log in logs}) > 1:
            raise InputError(
                f"the examples of the batch took {[len(log.canvases) for log in logs]} steps: with "
                "alg_p_threshold their number is an answer's own; explain them one by one"
            )
        log = CanvasLog.joined(logs)
        length = request.layout.prefix_length + log.tokens.shape[1]
        lengths = (length,) * len(log.canvases) if request.batch > 1 else ()
        return self.recorded(request, settings, log, [log.states], [log.tokens], lengths=lengths)

    def embed(self, pixels: Tensor, *extras: Tensor) -> Prompt:
        """Prompts with their images; example by example, as they are decoded."""
        found = (self._example(pixels, extras, b) for b in range(len(pixels)))
        return joined([embedded(self.model, *one) for one in found])

    def denoise(self, memory: Prompt, *state: Tensor) -> Tensor:
        return decoding.step_logits(self.model, memory, state[0])

    def unembed(self, hidden: Tensor) -> Tensor:
        return self.model.lm_head(self.model.model.norm(hidden))
