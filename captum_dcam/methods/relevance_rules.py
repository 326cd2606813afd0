r"""Rules of layer-wise relevance propagation as a changed backward, the forward's numbers kept.

Relevance is hidden state × gradient, where the gradient goes through each operation by its rule. A
:class:`torch.overrides.TorchFunctionMode` sees the operations of any model while it runs, so no
family is known here. An operand counts as *variable* when it requires grad, that is when it depends
on the states whose relevance is asked for; everything else is a constant.

Not recognised are operations hidden in one fused call that is not listed here (custom kernels,
``F.multi_head_attention_forward``), and GELU written out with ``tanh``: they keep plain gradients.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor

from captum_dcam.methods.attention_calls import BlockMode, Fused, is_fused, is_written, wide

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
#: a value that scales: the statistic of a norm, or a gate that is not zero at zero
SCALES = ("rsqrt", "sqrt", "sigmoid", "reciprocal", "__rdiv__", "__rtruediv__", "vector_norm")


class _With(torch.autograd.Function):
    """A value with the gradient of something else."""

    @staticmethod
    def forward(_ctx: Any, _like: Tensor, value: Tensor) -> Tensor:
        return value.view_as(value)

    @staticmethod
    def backward(_ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return gradients[0], None


def with_gradient_of(like: Tensor, value: Tensor) -> Tensor:
    """``value``, bit for bit, whose gradient goes where that of ``like`` goes."""
    return _With.apply(like, value.detach())


def scaled_gradient(x: Tensor, factor: float) -> Tensor:
    """The same tensor; what flows back through it is multiplied by ``factor``."""
    if not x.requires_grad:
        return x
    view = x.view_as(x)
    view.register_hook(lambda gradient: gradient * factor)
    return view


def variable(x: Any) -> bool:
    """Whether a value depends on the states whose relevance is asked for."""
    return isinstance(x, Tensor) and x.requires_grad and torch.is_grad_enabled()


class RelevanceRules(BlockMode):
    r"""The rules that both methods share; subclasses add attention and gating.

    - linear maps: plain gradient (the 0-rule; biases keep their share);
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
        if name in SCALES or (name == "pow" and args[1] in (0.5, -0.5)):
            return func(*args, **kwargs).detach()
        if name in ACTIVATIONS:
            self._gate = activation(func, args, kwargs, ACTIVATIONS[name])
            return self._gate
        if name in ("rms_norm", "layer_norm"):
            return norm(func, *args, **kwargs)
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
        if self.gate_is_constant and self._gate is not None:
            held = tuple(a.detach() if a is self._gate else a for a in args)
            if any(a is self._gate for a in args):
                return func(*held, **kwargs)
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


def norm(
    func: Callable,
    x: Tensor,
    normalized_shape: Any,
    weight: Tensor | None = None,
    *rest: Any,
    **kwargs: Any,
) -> Tensor:
    """``rms_norm`` or ``layer_norm`` with a constant statistic; centring stays linear."""
    with torch.no_grad():
        value = func(x.detach(), normalized_shape, weight, *rest, **kwargs)
    dims = tuple(range(-len(tuple(normalized_shape)), 0))
    with torch.enable_grad():
        layer = func.__name__ == "layer_norm"
        centred = wide(x) - wide(x).mean(dims, keepdim=True) if layer else wide(x)
        eps = _eps(layer, rest, kwargs, centred.dtype)
        scale = torch.rsqrt(centred.detach().square().mean(dims, keepdim=True) + eps)
        linear = centred * scale * (1 if weight is None else weight)
    return with_gradient_of(linear.to(value.dtype), value)


def _eps(layer: bool, rest: tuple, kwargs: dict, dtype: torch.dtype) -> float:
    """The norm's ε as torch takes it: after the bias in ``layer_norm``, and with its defaults."""
    position = 1 if layer else 0
    given = rest[position] if len(rest) > position else kwargs.get("eps", 1e-5 if layer else None)
    return torch.finfo(dtype).eps if given is None else given
