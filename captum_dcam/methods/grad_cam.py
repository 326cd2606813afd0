r"""pytorch-grad-cam's classes on the tap (extra ``grad-cam``).

The maps are the package's own, taken before it cuts off what is negative, stretches every map to
[0, 1] and enlarges it, so that sign and scale are those of the formulas. Where a class has no such
map its docstring says so. Every grid is explained by itself.
"""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from types import SimpleNamespace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from captum_dcam.errors import MethodError
from captum_dcam.methods.base import AttributionTask, pooled_pixels
from captum_dcam.methods.grad_cam_bridge import (
    PACKAGE,
    Bridge,
    View,
    image_of,
    images,
    logit,
    pgc_method,
    raw,
    released,
    upstream,
)
from captum_dcam.model.gradients import target_gradients
from captum_dcam.model.guard import Shared
from captum_dcam.model.words import Target

# -- one pass ------------------------------------------------------------------------------------


class _Plain(Bridge):
    """A class that needs nothing but the layer: an entry of the table below."""

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
_NO_WORD = "All words that are read in one state have the same map."

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


for _name, (_cls, _source, _text, _gradients) in _TABLE.items():
    _made = type(
        f"Pgc{_cls.replace('_', '')}",
        (_Plain,),
        {
            "__doc__": f"pytorch-grad-cam's ``{_cls}``. {_text}".rstrip(),
            "__module__": __name__,
            "component": _TURNED in _text,
        },
    )
    globals()[_made.__name__] = pgc_method(
        _name,
        _cls,
        _source,
        "1 + 1 back" if _gradients else "1",
        *(("gradients",) if _gradients else ()),
        target_blind=_NO_WORD in _text or _cls == "RandomCAM",
        stochastic=_cls == "RandomCAM",
    )(_made)


@pgc_method(
    "pgc_finercam", "FinerCAM", "Zhang et al., CVPR 2025", "1 + 1 back", "gradients", foils=False
)
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


@pgc_method("pgc_refinecam", "RefineCAM", "arXiv 2605.14641", "2 + 2 back", "gradients")
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

    def _grid(self, task: AttributionTask, position: int, token: int, grid: int) -> Tensor:
        last = task.forward.layer
        blocks = self.blocks or sorted({last // 2, last})
        views = [View(task, position, grid, None, task.forward.again(block)) for block in blocks]
        base = upstream("GradCAMPlusPlus")

        def one(_model: Any, layers: list, reshape: Any) -> Any:
            part = base(next(v for v in views if v.layer is layers[0]), layers, reshape)
            after.callback(released, part)
            return part

        with ExitStack() as after, torch.enable_grad():
            cam = upstream("RefineCAM")(views[0], [v.layer for v in views], None, one)
            return torch.as_tensor(cam(views[0].dummy, [logit(token)])[0])


@pgc_method(
    "pgc_dff", "DeepFeatureFactorization", "Collins et al., ECCV 2018", "1 + 1 back", "gradients"
)
class PgcDFF(Bridge):
    r"""pytorch-grad-cam's deep feature factorisation, weighed for a word.

    The features are split into concepts, :math:`A \approx W H + \text{offset}`, the offset being
    each channel's minimum. A concept's score for the word is the pooled gradient · its vector in W,
    as Grad-CAM weighs a channel; the map is the sum of the concepts' maps H times their scores.

    Args:
        concepts (int): how many. Default: 8
    """

    concepts: int = 8

    def _grid(self, task: AttributionTask, position: int, token: int, grid: int) -> Tensor:
        foil = task.foil(position)
        word = Target("", (position,), (token,), None if foil is None else (foil,))
        (row,) = target_gradients(task.forward, [word], score=task.score)
        dff = upstream("dff", "feature_factorization.deep_feature_factorization")
        features, gradient = row.features[grid].float().cpu(), row.gradients[grid].float().cpu()
        with warnings.catch_warnings():
            # 200 iterations name the concepts well enough, converged or not
            warnings.filterwarnings("ignore", "Maximum number of iterations")
            vectors, maps = dff(features[None].numpy().copy(), n_components=self.concepts)
        own = torch.as_tensor(vectors, dtype=torch.float32) - features.amin((1, 2))[:, None]
        scores = gradient.mean((1, 2)) @ own
        return torch.einsum("k,khw->hw", scores, torch.as_tensor(maps[0], dtype=torch.float32))


# -- many changed images or channels -------------------------------------------------------------


@contextmanager
def _barless(module: str) -> Iterator[None]:
    found: Any = importlib.import_module(f"{PACKAGE}.{module}")
    before, found.tqdm = found.tqdm, SimpleNamespace(tqdm=lambda rows: rows)
    try:
        yield
    finally:
        found.tqdm = before


#: modules of pytorch-grad-cam without their progress bars
without_bars = {name: Shared(partial(_barless, name)) for name in ("score_cam", "ablation_cam")}


class Strongest:
    r"""A ``reshape_transform`` that keeps the channels with the largest standard deviation.

    Those of the first call stand; later feature maps are dropped: the hooks of the package keep
    every one that passes, K maps of K channels in a method that masks K channels.

    Args:
        count (int, optional): K. Default: all channels

    Attributes:
        index (Tensor): (K,) the channels, after the first call.
    """

    def __init__(self, count: int | None) -> None:
        self.count = count
        self.index: Tensor | None = None

    def __call__(self, features: Tensor) -> Tensor:
        if self.index is not None:
            return features[:0]
        spread = features[0].flatten(1).std(1, correction=0)
        self.index = spread.topk(min(self.count or len(spread), len(spread))).indices.sort().values
        return features[:, self.index]


def zeroing_layer(chosen: Strongest) -> nn.Module:
    r"""An ablation layer for AblationCAM that sets a channel to 0, as the paper does.

    The package's own sets channels of signed features ten million below the batch's minimum, row
    after row further: the score would depend on the batch size.

    Args:
        chosen (Strongest): the channels that AblationCAM counts from 0 to K - 1.
    """
    base: Any = upstream("AblationLayer")

    class Zeroing(base):
        """Row i without channel ``indices[i]``."""

        def __call__(self, x: Tensor) -> Tensor:
            del x  # what was fed in is the unablated layer below
            assert chosen.index is not None
            out: Tensor = self.activations
            for row in range(len(out)):
                out[row, chosen.index[int(self.indices[row])]] = 0
            return out

    layer: nn.Module = Zeroing()
    return layer


@pgc_method(
    "pgc_scorecam",
    "ScoreCAM",
    "Wang et al., CVPRW 2020",
    "1 + channels (24)",
    "pixel tokens",
    expensive=True,
)
class PgcScoreCAM(Bridge):
    r"""pytorch-grad-cam's ``ScoreCAM``, on logits as there.

    Args:
        channels (int, optional): the channels with the largest standard deviation take part; None:
            all, one pass each. Default: 24
        batch_size (int): number of masked images per pass. Default: 8
    """

    channels: int | None = 24
    batch_size: int = 8

    def _grid(self, task: AttributionTask, position: int, token: int, grid: int) -> Tensor:
        view = View(task, position, grid, image_of(task, grid))
        cam = upstream("ScoreCAM")(view, [view.layer], Strongest(self.channels))
        cam.batch_size = self.batch_size
        with without_bars["score_cam"]():
            return raw(cam, view.own_pixels, logit(token))


@pgc_method(
    "pgc_ablationcam",
    "AblationCAM",
    "Desai & Ramaswamy, WACV 2020",
    "2 + channels (24)",
    expensive=True,
)
class PgcAblationCAM(Bridge):
    r"""pytorch-grad-cam's ``AblationCAM``: the fall of the logit without a channel weighs it.

    An ablated channel is 0, as in the paper. The package divides the fall by the logit, which turns
    the map when the logit is negative; here it is multiplied back. The formula comes from features
    that are never negative: a channel that speaks for the word where it is negative is counted with
    the wrong sign.

    Args:
        channels (int, optional): the channels with the largest standard deviation take part; None:
            all, one pass each. Default: 24
        batch_size (int): number of channels per pass. Default: 8
    """

    channels: int | None = 24
    batch_size: int = 8

    def _grid(self, task: AttributionTask, position: int, token: int, grid: int) -> Tensor:
        view, chosen = View(task, position, grid), Strongest(self.channels)
        cam = upstream("AblationCAM")(
            view, [view.layer], chosen, zeroing_layer(chosen), self.batch_size
        )
        scores: list[float] = []

        def score(logits: Tensor) -> Tensor:
            scores.append(float(logits[token]))
            return logits[token]

        with without_bars["ablation_cam"]():
            return raw(cam, view.dummy, score) * scores[0]


@pgc_method(
    "pgc_sess",
    "SESS",
    "Tursun et al., ECCV 2022",
    "18 + 9 back",
    "gradients",
    "pixel tokens",
    expensive=True,
)
class PgcSESS(Bridge):
    r"""pytorch-grad-cam's ``SESS``: Grad-CAM of windows of the enlarged image, put together.

    Every window's map and the whole are stretched to [0, 1] by definition: the map is never
    negative and its scale means nothing. It is averaged over the pixels of each image token.

    Args:
        scales (int): sizes of the image, each 2/7 larger than the one before. Default: 3
        batch_size (int): number of windows per pass. Default: 8
    """

    scales: int = 3
    batch_size: int = 8

    def check(self, task: AttributionTask) -> None:
        super().check(task)
        height, width = task.pixels.shape[-2:]
        if height != width:
            raise MethodError(
                f"pixels are {height} × {width}: SESS slides a square window and needs square "
                "images; use pgc_gradcam"
            )

    def _grid(self, task: AttributionTask, position: int, token: int, grid: int) -> Tensor:
        image = image_of(task, grid)
        view = View(task, position, grid, image)
        sess = upstream("SESS")(
            view, [view.layer], num_scales=self.scales, batch_size=self.batch_size
        )
        with ExitStack() as after, torch.enable_grad():
            after.callback(released, sess.base_cam)
            found = torch.as_tensor(sess(view.own_pixels, [logit(token)])[0])
        values = torch.zeros(task.pixels.shape)
        images(values)[:, image] = found
        owners = task.forward.adapter.pixel_tokens(task.forward.request)
        return pooled_pixels(values, owners, task.shapes)[grid]
