r"""Layer-wise relevance propagation: CP-LRP and AttnLRP.

The explained logit is propagated back to the hidden states of the whole sequence at one block's
output. The relevance of a token is the sum over channels of state × changed gradient; image tokens
make the maps, text tokens the text part, on one scale. Positive relevance speaks for the word.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from captum_dcam.errors import MethodError
from captum_dcam.methods.attention_calls import INVISIBLE, inside_blocks, wide
from captum_dcam.methods.base import (
    Attribution,
    AttributionTask,
    Method,
    MethodFacts,
    register_method,
)
from captum_dcam.methods.relevance_rules import AttnRules, CPRules, RelevanceRules
from captum_dcam.methods.sequence_values import over_tokens, sequence_length
from captum_dcam.model.sequence import outputs_of, padded, unkept


class Relevance:
    r"""Relevance of the L tokens of a task's sequence at the output of a block.

    Args:
        task (AttributionTask): batch 1.
        block (int): whose output is read.
        rules (type): how gradients are changed.
    """

    def __init__(self, task: AttributionTask, block: int, rules: type[RelevanceRules]) -> None:
        self._problem, self._block, self._rules = task, block, rules
        self._forward = unkept(task.forward)
        self._prefix: tuple[Any, list[Tensor]] | None = None
        self._state: tuple[int, Tensor, list[Tensor]] | None = None

    def _run(self, work: Any) -> tuple[Any, list[Tensor]]:
        """``work()`` under the rules, and the block's outputs, which were made leaves."""
        adapter = self._forward.adapter
        blocks, twins = list(adapter.blocks), adapter.step_blocks
        rules, block = self._rules(), self._block

        def leaf(hidden: Tensor, _index: int) -> Tensor:
            return hidden.detach().requires_grad_()

        with torch.enable_grad(), outputs_of({block: blocks[block]}, leaf, twins) as found:
            with inside_blocks(blocks, rules, twins):
                result = work()
        above = set(range(block + 1, len(blocks)))
        if found[block] and not above <= rules.attended:
            missing = min(above - rules.attended)
            raise MethodError(
                f"block {missing} ({type(blocks[missing]).__name__}) showed no attention: rules "
                "for it cannot be applied in a kernel that torch does not show; " + INVISIBLE
            )
        return result, found[block]

    def state(self, position: int) -> tuple[Tensor, list[Tensor]]:
        """Logits (T, V) of the state of a response position, and the leaves (1, …, D)."""
        step = self._problem.step(position)
        if self._state is None or self._state[0] != step:
            self._state = None  # frees the graph of the state before
            forward = self._forward
            if self._prefix is None:
                self._prefix = self._run(forward.prefill)
            memory, before = self._prefix
            index = torch.zeros(1, dtype=torch.long, device=self._problem.pixels.device)

            def step_again() -> Tensor:
                own = forward.adapter.select(memory, index)
                return forward.step(own, torch.tensor([0]), torch.tensor([step]))

            logits, leaves = self._run(step_again)
            self._state = step, logits[0], [*before, *leaves]
        return self._state[1:]

    def of(self, position: int, token: int) -> Tensor:
        """(L,) relevance of every position for one token's logit."""
        logits, leaves = self.state(position)
        with torch.enable_grad():
            score = logits[position, token]
        grads = torch.autograd.grad(score, leaves, retain_graph=True, materialize_grads=True)
        parts = zip(leaves, grads, strict=True)
        found = torch.cat([(wide(h.detach()) * wide(g)).sum(-1)[0] for h, g in parts])
        twins = self._forward.adapter.step_blocks
        return padded(found, sequence_length(self._problem)) if twins else found


class _LRP(Method):
    """Shared by the two: they differ in their rules."""

    rules: ClassVar[type[RelevanceRules]]
    block: int | None

    def _relevance(self, task: AttributionTask) -> Relevance:
        forward = task.forward
        block = forward.layer if self.block is None else forward.adapter.check_layer(self.block)
        return Relevance(task, block, self.rules)

    def check(self, task: AttributionTask) -> None:
        super().check(task)
        self._relevance(task).state(task.targets[0].positions[0] if task.targets else 0)

    def attribute(self, task: AttributionTask) -> Attribution:
        return over_tokens(task, self._relevance(task).of, text=True)


@register_method("cp_lrp")
@dataclass(frozen=True)
class CPLRP(_LRP):
    r"""CP-LRP: attention weights, norm statistics and gates are constants.

    Without biases in the blocks above, the relevance of all tokens adds up to the logit.

    Args:
        block (int, optional): whose output is read. Default: the tapped block
    """

    rules: ClassVar[type[RelevanceRules]] = CPRules
    block: int | None = None
    facts: ClassVar[MethodFacts] = MethodFacts(
        "CP-LRP", "relevance", "Ali et al., ICML 2022", "1 + 1 back", ("gradients",), True
    )


@register_method("attn_lrp")
@dataclass(frozen=True)
class AttnLRP(_LRP):
    r"""AttnLRP: relevance flows through the attention weights as well.

    Softmax by its Taylor expansion (Prop. 3.1), products of two variables by the uniform rule
    (Prop. 3.3), norms (Prop. 3.4) and activations by the identity rule, linear maps by the ε-rule
    with ε → 0. The Taylor rule of softmax leaves a bias: the sum is not the logit.

    Args:
        block (int, optional): whose output is read. Default: the tapped block
    """

    rules: ClassVar[type[RelevanceRules]] = AttnRules
    block: int | None = None
    facts: ClassVar[MethodFacts] = MethodFacts(
        "AttnLRP",
        "relevance",
        "Achtibat et al., ICML 2024",
        "1 + 1 back",
        ("gradients",),
        text=True,
    )
