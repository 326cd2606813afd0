r"""The embedded model's autoregressive twin: the same eyes, one word after another.

Vision tower and projector are the embedded model's own, to the bit. The transformer has its shapes
and was trained on from its weights, with a causal mask over image tokens and words and the next
word as target (``benchmarks/mini/twin.py``). So the two differ in how they write, and in nothing
that they see.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModel

from captum_dcam.mini.configuration import MiniConfig
from captum_dcam.mini.modeling import KeyValue, MaskedDiffusionOutput, MiniForMaskedDiffusion


class MiniCausalConfig(MiniConfig):
    """Shapes and ids of :class:`MiniForCausalLM`: those of :class:`MiniConfig`."""

    model_type = "captum_dcam_mini_ar"


class MiniForCausalLM(MiniForMaskedDiffusion):
    """Autoregressive multimodal LLM in Hugging Face's habits: position p predicts p + 1."""

    config_class = MiniCausalConfig

    def forward(
        self,
        input_ids: Tensor | None = None,
        pixel_values: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        segments: Sequence[int] | None = None,
        segment_masks: Sequence[Tensor | None] | None = None,
        position_ids: Tensor | None = None,
        past_key_values: tuple[KeyValue, ...] | None = None,
        use_cache: bool = False,
        logits_from: int = 0,
    ) -> MaskedDiffusionOutput:
        r"""As :meth:`MiniForMaskedDiffusion.forward`; every position sees what stands before it.

        ``segment_masks`` may hold one more mask, of padding, that broadcasts to (B, heads, queries,
        keys); ``segments`` is not used.
        """
        if inputs_embeds is None and input_ids is not None:
            inputs_embeds = self.embed(input_ids, pixel_values)
        if inputs_embeds is not None:
            past = 0 if past_key_values is None else past_key_values[0][0].shape[2]
            length = inputs_embeds.shape[1]
            causal = torch.ones(
                length, past + length, dtype=torch.bool, device=inputs_embeds.device
            )
            mask = causal.tril(past)[None, None]
            own = next(iter(segment_masks or ()), None)
            segment_masks = (mask if own is None else mask & _open(own),)
        return super().forward(
            inputs_embeds=inputs_embeds,
            segment_masks=segment_masks,
            position_ids=position_ids,
            past_key_values=past_key_values,
            use_cache=use_cache,
            logits_from=logits_from,
        )


def _open(mask: Tensor) -> Tensor:
    """Where a mask, bool or additive, lets attention through."""
    return mask if mask.dtype == torch.bool else mask >= 0


AutoConfig.register(MiniCausalConfig.model_type, MiniCausalConfig, exist_ok=True)
AutoModel.register(MiniCausalConfig, MiniForCausalLM, exist_ok=True)
