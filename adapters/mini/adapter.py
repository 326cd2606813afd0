"""The embedded model: with a prefix cache (as LaViDa) or without one (as LLaDA-V)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from captum_dcam.adapters.common.drawn import DrawnScenesAdapter
from captum_dcam.adapters.common.settings import (
    BLOCKS,
    TEMPERATURE,
    Setting,
    Settings,
    length,
    one_of,
)
from captum_dcam.adapters.mini.facts import MiniFamily
from captum_dcam.mini import modeling
from captum_dcam.mini.causal import MiniForCausalLM
from captum_dcam.mini.modeling import MiniForMaskedDiffusion
from captum_dcam.model.adapter import Request, register
from captum_dcam.model.trajectory import Given, Trajectory

SETTINGS = Settings(
    "mini",
    {
        "gen_length": Setting(32, length, also="max_new_tokens"),
        **BLOCKS,
        **TEMPERATURE,
        "remasking": Setting("low_confidence", one_of(*modeling.REMASKING)),
        "schedule": Setting("linear", one_of(*modeling.SCHEDULES)),
    },
)


@register
class MiniAdapter(MiniFamily, DrawnScenesAdapter):
    """Adapter of :class:`captum_dcam.mini.modeling.MiniForMaskedDiffusion`."""

    model_types: ClassVar[tuple[str, ...]] = ("captum_dcam_mini",)
    unfillable: ClassVar[str] = ""
    kind = MiniForMaskedDiffusion

    @staticmethod
    def owns(model: nn.Module) -> bool:
        """Whether a loaded model belongs to this family."""
        return isinstance(model, MiniForMaskedDiffusion) and not isinstance(model, MiniForCausalLM)

    @property
    def mask_id(self) -> int:
        return self.model.config.mask_token_id

    def generate(
        self,
        request: Request,
        *,
        generator: torch.Generator | None = None,
        given: Given | None = None,
        **settings: Any,
    ) -> Trajectory:
        cached = self.cache == "prefix"
        decoded = modeling.generate(
            self.model,
            request.pixels,
            *request.extras,
            prefix_cache=cached,
            generator=generator,
            start=None if given is None else given.canvas(self.mask_id),
            **SETTINGS.read(settings),
        )
        return Trajectory(
            tokens=decoded.tokens,
            states=(decoded.canvases,),
            final_state=(decoded.tokens,),
            commit_step=decoded.commit_step,
            confidence=decoded.confidence,
            cache=self.cache,
            image_end=request.layout.image_end,
            settings=settings,
        )

    def embed(self, pixels: Tensor, *extras: Tensor) -> modeling.Prefix:
        input_ids, attention_mask = extras
        return modeling.embed_prefix(self.model, pixels, input_ids, attention_mask)

    def prefill(self, embedded: modeling.Prefix) -> modeling.Prefix:
        return modeling.cache_prefix(self.model, embedded) if self.cache == "prefix" else embedded

    def select(self, memory: modeling.Prefix, index: Tensor) -> modeling.Prefix:
        return memory.select(index)

    def memory_tensors(self, memory: modeling.Prefix) -> list[Tensor]:
        return [t for pair in memory.cache or () for t in pair]

    def replace_memory(self, memory: modeling.Prefix, tensors: Sequence[Tensor]) -> modeling.Prefix:
        new = iter(tensors)
        cache = tuple(
            (next(new) if k.requires_grad else k, next(new) if v.requires_grad else v)
            for k, v in memory.cache or ()
        )
        return replace(memory, cache=cache)

    def denoise(self, memory: modeling.Prefix, *state: Tensor) -> Tensor:
        return modeling.denoise(self.model, memory, state[0])
