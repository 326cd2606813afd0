r"""How a gradient passes through normalisation layers: exactly, or with their statistics constant.

Every read of a pre-norm transformer's residual stream passes a norm, which is blind to the length
of a token's state. So by Euler's theorem the exact gradient of a logit is orthogonal to the state
where the next block alone reads it, and nearly so further below: gradient × state is what rounding
and later blocks leave. With the mean square (RMSNorm) or variance (LayerNorm) held constant in the
backward pass, gradient × state tells what a state contributes. It is the identity rule of AttnLRP
(Achtibat et al., ICML 2024, Prop. 3.4) and Ali et al. (ICML 2022, Sec. 4), used alone.

The forward's numbers stay as they are, bit for bit. A torch function mode sees the operations of
any model that runs in the same thread while a context is open, so no family is known here, no
module is changed and nothing is left behind.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from captum_dcam import checks
from captum_dcam.errors import MethodError
from captum_dcam.model.tap import wide

#: how gradients pass through norms
BACKWARDS = ("exact", "constant_norms")
#: functions whose result is the statistic of a norm that is written out
_STATISTICS = ("rsqrt", "sqrt", "std", "norm", "vector_norm", "linalg_vector_norm")
_FUSED = ("rms_norm", "layer_norm")


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


def variable(x: Any) -> bool:
    """Whether a value depends on what is differentiated."""
    return isinstance(x, Tensor) and x.requires_grad and torch.is_grad_enabled()


def is_statistic(func: Callable, args: tuple) -> bool:
    """Whether a torch function makes the statistic of a norm that is written out."""
    name = getattr(func, "__name__", "")
    return name in _STATISTICS or (
        name in ("pow", "__pow__") and isinstance(args[1], float | int) and abs(args[1]) == 0.5
    )


def is_fused_norm(func: Callable) -> bool:
    """Whether a torch function is a whole norm, statistics and all."""
    return getattr(func, "__name__", "") in _FUSED


def fused_norm(
    func: Callable,
    input: Tensor,  # as torch calls it
    normalized_shape: Any,
    weight: Tensor | None = None,
    *rest: Any,
    **kwargs: Any,
) -> Tensor:
    """``rms_norm`` or ``layer_norm`` with a constant statistic; centring stays linear."""
    with torch.no_grad():
        value = func(input.detach(), normalized_shape, weight, *rest, **kwargs)
    dims = tuple(range(-len(tuple(normalized_shape)), 0))
    with torch.enable_grad():
        layer = func.__name__ == "layer_norm"
        full = wide(input)  # once: its gradient is rounded once
        centred = full - full.mean(dims, keepdim=True) if layer else full
        # ε as torch takes it: after the bias in layer_norm, and with its defaults
        position = 1 if layer else 0
        given = (
            rest[position] if len(rest) > position else kwargs.get("eps", 1e-5 if layer else None)
        )
        eps = torch.finfo(centred.dtype).eps if given is None else given
        scale = torch.rsqrt(centred.detach().square().mean(dims, keepdim=True) + eps)
        linear = centred * scale * (1 if weight is None else weight)
    return with_gradient_of(linear.to(value.dtype), value)


class _ConstantNorms(TorchFunctionMode):
    """Holds statistics constant, and counts them."""

    def __init__(self) -> None:
        super().__init__()
        self.held = 0

    def __torch_function__(
        self, func: Callable, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if is_fused_norm(func):
            if variable(args[0] if args else kwargs["input"]):
                self.held += 1
                return fused_norm(func, *args, **kwargs)
        elif is_statistic(func, args) and variable(args[0]):
            self.held += 1
            return func(*args, **kwargs).detach()
        return func(*args, **kwargs)


@contextmanager
def constant_norms() -> Iterator[None]:
    r"""The statistics of norms that run in the context are constants when it is differentiated.

    For LayerNorm and RMSNorm, as torch's fused functions or written out with ``sqrt``, ``rsqrt``,
    ``std`` or a power of ±½; every square root of a variable counts as a statistic. Open it around
    the forward pass of whatever differentiates: this library's methods, or Captum's and
    pytorch-grad-cam's.

    Raises:
        MethodError: on leaving, where gradients were recorded and no norm was seen.

    Examples::

        >>> from captum.attr import LayerGradCam
        >>> from captum_dcam.data.scenes import make_scene
        >>> from captum_dcam.model.forward import DenoisingForward
        >>> adapter = captum_dcam.load("mini")
        >>> forward = DenoisingForward(adapter)
        >>> image = make_scene(0, 3).image
        >>> trajectory = forward.generate(adapter.prepare([[image]], ["describe the image ."]))
        >>> target = (1, int(trajectory.tokens[0, 1]))
        >>> cam, arguments = LayerGradCam(forward, forward.tap), forward.arguments(target)
        >>> with constant_norms():
        ...     maps = cam.attribute(forward.request.pixels, target, arguments)
        >>> maps.shape
        torch.Size([1, 1, 24, 24])
    """
    mode = _ConstantNorms()
    with mode:
        yield
    if not mode.held:
        raise MethodError(
            "no norm was seen whose statistics could be held constant: nothing was "
            "differentiated, or the model's norms run in a kernel that torch does not show (a "
            "fused one of another package, a compiled module); load the model without it, or use "
            'backward="exact"'
        )


@contextmanager
def passing(backward: str) -> Iterator[None]:
    """The context of a way through norms: ``exact`` is none."""
    checks.choice("backward", backward, BACKWARDS)
    if backward == "exact":
        yield
    else:
        with constant_norms():
            yield
