r"""How MMaDA decodes: settings and record of its ``mmu_generate``, and one step with gradients."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from captum_dcam.adapters.common.recording import CanvasLog, guided
from captum_dcam.adapters.common.settings import GUIDED, Setting, Settings, length

SETTINGS = Settings(
    "MMaDA",
    {
        "max_new_tokens": Setting(128, length, also="gen_length"),
        **GUIDED,
    },
    refused={
        "top_k": "MMaDA accepts and ignores it",
        "eot_token": "MMaDA accepts and ignores it: an answer is always as long as its canvas",
        "attention_mask": "a batch here has no padding, so there is nothing to mask",
    },
)


def step_logits(
    model: Any, prefix: Tensor, mask_id: int, canvas: Tensor, scale: Tensor | None = None
) -> Tensor:
    r"""Logits (R, T, V) of one step: what ``mmu_generate`` computes before it chooses.

    Guided, R rows follow in which the whole prompt, image included, is masked.

    Args:
        model (nn.Module): the language model.
        prefix (Tensor): (R, P, D) embeddings of the prompts.
        mask_id (int): id of the mask.
        canvas (Tensor): (R, T) ids.
        scale (Tensor, optional): (R,) guidance scale.
    """
    words = model.get_input_embeddings()
    answer = words(canvas)
    embeds = torch.cat((prefix.to(answer.dtype), answer), dim=1)
    if scale is not None:
        mask = words(canvas.new_tensor([mask_id])).expand_as(prefix)
        embeds = torch.cat((embeds, torch.cat((mask, answer), dim=1)))
    # no attention_mask: one with zeros would make the model causal
    out = model(inputs_embeds=embeds, use_cache=False, return_dict=True)
    logits = out.logits[:, prefix.shape[1] :]
    return logits if scale is None else guided(logits, scale[:, None, None])


@contextmanager
def logged(model: nn.Module, prefix: int, mask_id: int, scale: float) -> Iterator[CanvasLog]:
    """Record ``mmu_generate``, which keeps no history, from the model's inputs and outputs."""
    log = CanvasLog(mask_id)

    def before(_module: nn.Module, args: Sequence[Tensor]) -> None:
        ids = args[0].chunk(2)[0] if scale > 0 else args[0]
        log.see(ids[:, prefix:])

    def after(_module: nn.Module, _args: Any, output: Any) -> None:
        logits = output.logits[:, prefix:]
        log.read(guided(logits, scale) if scale > 0 else logits)

    with model.register_forward_pre_hook(before), model.register_forward_hook(after):
        yield log
