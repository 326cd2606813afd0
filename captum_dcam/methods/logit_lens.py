r"""CAM by the logit lens: the word's own logit at every image token."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from captum_dcam.methods.base import AttributionTask, MethodFacts, register_method
from captum_dcam.methods.lens import Lens, PerWord, check_block, reads
from captum_dcam.model.sequence import split_grids
from captum_dcam.model.words import Target


@register_method("logit_lens")
@dataclass(frozen=True)
class LogitLens(PerWord):
    r"""What the output head reads at image tokens (TAM Eq. 1; MSEA+ARC Eq. 2).

    The map is the logit of the word's token at every image token, signed; Eq. 1's positive part is
    the reader's. The relevance of text is the same logit at the text tokens: at a prompt token's
    own position, and for an answer token in the row that predicts it. A word of several tokens is
    the sum of theirs.

    TAM calls this Grad-CAM as well, and CAM. At the last hidden state *that predicts the token* the
    gradient of its logit is its row of the output head, so weighing the image tokens' channels with
    it gives this map, up to the final norm. Grad-CAM as it is defined, with gradients pooled over
    the *image* tokens, is zero at the last block: no path leads from them to the answer.

    Nothing trains a masked-diffusion model to predict anything at image tokens; how much the map
    says depends on the model.

    Args:
        block (int): whose output is read, from 0; negative counts from the end. Default: -1
    """

    block: int = -1

    facts: ClassVar[MethodFacts] = MethodFacts(
        "CAM / logit lens", "logit lens", "TAM, Li et al. 2025, Eq. 1", "1", (), text=True
    )

    def check(self, task: AttributionTask) -> None:
        super().check(task)
        check_block(task.forward.adapter, self.block)

    def reader(self, task: AttributionTask) -> tuple[AttributionTask, Lens]:
        return task, Lens(task.forward, reads(task), self.block)

    def word(
        self, reader: tuple[AttributionTask, Lens], target: Target
    ) -> tuple[tuple[Tensor, ...], Tensor | None]:
        task, lens = reader
        pairs = list(zip(target.positions, target.token_ids, strict=True))
        image = torch.stack([lens.image(task.step(p), token) for p, token in pairs])
        text = torch.stack([lens.text(task.step(p), token) for p, token in pairs])
        return split_grids(image.sum(0), task.forward), text.sum(0)
