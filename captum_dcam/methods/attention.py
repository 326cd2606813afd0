r"""Attention weights as maps: raw, rollout, grad-rollout.

All read the row of the position that predicts the word, at the keys that are image tokens. All are
non-negative by definition: they tell where information may have come from, not whether it spoke for
or against the word.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from captum_dcam.methods.attention_weights import Attentions, through
from captum_dcam.methods.base import (
    Attribution,
    AttributionTask,
    Method,
    MethodFacts,
    register_method,
)
from captum_dcam.methods.lens import check_block
from captum_dcam.methods.sequence_values import over_tokens


class _Weights(Method):
    """Shared: one look at the model tells whether its attention can be seen."""

    def check(self, task: AttributionTask) -> None:
        super().check(task)
        Attentions(task).at(task.targets[0].positions[0] if task.targets else 0)


@register_method("attention")
@dataclass(frozen=True)
class RawAttention(_Weights):
    r"""Attention from the word's position to every image token, averaged over heads.

    The text part is the same row at text tokens. It does not depend on the token's id: two tokens
    read at one position in one state have one map.

    Args:
        block (int, optional): whose weights; negative counts from the end. Default: the mean over
            all blocks
    """

    block: int | None = None
    facts: ClassVar[MethodFacts] = MethodFacts(
        "Attention", "attention", "attention weights as they are", "1", ("attention",), text=True
    )

    def check(self, task: AttributionTask) -> None:
        self._blocks(task)
        super().check(task)

    def _blocks(self, task: AttributionTask) -> list[int]:
        adapter = task.forward.adapter
        if self.block is None:
            return list(range(len(adapter.blocks)))
        return [check_block(adapter, self.block)]

    def attribute(self, task: AttributionTask) -> Attribution:
        blocks, attentions = self._blocks(task), Attentions(task)
        return over_tokens(task, lambda p, _token: attentions.row(p, blocks), text=True)


@register_method("attention_rollout")
@dataclass(frozen=True)
class AttentionRollout(_Weights):
    r"""Attention rollout: the product over blocks of :math:`(\bar A + I) / 2` (Eq. 1 and Sec. 3).

    :math:`\bar A` is averaged over heads; rows add up to 1. Only the row of the word's position is
    carried through the product. Like raw attention it does not depend on the token's id.
    """

    facts: ClassVar[MethodFacts] = MethodFacts(
        "Attention rollout",
        "attention",
        "Abnar & Zuidema, ACL 2020",
        "1",
        ("attention",),
        text=True,
    )

    def attribute(self, task: AttributionTask) -> Attribution:
        attentions = Attentions(task)

        def values(position: int, _token: int) -> Tensor:
            _, found = attentions.at(position)
            row = _start(attentions, position)
            for parts in reversed(found):
                row = (row + through(row, [call.mean for call in parts])) / 2
                row = row / row.sum()
            return row

        return over_tokens(task, values, text=True)


@register_method("grad_rollout")
@dataclass(frozen=True)
class GradRollout(_Weights):
    r"""Relevance by gradient-weighted attention (Eq. 5 and 6, self-attention).

    :math:`R = \prod_b (I + \mathrm{mean}_h (A_b \odot \nabla_{A_b} y)^+)`, y the token's logit; the
    map is the row of the word's position. Only that row is carried through the product.
    """

    facts: ClassVar[MethodFacts] = MethodFacts(
        "Grad-rollout",
        "attention",
        "Chefer et al., ICCV 2021",
        "1 + 1 back",
        ("attention", "gradients"),
        text=True,
    )

    def attribute(self, task: AttributionTask) -> Attribution:
        attentions = Attentions(task, gradients=True)

        def values(position: int, token: int) -> Tensor:
            row = _start(attentions, position)
            for parts in reversed(attentions.gradients(position, token)):
                row = row + through(row, parts)
            return row

        return over_tokens(task, values, text=True)


def _start(attentions: Attentions, position: int) -> Tensor:
    """Unit row (L,) of the position that predicts a response position."""
    dtype = torch.promote_types(attentions.forward.adapter.dtype, torch.float32)
    row = torch.zeros(attentions.length, dtype=dtype)
    row[attentions.query(position)] = 1
    return row
