r"""Captum's NoiseTunnel around its gradient methods."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import ClassVar

from captum import attr
from torch import Tensor

from captum_dcam.errors import InputError
from captum_dcam.methods.base import (
    METHODS,
    AttributionTask,
    MethodFacts,
    PerToken,
    method,
    register_method,
    seeded,
)
from captum_dcam.methods.captum_common import CaptumMethod, case_of, check_settings, spread

KINDS = ("smoothgrad", "smoothgrad_sq", "vargrad")


def bases() -> tuple[str, ...]:
    """Names of the methods that a tunnel can be built around: Captum's gradient methods.

    Not those that are tunnels themselves (GradientShap): both would want the setting ``stdevs``.
    """
    return tuple(
        sorted(
            name
            for name, cls in METHODS.items()
            if issubclass(cls, CaptumMethod) and cls.by_gradient() and not cls.facts.stochastic
        )
    )


@register_method("noise_tunnel")
@dataclass(frozen=True)
class NoiseTunnel(PerToken):
    r"""Mean, mean square or variance of a method's attributions over noisy pictures.

    ``smoothgrad_sq`` and ``vargrad`` are taken of every single attribution (pixel or channel)
    before they are gathered into a map: ≥ 0, in the square of the logit's unit.

    Args:
        base (str): one of :func:`bases`, with its default settings.
            Default: ``"input_x_gradient"``
        samples (int): noisy pictures. Default: 8
        std (float): of the noise, as a fraction of the range of the pixels' values. Default: 0.1
        kind (str): ``smoothgrad``, ``smoothgrad_sq`` or ``vargrad``. Default: ``"smoothgrad"``
        batch (int): so many noisy pictures in one pass. Default: 4
    """

    base: str = "input_x_gradient"
    samples: int = 8
    std: float = 0.1
    kind: str = "smoothgrad"
    batch: int = 4

    facts: ClassVar[MethodFacts] = MethodFacts(
        "NoiseTunnel (SmoothGrad)",
        "Captum, pixels",
        "Smilkov et al., arXiv:1706.03825; Adebayo et al., arXiv:1810.03307",
        "8 + 8 back",
        ("gradients", "pixel tokens"),
        stochastic=True,
    )

    def __post_init__(self) -> None:
        if self.base not in bases():
            raise InputError(f"base is {self.base!r}: expected one of {', '.join(bases())}")
        if self.kind not in KINDS:
            raise InputError(f"kind is {self.kind!r}: expected one of {KINDS}")
        check_settings(self)
        if self.kind == "vargrad" and self.samples < 2:
            raise InputError("samples is 1: a variance needs at least 2")

    @property
    def inner(self) -> CaptumMethod:
        """The base as a method."""
        own = {"batch": self.batch} if self._batched else {}
        found = method(self.base, **own)
        assert isinstance(found, CaptumMethod)
        return found

    @property
    def _batched(self) -> bool:
        """Whether the base runs several pictures in one pass itself."""
        return any(f.name == "batch" for f in fields(METHODS[self.base]))  # type: ignore[arg-type]

    def check(self, task: AttributionTask) -> None:
        self.inner.check(task)  # a layer method needs no pixel tokens

    def token(self, task: AttributionTask, position: int, token: int) -> tuple[Tensor, ...]:
        inner, case = self.inner, case_of(task, position, token)
        with seeded(task.generator):
            values = attr.NoiseTunnel(inner.build(case)).attribute(
                case.pixels,
                nt_type=self.kind,
                nt_samples=self.samples,
                nt_samples_batch_size=1 if self._batched else min(self.batch, self.samples),
                stdevs=spread(case, self.std),
                **inner.call(case),
            )
        return inner.maps(values, case)
