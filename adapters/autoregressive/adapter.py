r"""Autoregressive multimodal LLMs native to transformers, as the rivals' own setting.

Qwen2-VL, Qwen2.5-VL, Qwen3-VL, Qwen3.5, LLaVA-1.5, LLaVA-OneVision, InternVL and Gemma 4. An answer
of T tokens is a trajectory of T steps: before step s the tokens before s are visible, step s
commits token s. The model is causal, so what stands behind does not matter; it is filled with
padding.

Caches: ``prefix`` (prompt and images computed once, the answer behind their keys and values) and
``none`` (teacher forcing, no cache). Position p is predicted from p - 1; the first token's logits
are the prefill's.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from captum_dcam.adapters.autoregressive import internvl_chat
from captum_dcam.adapters.autoregressive.decoding import (
    Prompt,
    checked,
    decoded,
    denoised,
    embedded,
    head,
    prefilled,
)
from captum_dcam.adapters.autoregressive.facts import AutoregressiveFamily
from captum_dcam.adapters.autoregressive.loading import FAMILIES, loaded
from captum_dcam.adapters.common import causal
from captum_dcam.adapters.common.conversations import ConversationAdapter
from captum_dcam.adapters.common.loading import Parts
from captum_dcam.adapters.common.visuals import Family
from captum_dcam.errors import InputError
from captum_dcam.model.adapter import Request, register
from captum_dcam.model.layout import Layout
from captum_dcam.model.trajectory import Trajectory

#: settings that a record can hold as they are; others (a stopping criterion) by how they print
PLAIN = (str, int, float, bool, type(None))


@register
class AutoregressiveAdapter(AutoregressiveFamily, ConversationAdapter):
    r"""Adapter of the families named above.

    Args:
        model (nn.Module): with its language-model head (``AutoModelForImageTextToText``).
        processor (object): the checkpoint's, or its
            :class:`~captum_dcam.adapters.common.loading.Parts`.
        cache (str, optional): ``prefix`` or ``none``. Default: ``"prefix"``

    Raises:
        TypeError, ValueError: a model of another family, a processor that does not fit it.
    """

    model_types: ClassVar[tuple[str, ...]] = (*FAMILIES, internvl_chat.MODEL_TYPE)
    unfillable: ClassVar[str] = (
        "its models write from left to right, and what fills a hole would see nothing of the words "
        "behind it"
    )
    loader = staticmethod(loaded)

    def __init__(self, model: nn.Module, processor: Any, cache: str | None = None) -> None:
        super().__init__(model, processor, cache)
        self.takes_video = self._family.video_token is not None  # not LLaVA

    @classmethod
    def owns(cls, model: nn.Module) -> bool:
        kind = getattr(getattr(model, "config", None), "model_type", None)
        return super().owns(model) or kind == internvl_chat.MODEL_TYPE

    def _family_of(self, parts: Parts) -> Family:
        config = getattr(self.model, "config", None)
        kind = getattr(config, "model_type", None)
        if kind == internvl_chat.MODEL_TYPE:
            raise InputError(
                f"the model is a {type(self.model).__name__}, of InternVL's own code: "
                "captum_dcam.load(…) of the same checkpoint reads it into transformers' class"
            )
        if kind not in FAMILIES:
            raise InputError(
                f"a {type(self.model).__name__} of type {kind!r} is not among "
                f"{', '.join(FAMILIES)}: give a model of one of them, with its language-model head"
            )
        return FAMILIES[kind](config, parts.tokenizer, parts.image_processor, parts.video_processor)

    @property
    def blocks(self) -> Sequence[nn.Module]:
        return list(self.model.model.language_model.layers)

    @property
    def deepest_block(self) -> int:
        """The last but one of those with keys and values of their own: blocks behind read those of
        earlier ones (Gemma 4)."""
        text = self.model.config.get_text_config()
        return super().deepest_block - (getattr(text, "num_kv_shared_layers", None) or 0)

    @property
    def recommended_block(self) -> int:
        """As for other families, but behind the blocks that visual features are added to."""
        vision = self.model.config.vision_config
        deep = len(getattr(vision, "deepstack_visual_indexes", ()))
        return min(self.deepest_block, max(super().recommended_block, deep))

    @property
    def any_size(self) -> bool:  # it depends on the model
        return self._family.any_size

    def query_position(self, layout: Layout, position: int) -> int:
        return causal.query_position(layout, position)

    def _inputs(self, pixels: Tensor, extras: Sequence[Tensor]) -> dict[str, Any]:
        """Keyword arguments of the family's forward and ``generate``."""
        ids, mask, *_ = extras
        own = self._family.inputs(pixels, ids, self._named(extras))
        return {"input_ids": ids, "attention_mask": mask, **own}

    def generate(
        self, request: Request, *, generator: torch.Generator | None = None, **settings: Any
    ) -> Trajectory:
        r"""Decode with the family's own ``generate``; its settings are taken as they are.

        ``gen_length`` means ``max_new_tokens`` (default 64). Greedy unless ``do_sample=True`` or a
        ``temperature`` above 0 asks for sampling, which needs ``generator``; the checkpoint's
        ``generation_config`` gives everything else (stop ids, ``repetition_penalty``, ``top_p``).
        """
        options = checked(settings, generator)
        cached = self.cache == "prefix"
        inputs = self._inputs(request.pixels, request.extras)
        tokens, confidence = decoded(self.model, inputs, options, generator, cached)
        plain = {k: v if isinstance(v, PLAIN) else repr(v) for k, v in settings.items()}
        return causal.written(tokens, confidence, self.cache, request.layout, self._filler, plain)

    def forced_states(self, tokens: Tensor) -> tuple[Tensor, ...]:
        """Step t sees the tokens before t; padding stands for the rest."""
        return causal.states_of(tokens, self._filler)

    def embed(self, pixels: Tensor, *extras: Tensor) -> Prompt:
        return embedded(self.model, self._inputs(pixels, extras))

    def prefill(self, embedded: Prompt) -> Prompt:
        return prefilled(self.model, embedded) if self.cache == "prefix" else embedded

    def denoise(self, memory: Prompt, *state: Tensor) -> Tensor:
        return denoised(self.model, memory, state[0])

    def unembed(self, hidden: Tensor) -> Tensor:
        return head(self.model, self.model.model.language_model.norm(hidden))
