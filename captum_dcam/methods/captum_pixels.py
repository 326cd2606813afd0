r"""Captum's input attributions on the pixels, averaged over the pixels of each image token.

Methods that mask pixels mask groups of image tokens at once; every token then carries the value of
its group. Pixels that belong to no token (padding) are never masked and are in no map.
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib import import_module
from typing import Any, ClassVar

import torch
from captum import attr
from torch import Tensor

from captum_dcam.errors import MethodError
from captum_dcam.methods.base import AttributionTask, MethodFacts, pooled_pixels, register_method
from captum_dcam.methods.captum_common import (
    CaptumArguments,
    CaptumMethod,
    PathMethod,
    ShapMethod,
    groups_of,
)

GROUP = "Captum, pixels"
GRADIENTS = ("gradients", "pixel tokens")
MASKS = ("pixel tokens",)


class PixelMethod(CaptumMethod):
    """Attributions like the pixels, averaged over every token's pixels and channels."""

    def build(self, case: CaptumArguments) -> Any:
        return self.algorithm(case.forward)

    def maps(self, values: Any, case: CaptumArguments) -> tuple[Tensor, ...]:
        values = values[0] if isinstance(values, tuple) else values
        return pooled_pixels(values, case.owners, case.task.shapes)


@register_method("saliency")
@dataclass(frozen=True)
class Saliency(PixelMethod):
    """Absolute value of the gradient: how much a pixel matters, not in which direction; ≥ 0."""

    algorithm: ClassVar[type] = attr.Saliency
    facts: ClassVar[MethodFacts] = MethodFacts(
        "Saliency", GROUP, "Simonyan et al., arXiv:1312.6034, §3", "1 + 1 back", GRADIENTS
    )


@register_method("input_x_gradient")
@dataclass(frozen=True)
class InputXGradient(PixelMethod):
    """Pixel times gradient, signed; a pixel at the normalisation's zero gets 0."""

    algorithm: ClassVar[type] = attr.InputXGradient
    facts: ClassVar[MethodFacts] = MethodFacts(
        "InputXGradient", GROUP, "Shrikumar et al., arXiv:1605.01713", "1 + 1 back", GRADIENTS
    )


@register_method("integrated_gradients")
@dataclass(frozen=True)
class IntegratedGradients(PathMethod, PixelMethod):
    r"""Integrated gradients, signed: (pixel − baseline) × mean gradient on the line between them.

    The maps times the number of pixels of a token add up to the fall of the logit between picture
    and baseline, up to the error of the integration.

    Args:
        steps (int): points of the Gauss–Legendre rule. Default: 16
        baseline (str): ``mean`` (the picture's mean colour) or ``zero`` (0 after normalisation).
            Default: ``"mean"``
        batch (int): so many points in one pass. Default: 4
    """

    algorithm: ClassVar[type] = attr.IntegratedGradients
    facts: ClassVar[MethodFacts] = MethodFacts(
        "IntegratedGradients",
        GROUP,
        "Sundararajan et al., ICML 2017, Eq. 1",
        "16 + 16 back",
        GRADIENTS,
    )


@register_method("gradient_shap")
@dataclass(frozen=True)
class GradientShap(ShapMethod, PixelMethod):
    r"""Expected gradients, signed: integrated gradients at random points, on noisy pictures.

    Args:
        samples (int): noisy pictures. Default: 8
        std (float): of the noise, as a fraction of the range of the pixels' values. Default: 0.1
        baseline (str): as in :class:`IntegratedGradients`. Default: ``"mean"``
        batch (int): so many samples in one pass. Default: 4
    """

    algorithm: ClassVar[type] = attr.GradientShap
    facts: ClassVar[MethodFacts] = MethodFacts(
        "GradientShap",
        GROUP,
        "Lundberg & Lee, NeurIPS 2017; Captum",
        "8 + 8 back",
        GRADIENTS,
        stochastic=True,
    )


@dataclass(frozen=True)
class _Masked(PixelMethod):
    """Masks groups of ``patch`` tokens a side."""

    patch: int = 4
    baseline: str = "mean"
    batch: int = 4

    def call(self, case: CaptumArguments) -> dict[str, Any]:
        return {
            **super().call(case),
            "feature_mask": feature_mask(case, self.patch),
            "baselines": self.emptied(case),
            "perturbations_per_eval": self.batch,
        }


def feature_mask(case: CaptumArguments, patch: int) -> Tensor:
    """Group of every pixel, numbered without gaps; that of a pixel without token means nothing."""
    owners = case.owners
    inside = owners >= 0
    groups = groups_of(case.task.shapes, patch).to(owners.device)[owners.clamp_min(0)]
    numbers = groups[inside].unique(return_inverse=True)[1]
    return torch.zeros_like(owners).masked_scatter(inside, numbers)


@register_method("feature_ablation")
@dataclass(frozen=True)
class FeatureAblation(_Masked):
    r"""Fall of the logit when a group of tokens' pixels is painted over.

    Args:
        patch (int): tokens a side of a group; groups at the edges may be smaller. Default: 4
        baseline (str): paint: ``mean`` (the picture's mean colour) or ``zero``.
            Default: ``"mean"``
        batch (int): so many ablations in one pass. Default: 4
    """

    algorithm: ClassVar[type] = attr.FeatureAblation
    facts: ClassVar[MethodFacts] = MethodFacts(
        "FeatureAblation",
        GROUP,
        "Zeiler & Fergus, ECCV 2014; Captum",
        "1 + groups (36)",
        MASKS,
        expensive=True,
    )


@register_method("shapley_value_sampling")
@dataclass(frozen=True)
class ShapleyValueSampling(_Masked):
    r"""Shapley values of the groups from random permutations.

    The groups' values add up to the fall of the logit between picture and baseline.

    Args:
        permutations (int): how many. Default: 2
        patch, baseline, batch: as in :class:`FeatureAblation`.
    """

    permutations: int = 2

    algorithm: ClassVar[type] = attr.ShapleyValueSampling
    facts: ClassVar[MethodFacts] = MethodFacts(
        "ShapleyValueSampling",
        GROUP,
        "Castro et al., Computers & OR 2009; Štrumbelj & Kononenko, JMLR 2010",
        "1 + 2 × groups (36)",
        MASKS,
        stochastic=True,
        expensive=True,
    )

    def values(self, case: CaptumArguments) -> Any:
        # Captum walks over a feature mask element by element in Python, once a permutation; so it
        # gets one number a group instead: 1 shows the group's pixels, 0 the baseline's.
        mask, empty = feature_mask(case, self.patch), self.emptied(case)

        def forward(shown: Tensor, *arguments: Tensor) -> Tensor:
            return case.forward(torch.where(shown[:, mask[0]] > 0, case.pixels, empty), *arguments)

        found = self.algorithm(forward).attribute(
            case.pixels.new_ones(1, int(mask.max()) + 1),
            target=case.target,
            additional_forward_args=case.arguments,
            n_samples=self.permutations,
            perturbations_per_eval=self.batch,
        )
        return found[:, mask[0]]


@dataclass(frozen=True)
class _Surrogate(_Masked):
    """Fits a linear model to the logit of pictures with random groups masked."""

    samples: int = 72

    def check(self, task: AttributionTask) -> None:
        super().check(task)
        try:
            import_module("sklearn")
        except ImportError as error:
            raise MethodError(
                f"{self.name} fits its linear model with scikit-learn, which cannot be imported "
                f"({error}): pip install scikit-learn"
            ) from error
        count = int(groups_of(task.shapes, self.patch).max()) + 1
        if count < 2:
            raise MethodError(
                f"patch {self.patch} makes one group of the whole grid {task.shapes}: "
                f"{self.name} needs two or more, choose a smaller patch"
            )

    def call(self, case: CaptumArguments) -> dict[str, Any]:
        return {**super().call(case), "n_samples": self.samples}


@register_method("kernel_shap")
@dataclass(frozen=True)
class KernelShap(_Surrogate):
    r"""Shapley values of the groups from a weighted linear regression.

    The groups' values add up to the fall of the logit between picture and baseline.

    Args:
        samples (int): masked pictures; with fewer than groups the fit is not unique. Default: 72
        patch, baseline, batch: as in :class:`FeatureAblation`.
    """

    algorithm: ClassVar[type] = attr.KernelShap
    facts: ClassVar[MethodFacts] = MethodFacts(
        "KernelShap",
        GROUP,
        "Lundberg & Lee, NeurIPS 2017, Theorem 2",
        "72",
        MASKS,
        stochastic=True,
        expensive=True,
    )


@register_method("lime")
@dataclass(frozen=True)
class Lime(_Surrogate):
    r"""Coefficients of a sparse linear model near the picture.

    Args:
        samples (int): masked pictures. Default: 72
        alpha (float): weight of the Lasso's penalty; groups below it get 0. Default: 0.01
        patch, baseline, batch: as in :class:`FeatureAblation`.
    """

    alpha: float = 0.01

    algorithm: ClassVar[type] = attr.Lime
    facts: ClassVar[MethodFacts] = MethodFacts(
        "LIME",
        GROUP,
        "Ribeiro et al., KDD 2016, Eq. 1–2",
        "72",
        MASKS,
        stochastic=True,
        expensive=True,
    )

    def build(self, case: CaptumArguments) -> Any:
        from captum._utils.models.linear_model import SkLearnLasso

        return attr.Lime(case.forward, interpretable_model=SkLearnLasso(alpha=self.alpha))
