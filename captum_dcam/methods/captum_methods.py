r"""Captum's attributions: of the tapped block, and of the pixels of each image token.

Layer attributions run on ``(forward, forward.tap)``. Where Captum gives a value for every channel
of an image token, the map is their sum. Attributions of pixels are averaged over the pixels of each
image token.

Methods that mask pixels mask groups of image tokens at once; every token then carries the value of
its group. Pixels that belong to no token (padding) are never masked and are in no map.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from captum import attr
from torch import Tensor

from captum_dcam.errors import InputError, MethodError
from captum_dcam.methods.base import (
    METHODS,
    AttributionTask,
    PerToken,
    check_choices,
    entered,
    method,
    pooled_pixels,
    seeded,
)
from captum_dcam.methods.captum_common import (
    CaptumArguments,
    CaptumMethod,
    PathMethod,
    ShapMethod,
    as_tuple,
    attributed,
    captum_method,
    check_settings,
    groups_of,
    pixel_owners,
    spread,
    token_size,
)
from captum_dcam.model.sequence import split_grids

#: what a noise tunnel makes of attributions over noisy images
TUNNELS = ("smoothgrad", "smoothgrad_sq", "vargrad")

# -- the tapped block ----------------------------------------------------------------------------


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
        features = attributed(
            attr.LayerActivation(case.forward, case.task.forward.tap),
            case.pixels,
            additional_forward_args=case.arguments,
        )
        return tuple(f.mean((-2, -1), keepdim=True).expand_as(f) for f in as_tuple(features))

    def maps(self, values: Any, case: CaptumArguments) -> tuple[Tensor, ...]:
        return tuple(v.detach()[0, 0].float() for v in as_tuple(values))  # all channels are alike


# -- pixels --------------------------------------------------------------------------------------


class _Pixels(CaptumMethod):
    """Attributions like the pixels, averaged over every token's pixels and channels."""

    group: ClassVar[str] = "Captum, pixels"
    reads: ClassVar[tuple[str, ...]] = ("pixel tokens",)

    def maps(self, values: Any, case: CaptumArguments) -> tuple[Tensor, ...]:
        return pooled_pixels(as_tuple(values)[0], case.owners, case.task.shapes)


@captum_method("saliency", attr.Saliency, "Simonyan et al., arXiv:1312.6034, §3", "1 + 1 back")
class Saliency(_Pixels):
    """Absolute value of the gradient: how much a pixel matters, not in which direction; ≥ 0."""


@captum_method(
    "input_x_gradient", attr.InputXGradient, "Shrikumar et al., arXiv:1605.01713", "1 + 1 back"
)
class InputXGradient(_Pixels):
    """Pixel times gradient, signed; a pixel at the normalisation's zero gets 0."""


@captum_method(
    "integrated_gradients",
    attr.IntegratedGradients,
    "Sundararajan et al., ICML 2017, Eq. 1",
    "16 + 16 back",
)
class IntegratedGradients(PathMethod, _Pixels):
    r"""Integrated gradients, signed: (pixel − baseline) × mean gradient on the line between them.

    The maps times the number of pixels of a token add up to the fall of the logit between image
    and baseline, up to the error of the integration.

    Args:
        steps (int): points of the Gauss–Legendre rule. Default: 16
        baseline (str): ``mean`` (the image's mean colour) or ``zero`` (0 after normalisation).
            Default: ``"mean"``
        batch (int): number of points per pass. Default: 4
    """


@captum_method(
    "gradient_shap",
    attr.GradientShap,
    "Lundberg & Lee, NeurIPS 2017; Captum",
    "8 + 8 back",
    stochastic=True,
)
class GradientShap(ShapMethod, _Pixels):
    r"""Expected gradients, signed: integrated gradients at random points, on noisy images.

    Args:
        samples (int): noisy images. Default: 8
        std (float): of the noise, as a fraction of the range of the pixels' values. Default: 0.1
        baseline (str): as in :class:`IntegratedGradients`. Default: ``"mean"``
        batch (int): number of samples per pass. Default: 4
    """


@dataclass(frozen=True)
class _Masked(_Pixels):
    """Masks groups of ``patch`` tokens per side."""

    patch: int = 4
    baseline: str = "mean"
    batch: int = 4

    passed: ClassVar[dict[str, str]] = {"batch": "perturbations_per_eval"}

    def call(self, case: CaptumArguments) -> dict[str, Any]:
        return super().call(case) | {"feature_mask": feature_mask(case, self.patch)}


def feature_mask(case: CaptumArguments, patch: int) -> Tensor:
    """Group of every pixel, numbered without gaps; that of a pixel without token means nothing."""
    owners = case.owners
    inside = owners >= 0
    groups = groups_of(case.task.shapes, patch).to(owners.device)[owners.clamp_min(0)]
    numbers = groups[inside].unique(return_inverse=True)[1]
    return torch.zeros_like(owners).masked_scatter(inside, numbers)


@captum_method(
    "feature_ablation",
    attr.FeatureAblation,
    "Zeiler & Fergus, ECCV 2014; Captum",
    "1 + groups (36)",
    expensive=True,
)
class FeatureAblation(_Masked):
    r"""Fall of the logit when a group of tokens' pixels is painted over.

    Args:
        patch (int): tokens per side of a group; groups at the edges may be smaller. Default: 4
        baseline (str): paint: ``mean`` (the image's mean colour) or ``zero``.
            Default: ``"mean"``
        batch (int): number of ablations per pass. Default: 4
    """


@captum_method(
    "shapley_value_sampling",
    attr.ShapleyValueSampling,
    "Castro et al., Computers & OR 2009; Štrumbelj & Kononenko, JMLR 2010",
    "1 + 2 × groups (36)",
    stochastic=True,
    expensive=True,
)
class ShapleyValueSampling(_Masked):
    r"""Shapley values of the groups from random permutations.

    The groups' values add up to the fall of the logit between image and baseline.

    Args:
        permutations (int): how many. Default: 2
        patch, baseline, batch: as in :class:`FeatureAblation`.
    """

    permutations: int = 2

    def values(self, case: CaptumArguments) -> Any:
        # Captum walks over a feature mask element by element in Python, once per permutation; so it
        # gets one number per group instead: 1 shows the group's pixels, 0 the baseline's.
        mask, empty = feature_mask(case, self.patch), self.emptied(case)

        def forward(shown: Tensor, *arguments: Tensor) -> Tensor:
            return case.forward(torch.where(shown[:, mask[0]] > 0, case.pixels, empty), *arguments)

        found = attributed(
            self.algorithm(forward),
            case.pixels.new_ones(1, int(mask.max()) + 1),
            target=case.target,
            additional_forward_args=case.arguments,
            n_samples=self.permutations,
            perturbations_per_eval=self.batch,
        )
        return found[:, mask[0]]


@dataclass(frozen=True)
class _Surrogate(_Masked):
    """Fits a linear model to the logit of images with random groups masked."""

    samples: int = 72

    passed: ClassVar[dict[str, str]] = {**_Masked.passed, "samples": "n_samples"}
    reads: ClassVar[tuple[str, ...]] = (*_Masked.reads, "scikit-learn")

    def check(self, task: AttributionTask) -> None:
        super().check(task)
        count = int(groups_of(task.shapes, self.patch).max()) + 1
        if count < 2:
            raise MethodError(
                f"patch {self.patch} makes one group of the whole grid {task.shapes}: "
                f"{self.name} needs two or more, choose a smaller patch"
            )


@captum_method(
    "kernel_shap",
    attr.KernelShap,
    "Lundberg & Lee, NeurIPS 2017, Theorem 2",
    "72",
    stochastic=True,
    expensive=True,
)
class KernelShap(_Surrogate):
    r"""Shapley values of the groups from a weighted linear regression.

    The groups' values add up to the fall of the logit between image and baseline.

    Args:
        samples (int): masked images; with fewer than groups the fit is not unique. Default: 72
        patch, baseline, batch: as in :class:`FeatureAblation`.
    """


@captum_method(
    "lime",
    attr.Lime,
    "Ribeiro et al., KDD 2016, Eq. 1–2",
    "72",
    label="LIME",
    stochastic=True,
    expensive=True,
)
class Lime(_Surrogate):
    r"""Coefficients of a sparse linear model near the image.

    Args:
        samples (int): masked images. Default: 72
        alpha (float): weight of the Lasso's penalty; groups below it get 0. Default: 0.01
        patch, baseline, batch: as in :class:`FeatureAblation`.
    """

    alpha: float = 0.01

    def build(self, case: CaptumArguments) -> Any:
        from captum._utils.models.linear_model import SkLearnLasso

        return attr.Lime(case.forward, interpretable_model=SkLearnLasso(alpha=self.alpha))


@captum_method(
    "occlusion",
    attr.Occlusion,
    "Zeiler & Fergus, ECCV 2014, §4.2",
    "1 + windows (64)",
    expensive=True,
)
class Occlusion(_Pixels):
    r"""Fall of the logit when a window is painted over, averaged over the windows of a pixel.

    Args:
        patch (int): tokens per side of the window. Default: 4
        stride (int): tokens from one window to the next, at most ``patch``. Default: 3
        baseline (str): paint: ``mean`` (the image's mean colour) or ``zero``.
            Default: ``"mean"``
        batch (int): number of windows per pass. Default: 4
    """

    patch: int = 4
    stride: int = 3
    baseline: str = "mean"
    batch: int = 4

    passed: ClassVar[dict[str, str]] = _Masked.passed

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.stride > self.patch:
            raise InputError(
                f"stride is {self.stride} tokens and the window {self.patch}: expected a stride of "
                "at most the window, else tokens are never covered"
            )

    def values(self, case: CaptumArguments) -> Any:
        size = token_size(case.owners, case.task.shapes)
        return self._over_tokens(case) if size is None else super().values(case)

    def call(self, case: CaptumArguments) -> dict[str, Any]:
        owners = case.owners
        size = token_size(owners, case.task.shapes)
        assert size is not None  # values() sees to that
        shape = owners.shape[1:]
        # A window covers all channels of one image or tile.
        lead = [
            1 if bool((owners.diff(dim=d + 1) != 0).any()) else n for d, n in enumerate(shape[:-2])
        ]
        window = [min(self.patch * s, n) for s, n in zip(size, shape[-2:], strict=True)]
        stride = [min(self.stride * s, n) for s, n in zip(size, window, strict=True)]
        shapes = {"sliding_window_shapes": (*lead, *window), "strides": (*lead, *stride)}
        return super().call(case) | shapes

    def _over_tokens(self, case: CaptumArguments) -> Tensor:
        """The same where the pixel tensor has no rows and columns (patches in a list): the window
        slides over grids of one number per token, 1 for its pixels and 0 for the paint."""
        owners, empty, shapes = case.owners, self.emptied(case), case.task.shapes
        inside, at = owners[0] >= 0, owners[0].clamp_min(0)

        def forward(*values: Tensor) -> Tensor:
            shown = torch.cat([v.flatten(1) for v in values[: len(shapes)]], 1)
            pixels = torch.where(inside & (shown[:, at] == 0), empty, case.pixels)
            return case.forward(pixels, *values[len(shapes) :])

        windows = tuple((min(self.patch, h), min(self.patch, w)) for h, w in shapes)
        call = super().call(case) | {
            "sliding_window_shapes": windows,
            "strides": tuple((min(self.stride, h), min(self.stride, w)) for h, w in windows),
            "baselines": (0,) * len(shapes),
        }
        shown = tuple(case.pixels.new_ones(1, h, w) for h, w in shapes)
        found = attributed(self.algorithm(forward), shown, **call)
        return torch.cat([f.flatten(1) for f in found], 1)[:, at]


def bases() -> tuple[str, ...]:
    """Names of the methods that a tunnel can be built around: Captum's gradient methods.

    Not those that are tunnels themselves (GradientShap): both would want the setting ``stdevs``.
    """
    captum = [(name, cls) for name, cls in METHODS.items() if issubclass(cls, CaptumMethod)]
    return tuple(sorted(n for n, c in captum if c.by_gradient() and not c.facts.stochastic))


@entered(
    "noise_tunnel",
    "NoiseTunnel (SmoothGrad)",
    "Captum, pixels",
    "Smilkov et al., arXiv:1706.03825; Adebayo et al., arXiv:1810.03307",
    "8 + 8 back",
    "gradients",
    "pixel tokens",
    stochastic=True,
    foils=True,
)
class NoiseTunnel(PerToken):
    r"""Mean, mean square or variance of a method's attributions over noisy images.

    ``smoothgrad_sq`` and ``vargrad`` are taken of every single attribution (pixel or channel)
    before they are gathered into a map: ≥ 0, in the square of the logit's unit.

    Args:
        base (str): one of :func:`bases`, with its default settings.
            Default: ``"input_x_gradient"``
        samples (int): noisy images. Default: 8
        std (float): of the noise, as a fraction of the range of the pixels' values. Default: 0.1
        kind (str): ``smoothgrad``, ``smoothgrad_sq`` or ``vargrad``. Default: ``"smoothgrad"``
        batch (int): number of noisy images per pass. Default: 4
    """

    base: str = "input_x_gradient"
    samples: int = 8
    std: float = 0.1
    kind: str = "smoothgrad"
    batch: int = 4

    def __post_init__(self) -> None:
        check_choices(self, base=bases(), kind=TUNNELS)
        check_settings(self)
        if self.kind == "vargrad" and self.samples < 2:
            raise InputError("samples is 1: a variance needs at least 2")

    @property
    def inner(self) -> CaptumMethod:
        """The base as a method."""
        found = method(self.base, **({"batch": self.batch} if self._batched else {}))
        assert isinstance(found, CaptumMethod)  # __post_init__ saw to that
        return found

    @property
    def _batched(self) -> bool:
        """Whether the base itself runs several images per pass."""
        return "batch" in METHODS.settings(self.base)

    def check(self, task: AttributionTask) -> None:
        self.inner.check(task)  # a layer method needs no pixel tokens

    def token(self, task: AttributionTask, position: int, token: int) -> tuple[Tensor, ...]:
        inner, case = self.inner, CaptumArguments(task, (position, token))
        with seeded(task.generator):
            values = attributed(
                attr.NoiseTunnel(inner.build(case)),
                case.pixels,
                nt_type=self.kind,
                nt_samples=self.samples,
                nt_samples_batch_size=1 if self._batched else min(self.batch, self.samples),
                stdevs=spread(case, self.std),
                **inner.call(case),
            )
        return inner.maps(values, case)
