r"""Captum's layer attributions on ``(forward, forward.tap)``.

Where Captum gives a value for every channel of an image token, the map is their sum.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from captum import attr
from torch import Tensor

from captum_dcam.errors import InputError
from captum_dcam.methods.base import AttributionTask, MethodFacts, register_method
from captum_dcam.methods.captum_common import (
    CaptumArguments,
    CaptumMethod,
    PathMethod,
    ShapMethod,
    check_baseline,
    groups_of,
)
from captum_dcam.model.sequence import split_grids

_GROUP = "Captum, layer"


class _Layer(CaptumMethod):
    """Attributions (1, D, h, w) of the tapped block, one a grid, summed over channels."""

    def build(self, case: CaptumArguments) -> Any:
        return self.algorithm(case.forward, case.tap)

    def maps(self, values: Any, case: CaptumArguments) -> tuple[Tensor, ...]:
        values = values if isinstance(values, tuple) else (values,)
        return tuple(v.detach()[0].float().sum(0) for v in values)

    def check(self, task: AttributionTask) -> None:
        super().check(task)
        check_baseline(task, getattr(self, "baseline", "zero"))


@register_method("layer_grad_cam")
@dataclass(frozen=True)
class LayerGradCam(_Layer):
    """Grad-CAM: spatially averaged gradients weigh the channels; signed, without the ReLU.

    Several grids each have weights of their own.
    """

    algorithm: ClassVar[type] = attr.LayerGradCam
    facts: ClassVar[MethodFacts] = MethodFacts(
        "LayerGradCam", _GROUP, "Selvaraju et al., ICCV 2017, Eq. 1–2", "1 + 1 back", ("gradients",)
    )

    def call(self, case: CaptumArguments) -> dict[str, Any]:
        return {**super().call(case), "relu_attributions": False}


@register_method("layer_activation")
@dataclass(frozen=True)
class LayerActivation(_Layer):
    """The activation itself: the same map for all words that are read at the same step."""

    algorithm: ClassVar[type] = attr.LayerActivation
    facts: ClassVar[MethodFacts] = MethodFacts(
        "LayerActivation", _GROUP, "Captum", "1", target_blind=True
    )

    def call(self, case: CaptumArguments) -> dict[str, Any]:
        return {"additional_forward_args": case.arguments}


@register_method("layer_gradient_x_activation")
@dataclass(frozen=True)
class LayerGradientXActivation(_Layer):
    """Gradient times activation, at every position."""

    algorithm: ClassVar[type] = attr.LayerGradientXActivation
    facts: ClassVar[MethodFacts] = MethodFacts(
        "LayerGradientXActivation",
        _GROUP,
        "Shrikumar et al., arXiv:1605.01713",
        "1 + 1 back",
        ("gradients",),
    )


@dataclass(frozen=True)
class _Path(PathMethod, _Layer):
    baseline: str = "zero"


@register_method("layer_integrated_gradients")
@dataclass(frozen=True)
class LayerIntegratedGradients(_Path):
    r"""Integrated gradients of the activations, from those of the baseline picture.

    The line is drawn between activations, so the maps of all grids add up to the fall of the logit
    when the image tokens are replaced by the baseline's, up to the error of the integration.

    Args:
        steps (int): points of the Gauss–Legendre rule. Default: 16
        baseline (str): picture whose activations stand for "nothing": ``zero`` (0 after
            normalisation) or ``mean`` (mean colour; needs pixel tokens). Default: ``"zero"``
        batch (int): so many points in one pass. Default: 4
    """

    algorithm: ClassVar[type] = attr.LayerIntegratedGradients
    facts: ClassVar[MethodFacts] = MethodFacts(
        "LayerIntegratedGradients",
        _GROUP,
        "Sundararajan et al., ICML 2017, Eq. 1",
        "18 + 16 back",
        ("gradients",),
    )


@register_method("internal_influence")
@dataclass(frozen=True)
class InternalInfluence(_Path):
    r"""Mean gradient of the activations along a line of pictures; not multiplied by anything.

    Args:
        steps, baseline, batch: as in :class:`LayerIntegratedGradients`; the line is drawn between
            pictures.
    """

    algorithm: ClassVar[type] = attr.InternalInfluence
    facts: ClassVar[MethodFacts] = MethodFacts(
        "InternalInfluence",
        _GROUP,
        "Leino et al., ITC 2018, Def. 1",
        "16 + 16 back",
        ("gradients",),
    )


@register_method("layer_conductance")
@dataclass(frozen=True)
class LayerConductance(_Path):
    r"""Flow of integrated gradients through the activations along a line of pictures.

    The maps of all grids add up to the fall of the logit between picture and baseline, as far as it
    passes through the image tokens and up to the error of the integration.

    Args:
        steps, baseline, batch: as in :class:`LayerIntegratedGradients`; the line is drawn between
            pictures.
    """

    algorithm: ClassVar[type] = attr.LayerConductance
    facts: ClassVar[MethodFacts] = MethodFacts(
        "LayerConductance",
        _GROUP,
        "Dhamdhere et al., ICLR 2019, Eq. 3",
        "22 + 22 back",
        ("gradients",),
    )

    def call(self, case: CaptumArguments) -> dict[str, Any]:
        # Two neighbours on the line make one difference; parts of the line share a point.
        return {**super().call(case), "internal_batch_size": max(2, self.batch)}


@register_method("layer_gradient_shap")
@dataclass(frozen=True)
class LayerGradientShap(ShapMethod, _Layer):
    r"""Mean of gradient × (activation − baseline's) over noisy pictures.

    Args:
        samples (int): noisy pictures. Default: 8
        std (float): of the noise, as a fraction of the range of the pixels' values. Default: 0.1
        baseline (str): as in :class:`LayerIntegratedGradients`. Default: ``"zero"``
        batch (int): so many samples in one pass. Default: 4
    """

    baseline: str = "zero"

    algorithm: ClassVar[type] = attr.LayerGradientShap
    facts: ClassVar[MethodFacts] = MethodFacts(
        "LayerGradientShap",
        _GROUP,
        "Lundberg & Lee, NeurIPS 2017; Captum",
        "24 + 8 back",
        ("gradients",),
        stochastic=True,
    )


@register_method("layer_feature_ablation")
@dataclass(frozen=True)
class LayerFeatureAblation(_Layer):
    r"""Fall of the logit when a group of image tokens is replaced at the tapped block.

    Every token carries the value of its group.

    Args:
        patch (int): tokens a side of a group; groups at the edges may be smaller. Default: 4
        fill (str): what a token becomes: ``mean`` (of its grid's tokens) or ``zero``.
            Default: ``"mean"``
        batch (int): so many ablations in one pass. Default: 4
    """

    patch: int = 4
    fill: str = "mean"
    batch: int = 4

    algorithm: ClassVar[type] = attr.LayerFeatureAblation
    facts: ClassVar[MethodFacts] = MethodFacts(
        "LayerFeatureAblation",
        _GROUP,
        "Zeiler & Fergus, ECCV 2014; Captum",
        "2 + groups (36)",
        expensive=True,
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.fill not in ("mean", "zero"):
            raise InputError(f"fill is {self.fill!r}: expected one of ('mean', 'zero')")

    def call(self, case: CaptumArguments) -> dict[str, Any]:
        groups = groups_of(case.task.shapes, self.patch).to(case.pixels.device)
        masks = tuple(m[None, None] for m in split_grids(groups, case.task.forward))
        return {
            **super().call(case),
            "layer_mask": masks,
            "layer_baselines": self._fill(case),
            "perturbations_per_eval": self.batch,
        }

    def _fill(self, case: CaptumArguments) -> tuple[Any, ...]:
        if self.fill == "zero":
            return (0,) * len(case.task.shapes)
        features = attr.LayerActivation(case.forward, case.tap).attribute(
            case.pixels, additional_forward_args=case.arguments
        )
        features = features if isinstance(features, tuple) else (features,)
        return tuple(f.mean((-2, -1), keepdim=True).expand_as(f) for f in features)

    def maps(self, values: Any, case: CaptumArguments) -> tuple[Tensor, ...]:
        values = values if isinstance(values, tuple) else (values,)
        return tuple(v.detach()[0, 0].float() for v in values)  # all channels carry the same
