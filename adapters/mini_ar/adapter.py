"""The embedded model's autoregressive twin: with a prefix cache, or teacher forcing without."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from captum_dcam.adapters.common import causal
from captum_dcam.adapters.common.drawn import DrawnScenesAdapter
from captum_dcam.adapters.common.settings import need_generator
from captum_dcam.adapters.mini_ar.decoding import (
    SETTINGS,
    Prompt,
    denoised,
    embedded,
    generated,
    prefilled,
)
from captum_dcam.adapters.mini_ar.facts import MiniTwinFamily
from captum_dcam.mini.causal import MiniForCausalLM
from captum_dcam.model.adapter import Request, register
from captum_dcam.model.layout import Layout
from captum_dcam.model.trajectory import Trajectory


@register
class MiniTwinAdapter(MiniTwinFamily, DrawnScenesAdapter):
    """Adapter of :class:`captum_dcam.mini.causal.MiniForCausalLM`."""

    model_types: ClassVar[tuple[str, ...]] = ("captum_dcam_mini_ar",)
    kind = MiniForCausalLM
    model: MiniForCausalLM

    @staticmethod
    def owns(model: nn.Module) -> bool:
        """Whether a loaded model belongs to this family."""
        return isinstance(model, MiniForCausalLM)

    def query_position(self, layout: Layout, position: int) -> int:
        return causal.query_position(layout, position)

    def generate(
        self, request: Request, *, generator: torch.Generator | None = None, **settings: Any
    ) -> Trajectory:
        read = SETTINGS.read(settings)
        need_generator(read["temperature"] > 0, generator)
        with torch.no_grad():
            prompt = self.prefill(self.embed(request.pixels, *request.extras))
        tokens, sure = generated(self.model, prompt, **read, generator=generator)
        filler = self.model.config.pad_token_id
        return causal.written(tokens, sure, self.cache, request.layout, filler, settings)

    def forced_states(self, tokens: Tensor) -> tuple[Tensor, ...]:
        """Step t sees the tokens before t; padding stands for the rest."""
        return causal.states_of(tokens, self.model.config.pad_token_id)

    def embed(self, pixels: Tensor, *extras: Tensor) -> Prompt:
        return embedded(self.model, pixels, *extras)

    def prefill(self, embedded: Prompt) -> Prompt:
        return prefilled(self.model, embedded) if self.cache == "prefix" else embedded

    def select(self, memory: Prompt, index: Tensor) -> Prompt:
        return memory.select(index)

    def memory_tensors(self, memory: Prompt) -> list[Tensor]:
        return memory.tensors

    def replace_memory(self, memory: Prompt, tensors: Sequence[Tensor]) -> Prompt:
        return memory.replaced(tensors)

    def denoise(self, memory: Prompt, *state: Tensor) -> Tensor:
        return denoised(self.model, memory, state[0])
