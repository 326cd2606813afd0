r"""pytorch-grad-cam's classes on the tap (extra ``grad-cam``).

The maps are the package's own, taken before it cuts off what is negative, stretches every map to
[0, 1] and enlarges it, so that sign and scale are those of the formulas. Where a class has no such
map its docstring says so. Every grid is run by itself.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from captum_dcam.methods import grad_cam_masking  # noqa: F401  registers its methods
from captum_dcam.methods.base import AttributionTask, MethodFacts, register_method
from captum_dcam.methods.grad_cam_bridge import (
    GROUP,
    Bridge,
    View,
    logit,
    positive,
    raw,
    released,
    upstream,
)
from captum_dcam.model.forward import DenoisingForward
from captum_dcam.model.gradients import target_gradients
from captum_dcam.model.words import Target


class _Plain(Bridge):
    """A class that needs nothing but the layer: a row of the table below."""

    #: the sign is that of a principal component, which is arbitrary
    component: ClassVar[bool] = False

    def _grid(self, task: AttributionTask, position: int, token: int, grid: int) -> Tensor:
        view = View(task, position, grid)
        found = raw(upstream(self.upstream)(view, [view.layer]), view.dummy, logit(token))
        return -found if self.component and -found.min() > found.max() else found


_TURNED = (
    "The sign of a principal component is arbitrary: the map is turned so that its largest "
    "magnitude is positive (the rule of Seg-Eigen-CAM, Eq. 13)."
)
_NO_WORD = "One map of a state, whatever the word."

#: method name: class, source, what its users must know, whether it reads gradients
_TABLE: dict[str, tuple[str, str, str, bool]] = {
    "pgc_gradcam": ("GradCAM", "Selvaraju et al., ICCV 2017", "", True),
    "pgc_hirescam": ("HiResCAM", "Draelos & Carin, 2020", "", True),
    "pgc_elementwise": (
        "GradCAMElementWise",
        "pytorch-grad-cam",
        "Negative products are cut off before the sum over channels: the map is never negative.",
        True,
    ),
    "pgc_gradcam_plus_plus": (
        "GradCAMPlusPlus",
        "Chattopadhay et al., WACV 2018",
        "The package's ε of 1e-6 outweighs the squares of small gradients: where they are small "
        "the weights are far below Eq. 19's (this library's product ``plus_plus`` has no ε).",
        True,
    ),
    "pgc_xgradcam": ("XGradCAM", "Fu et al., BMVC 2020", "", True),
    "pgc_layercam": ("LayerCAM", "Jiang et al., TIP 2021", "", True),
    "pgc_eigengradcam": ("EigenGradCAM", "pytorch-grad-cam", _TURNED, True),
    "pgc_segeigencam": (
        "SegEigenCAM",
        "Chung & Ying, Applied Sciences 2025",
        "Turned by the class itself so that the largest magnitude is positive.",
        True,
    ),
    "pgc_eigencam": ("EigenCAM", "Muhammad & Yeasin, IJCNN 2020", f"{_NO_WORD} {_TURNED}", False),
    "pgc_kpcacam": ("KPCA_CAM", "Karmani et al., 2024", f"{_NO_WORD} {_TURNED}", False),
    "pgc_fem": ("FEM", "Fuad et al., IPTA 2020", _NO_WORD, False),
    "pgc_randomcam": (
        "RandomCAM",
        "pytorch-grad-cam",
        "Random weights from [-1, 1], drawn anew for every token: a floor for the others.",
        True,
    ),
}


def _enter(name: str, cls: str, source: str, text: str, gradients: bool) -> None:
    """Register one row of the table as a class of this module."""
    needs = ("gradients", "grad-cam") if gradients else ("grad-cam",)
    made = type(
        f"Pgc{cls.replace('_', '')}",
        (_Plain,),
        {
            "__doc__": f"pytorch-grad-cam's ``{cls}``. {text}".rstrip(),
            "__module__": __name__,
            "upstream": cls,
            "component": _TURNED in text,
            "facts": MethodFacts(
                cls,
                GROUP,
                source,
                "1 + 1 back" if gradients else "1",
                needs,
                target_blind=_NO_WORD in text or cls == "RandomCAM",
                stochastic=cls == "RandomCAM",
            ),
        },
    )
    globals()[made.__name__] = register_method(name)(dataclass(frozen=True)(made))


for _name, _row in _TABLE.items():
    _enter(_name, *_row)


@register_method("pgc_finercam")
@dataclass(frozen=True)
class PgcFinerCAM(Bridge):
    r"""pytorch-grad-cam's ``FinerCAM`` around its ``GradCAM``.

    The tokens compared with are those whose logits are nearest to the word's, weighted by their
    probabilities. The package's ε of 1e-9 in the weights makes the map fade where all of them
    together are less likely than that.

    Args:
        alpha (float): strength of the comparison. Default: 1.0
        comparisons (int): tokens compared with. Default: 3
    """

    alpha: float = 1.0
    comparisons: int = 3

    upstream: ClassVar[str] = "FinerCAM"
    facts: ClassVar[MethodFacts] = MethodFacts(
        "FinerCAM", GROUP, "Zhang et al., CVPR 2025", "1 + 1 back", ("gradients", "grad-cam")
    )

    def __post_init__(self) -> None:
        positive(self, "comparisons")

    def _grid(self, task: AttributionTask, position: int, token: int, grid: int) -> Tensor:
        view = View(task, position, grid)
        cam = upstream("FinerCAM")(view, [view.layer])
        weighted = upstream("FinerWeightedTarget", "utils.model_targets")

        def score(logits: Tensor) -> Tensor:
            # the class's own choice takes the word for one of its rivals when logits are equal
            order = (logits - logits[token]).abs().argsort(stable=True).tolist()
            rivals = [i for i in order if i != token][: self.comparisons]
            return weighted(token, rivals, self.alpha)(logits)

        return raw(cam.base_cam, view.dummy, score, cam)


@register_method("pgc_refinecam")
@dataclass(frozen=True)
class PgcRefineCAM(Bridge):
    r"""pytorch-grad-cam's ``RefineCAM``: the product of Grad-CAM++ maps of several blocks.

    Every factor and the product are cut off below 0 and stretched to [0, 1] by definition: the map
    is never negative and its scale means nothing. A word whose map is negative everywhere in one
    block gets an empty map.

    Args:
        blocks (tuple of int): blocks to multiply; negative counts from the end. Default: the
            forward's block and the one half-way to it
    """

    blocks: tuple[int, ...] = ()

    upstream: ClassVar[str] = "RefineCAM"
    facts: ClassVar[MethodFacts] = MethodFacts(
        "RefineCAM", GROUP, "arXiv 2605.14641", "2 + 2 back", ("gradients", "grad-cam")
    )

    def _grid(self, task: AttributionTask, position: int, token: int, grid: int) -> Tensor:
        views = [View(task, position, grid, None, f) for f in self._forwards(task.forward)]
        base, made = upstream("GradCAMPlusPlus"), []

        def one(_model: Any, layers: list, reshape: Any) -> Any:
            made.append(base(next(v for v in views if v.layer is layers[0]), layers, reshape))
            return made[-1]

        try:
            cam = upstream("RefineCAM")(views[0], [v.layer for v in views], None, one)
            with torch.enable_grad():
                return torch.as_tensor(cam(views[0].dummy, [logit(token)])[0])
        finally:
            for part in made:
                released(part)

    def _forwards(self, forward: DenoisingForward) -> list[DenoisingForward]:
        """The same generation at every block."""
        first = forward.layer
        blocks = self.blocks or sorted({first // 2, first})
        out = []
        for block in blocks:
            out.append(forward.twin(block))
            out[-1].bind(forward.request, forward.trajectory)
        return out


@register_method("pgc_dff")
@dataclass(frozen=True)
class PgcDFF(Bridge):
    r"""pytorch-grad-cam's deep feature factorisation, weighed for a word.

    The features are split into concepts, :math:`A \approx W H + \text{offset}`, the offset being
    each channel's minimum. A concept's score for the word is the pooled gradient · its vector in W,
    as Grad-CAM weighs a channel; the map is the sum of the concepts' maps H times their scores.

    Args:
        concepts (int): how many. Default: 8
    """

    concepts: int = 8

    upstream: ClassVar[str] = "DeepFeatureFactorization"
    facts: ClassVar[MethodFacts] = MethodFacts(
        "DeepFeatureFactorization",
        GROUP,
        "Collins et al., ECCV 2018",
        "1 + 1 back",
        ("gradients", "grad-cam"),
    )

    def __post_init__(self) -> None:
        positive(self, "concepts")

    def _grid(self, task: AttributionTask, position: int, token: int, grid: int) -> Tensor:
        row = target_gradients(task.forward, [Target("", (position,), (token,))], score=task.score)[
            0
        ]
        dff = upstream("dff", "feature_factorization.deep_feature_factorization")
        features, gradient = row.features[grid].float().cpu(), row.gradients[grid].float().cpu()
        with warnings.catch_warnings():
            # 200 iterations name the concepts well enough, converged or not
            warnings.filterwarnings("ignore", "Maximum number of iterations")
            vectors, maps = dff(features[None].numpy().copy(), n_components=self.concepts)
        own = torch.as_tensor(vectors, dtype=torch.float32) - features.amin((1, 2))[:, None]
        scores = gradient.mean((1, 2)) @ own
        return torch.einsum("k,khw->hw", scores, torch.as_tensor(maps[0], dtype=torch.float32))
