r"""Layer-wise relevance propagation: CP-LRP and AttnLRP.

The explained logit is propagated back to the hidden states of the whole sequence at one block's
output. The relevance of a token is the sum over channels of state × changed gradient; image tokens
make the maps, text tokens the text part, on one scale. Positive relevance speaks for the word.

The gradient goes through each operation by its rule, and the forward's numbers stay as they are. A
:class:`torch.overrides.TorchFunctionMode` sees the operations of any model while it runs, so no
family is known here. An operand counts as *variable* when it requires grad, that is when it depends
on the states whose relevance is asked for; everything else is a constant.

Not recognised are operations hidden in one fused call that is not listed here (custom kernels,
``F.multi_head_attention_forward``), and GELU written out with ``tanh``: they keep plain gradients.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor

from captum_dcam.errors import MethodError
from captum_dcam.methods.attention import (
    INVISIBLE,
    BlockMode,
    Fused,
    inside_blocks,
    is_fused,
    is_written,
)
from captum_dcam.methods.base import (
    AttributionTask,
    PerPosition,
    Replays,
    TokenValues,
    against,
    entered,
)
from captum_dcam.model.adapter import Adapter
from captum_dcam.model.norms import (
    fused_norm,
    is_fused_norm,
    is_statistic,
    variable,
    with_gradient_of,
)
from captum_dcam.model.sequence import outputs_of, padded
from captum_dcam.model.tap import wide

#: f(x) of one tensor with f(0) = 0, and the slope at 0, where f(x) / x is not defined
ACTIVATIONS = {
    "silu": 0.5,
    "silu_": 0.5,
    "gelu": 0.5,
    "mish": 0.6,  # tanh(ln 2)
    "tanh": 1.0,
    "relu": 0.0,
    "relu_": 0.0,
}
PRODUCTS = ("mul", "mul_", "multiply", "__mul__", "__rmul__", "matmul", "__matmul__", "bmm")
QUOTIENTS = ("div", "div_", "true_divide", "divide", "__truediv__")
#: a value that scales: a gate that is not zero at zero, or one over something
SCALES = ("sigmoid", "reciprocal", "__rdiv__", "__rtruediv__")


def scaled_gradient(x: Tensor, factor: float) -> Tensor:
    """The same tensor; what flows back through it is multiplied by ``factor``."""
    if not x.requires_grad:
        return x
    view = x.view_as(x)
    view.register_hook(lambda gradient: gradient * factor)
    return view


class RelevanceRules(BlockMode):
    r"""The rules that both methods have in common; subclasses add attention and gating.

    - linear maps: plain gradient (the 0-rule; biases keep their part);
    - norms: statistics are constants, which is the identity rule of a root-mean-square norm;
    - activations :math:`f`: identity rule, :math:`f(x) = x \cdot [f(x) / x]` with a constant
      bracket; ``sigmoid`` and divisors are constants;
    - products of two variables: half of the gradient to each (uniform rule).

    Attributes:
        attended (set of int): blocks whose attention was seen.
    """

    softmax_is_constant: ClassVar[bool]
    gate_is_constant: ClassVar[bool]

    def __init__(self) -> None:
        super().__init__()
        self.attended: set[int] = set()
        self._gate: Tensor | None = None  # the last activation's output

    def __torch_function__(
        self, func: Callable, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        # the final norm and the output head lie outside all blocks and have rules too
        return self.call(func, args, kwargs or {})

    def call(self, func: Callable, args: tuple, kwargs: dict) -> Any:
        name = getattr(func, "__name__", "")
        if is_fused(func):
            self._note()
            return self.attention(func, Fused(*args, **kwargs))
        if not any(variable(a) for a in args):
            result = func(*args, **kwargs)
            if is_written(func, result):
                self._note()
            return result
        if name in SCALES or is_statistic(func, args):
            return func(*args, **kwargs).detach()
        if name in ACTIVATIONS:
            self._gate = activation(func, args, kwargs, ACTIVATIONS[name])
            return self._gate
        if is_fused_norm(func):
            return fused_norm(func, *args, **kwargs)
        if name in PRODUCTS or name == "einsum":
            return self.product(func, args, kwargs)
        if name in QUOTIENTS and variable(args[1]):
            return func(args[0], args[1].detach(), *args[2:], **kwargs)
        result = func(*args, **kwargs)
        if is_written(func, result):
            self._note()
            return result.detach() if self.softmax_is_constant else result
        return result

    def _note(self) -> None:
        if self.block is not None:
            self.attended.add(self.block)

    def product(self, func: Callable, args: tuple, kwargs: dict) -> Any:
        """Uniform rule; or, where gates are constants, all to what is gated."""
        if sum(variable(a) for a in args) < 2:
            return func(*args, **kwargs)
        gate = self._gate if self.gate_is_constant else None
        if gate is not None and any(a is gate for a in args):
            return func(*(a.detach() if a is gate else a for a in args), **kwargs)
        result = func(*args, **kwargs)
        result.register_hook(lambda gradient: gradient / 2)  # a hook: in-place products work too
        return result

    def attention(self, func: Callable, call: Fused) -> Tensor:
        """Fused attention by the rules of its parts."""
        if self.softmax_is_constant:
            return call._replace(query=call.query.detach(), key=call.key.detach()).run(func)
        # two products on the way to queries and keys, one on the way to values
        return call._replace(
            query=scaled_gradient(call.query, 1 / 4),
            key=scaled_gradient(call.key, 1 / 4),
            value=scaled_gradient(call.value, 1 / 2),
        ).run(func)


class CPRules(RelevanceRules):
    """CP-LRP: attention weights are constants (Sec. 4), and so are gates."""

    softmax_is_constant = True
    gate_is_constant = True


class AttnRules(RelevanceRules):
    """AttnLRP: softmax by its Taylor expansion, which is the plain gradient (Prop. 3.1)."""

    softmax_is_constant = False
    gate_is_constant = False


def activation(func: Callable, args: tuple, kwargs: dict, slope: float) -> Tensor:
    """Identity rule: the input's relevance is the output's."""
    x, *rest = args
    with torch.no_grad():
        value = func(x.detach().clone(), *rest, **kwargs)  # a clone: it may work in place
        below = wide(x.detach())
        zero = below == 0
        ratio = wide(value) / below.masked_fill(zero, 1)
        ratio = ratio.masked_fill(zero, slope).to(x.dtype)
    return with_gradient_of(x * ratio, value)


@contextmanager
def _propagating(
    adapter: Adapter, block: int, kind: type[RelevanceRules]
) -> Iterator[list[Tensor]]:
    """Apply the rules, and make leaves of the block's outputs, which are collected."""
    rules, blocks, twins = kind(), list(adapter.blocks), adapter.step_blocks

    def leaf(hidden: Tensor, _index: int) -> Tensor:
        return hidden.detach().requires_grad_()

    with torch.enable_grad(), outputs_of({block: blocks[block]}, leaf, twins) as found:
        with inside_blocks(blocks, rules, twins):
            yield found[block]
    above = set(range(block + 1, len(blocks)))
    if found[block] and not above <= rules.attended:
        missing = min(above - rules.attended)
        raise MethodError(
            f"block {missing} ({type(blocks[missing]).__name__}) showed no attention: rules "
            "for it cannot be applied in a kernel that torch does not show; " + INVISIBLE
        )


class Relevance:
    r"""Relevance of the L tokens of a task's sequence at the output of a block.

    Args:
        task (AttributionTask): batch 1.
        block (int): whose output is read.
        rules (type): how gradients are changed.
    """

    def __init__(self, task: AttributionTask, block: int, rules: type[RelevanceRules]) -> None:
        self._task = task
        watch = partial(_propagating, task.forward.adapter, block, rules)
        self._reading = Replays(task.forward, watch)

    def state(self, position: int) -> tuple[Tensor, list[Tensor]]:
        """Logits (T, V) of the state of a response position, and the leaves (1, …, D)."""
        logits, leaves = self._reading.step(self._task.step(position))
        return logits, [*self._reading.prefix()[1], *leaves]

    def of(self, position: int, token: int, foil: int | None = None) -> Tensor:
        """(L,) relevance of every position for one token's logit, less that of its foil."""
        logits, leaves = self.state(position)
        with torch.enable_grad():
            score = against(logits[position], foil)[token]
        grads = torch.autograd.grad(score, leaves, retain_graph=True, materialize_grads=True)
        parts = zip(leaves, grads, strict=True)
        found = torch.cat([(wide(h.detach()) * wide(g)).sum(-1)[0] for h, g in parts])
        return padded(found, self._task.length) if self._task.forward.adapter.step_blocks else found


class _LRP(PerPosition):
    """Both methods; they differ in their rules alone."""

    rules: ClassVar[type[RelevanceRules]]
    block: int | None

    def _relevance(self, task: AttributionTask) -> Relevance:
        forward = task.forward
        block = forward.layer if self.block is None else forward.adapter.check_layer(self.block)
        return Relevance(task, block, self.rules)

    def check(self, task: AttributionTask) -> None:
        super().check(task)
        self._relevance(task).state(task.targets[0].positions[0] if task.targets else 0)

    def reader(self, task: AttributionTask) -> TokenValues:
        return self._relevance(task).of


@entered(
    "cp_lrp",
    "CP-LRP",
    "relevance",
    "Ali et al., ICML 2022",
    "1 + 1 back",
    "gradients",
    text=True,
    foils=True,
    own_backward=True,
)
class CPLRP(_LRP):
    r"""CP-LRP: attention weights, norm statistics and gates are constants.

    Without biases in the blocks above, the relevance of all tokens adds up to the logit.

    Args:
        block (int, optional): whose output is read. Default: the tapped block
    """

    rules: ClassVar[type[RelevanceRules]] = CPRules
    block: int | None = None


@entered(
    "attn_lrp",
    "AttnLRP",
    "relevance",
    "Achtibat et al., ICML 2024",
    "1 + 1 back",
    "gradients",
    text=True,
    foils=True,
    own_backward=True,
)
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
