r"""Captum's layer attributions on ``(forward, forward.tap)``.

Where Captum gives a value for every channel of an image token, the map is their sum.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from captum import attr
from torch import Tensor

from captum_dcam.methods.base import AttributionTask, check_choices
from captum_dcam.methods.captum_common import (
    CaptumArguments,
    CaptumMethod,
    PathMethod,
    ShapMethod,
    as_tuple,
    captum_method,
    groups_of,
    pixel_owners,
)
from captum_dcam.model.sequence import split_grids


class _Layer(CaptumMethod):
    """Attributions (1, D, h, w) of the tapped block, one per grid, summed over channels."""

    group: ClassVar[str] = "Captum, layer"

    def build(self, case: CaptumArguments) -> Any:
        return self.algorithm(case.forward, case.task.forward.tap)

    def maps(self, values: Any, case: CaptumArguments) -> tuple[Tensor, ...]:
        return tuple(v.detach()[0].float().sum(0) for v in as_tuple(values))

    def check(self, task: AttributionTask) -> None:
        super().check(task)
        if getattr(self, "baseline", "zero") == "mean":
            pixel_owners(task)  # the mean colour is that of pixels whose token is known


@captum_method(
    "layer_grad_cam", attr.LayerGradCam, "Selvaraju et al., ICCV 2017, Eq. 1–2", "1 + 1 back"
)
class LayerGradCam(_Layer):
    """Grad-CAM: spatially averaged gradients weigh the channels; signed, without the ReLU.

    Several grids each have weights of their own.
    """

    def call(self, case: CaptumArguments) -> dict[str, Any]:
        return super().call(case) | {"relu_attributions": False}


@captum_method("layer_activation", attr.LayerActivation, "Captum", "1", target_blind=True)
class LayerActivation(_Layer):
    """The activation itself: the same map for all words that are read at the same step."""

    def call(self, case: CaptumArguments) -> dict[str, Any]:
        return {"additional_forward_args": case.arguments}


@captum_method(
    "layer_gradient_x_activation",
    attr.LayerGradientXActivation,
    "Shrikumar et al., arXiv:1605.01713",
    "1 + 1 back",
)
class LayerGradientXActivation(_Layer):
    """Gradient times activation, at every position."""


@dataclass(frozen=True)
class _Path(PathMethod, _Layer):
    baseline: str = "zero"


@captum_method(
    "layer_integrated_gradients",
    attr.LayerIntegratedGradients,
    "Sundararajan et al., ICML 2017, Eq. 1",
    "18 + 16 back",
)
class LayerIntegratedGradients(_Path):
    r"""Integrated gradients of the activations, from those of the baseline image.

    The line is drawn between activations, so the maps of all grids add up to the fall of the logit
    when the image tokens are replaced by the baseline's, up to the error of the integration.

    Args:
        steps (int): points of the Gauss–Legendre rule. Default: 16
        baseline (str): image whose activations stand for "nothing": ``zero`` (0 after
            normalisation) or ``mean`` (mean colour; needs pixel tokens). Default: ``"zero"``
        batch (int): number of points per pass. Default: 4
    """


@captum_method(
    "internal_influence", attr.InternalInfluence, "Leino et al., ITC 2018, Def. 1", "16 + 16 back"
)
class InternalInfluence(_Path):
    r"""Mean gradient of the activations along a line of images; not multiplied by anything.

    Args:
        steps, baseline, batch: as in :class:`LayerIntegratedGradients`; the line is drawn between
            images.
    """


@captum_method(
    "layer_conductance", attr.LayerConductance, "Dhamdhere et al., ICLR 2019, Eq. 3", "22 + 22 back"
)
class LayerConductance(_Path):
    r"""Flow of integrated gradients through the activations along a line of images.

    The maps of all grids add up to the fall of the logit between image and baseline, as far as it
    passes through the image tokens and up to the error of the integration.

    Args:
        steps, baseline, batch: as in :class:`LayerIntegratedGradients`; the line is drawn between
            images.
    """

    def call(self, case: CaptumArguments) -> dict[str, Any]:
        # Two neighbours on the line make one difference; parts of the line share a point.
        return super().call(case) | {"internal_batch_size": max(2, self.batch)}


@captum_method(
    "layer_gradient_shap",
    attr.LayerGradientShap,
    "Lundberg & Lee, NeurIPS 2017; Captum",
    "24 + 8 back",
    stochastic=True,
)
class LayerGradientShap(ShapMethod, _Layer):
    r"""Mean of gradient × (activation − baseline's) over noisy images.

    Args:
        samples (int): noisy images. Default: 8
        std (float): of the noise, as a fraction of the range of the pixels' values. Default: 0.1
        baseline (str): as in :class:`LayerIntegratedGradients`. Default: ``"zero"``
        batch (int): number of samples per pass. Default: 4
    """

    baseline: str = "zero"


@captum_method(
    "layer_feature_ablation",
    attr.LayerFeatureAblation,
    "Zeiler & Fergus, ECCV 2014; Captum",
    "2 + groups (36)",
    expensive=True,
)
class LayerFeatureAblation(_Layer):
    r"""Fall of the logit when a group of image tokens is replaced at the tapped block.

    Every token carries the value of its group.

    Args:
        patch (int): tokens per side of a group; groups at the edges may be smaller. Default: 4
        fill (str): what a token becomes: ``mean`` (of its grid's tokens) or ``zero``.
            Default: ``"mean"``
        batch (int): number of ablations per pass. Default: 4
    """

    patch: int = 4
    fill: str = "mean"
    batch: int = 4

    passed: ClassVar[dict[str, str]] = {"batch": "perturbations_per_eval"}

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choices(self, fill=("mean", "zero"))

    def call(self, case: CaptumArguments) -> dict[str, Any]:
        groups = groups_of(case.task.shapes, self.patch).to(case.pixels.device)
        masks = tuple(m[None, None] for m in split_grids(groups, case.task.forward))
        return super().call(case) | {"layer_mask": masks, "layer_baselines": self._fill(case)}

    def _fill(self, case: CaptumArguments) -> tuple[Any, ...]:
        if self.fill == "zero":
            return (0,) * len(case.task.shapes)
        features = attr.LayerActivation(case.forward, case.task.forward.tap).attribute(
            case.pixels, additional_forward_args=case.arguments
        )
        return tuple(f.mean((-2, -1), keepdim=True).expand_as(f) for f in as_tuple(features))

    def maps(self, values: Any, case: CaptumArguments) -> tuple[Tensor, ...]:
        return tuple(v.detach()[0, 0].float() for v in as_tuple(values))  # all channels are alike
