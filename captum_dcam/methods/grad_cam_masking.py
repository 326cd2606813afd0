r"""pytorch-grad-cam's classes that run many changed pictures or channels (extra ``grad-cam``)."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from captum_dcam.errors import MethodError
from captum_dcam.methods.base import AttributionTask, MethodFacts, pooled_pixels, register_method
from captum_dcam.methods.grad_cam_bridge import (
    GROUP,
    PACKAGE,
    Bridge,
    View,
    logit,
    pictures,
    positive,
    raw,
    released,
    upstream,
)


def picture_of(task: AttributionTask, grid: int) -> int:
    r"""Which picture of the pixel tensor a grid's tokens are computed from.

    Raises:
        MethodError: the pixel tensor has no axes (images, C, H, W), or the grid and one picture do
            not belong to each other alone.
    """
    forward, pixels = task.forward, task.pixels
    family = forward.adapter.family
    if pixels.ndim not in (4, 5):
        raise MethodError(
            f"{family}'s pixels are {tuple(pixels.shape)}: this class of pytorch-grad-cam changes "
            "pictures (C, H, W); use one that reads the tapped block, such as pgc_gradcam"
        )
    owners = pictures(forward.adapter.pixel_tokens(forward.request))[0]
    sizes = [h * w for h, w in task.shapes]
    number = torch.repeat_interleave(torch.arange(len(sizes)), torch.tensor(sizes)).to(
        owners.device
    )
    grids = [set(number[o[o >= 0]].unique().tolist()) for o in owners]
    holding = [i for i, found in enumerate(grids) if grid in found]
    if len(holding) != 1 or grids[holding[0]] != {grid}:
        raise MethodError(
            f"{family}: grid {grid} is computed from the pictures {holding} of the pixel tensor, "
            "which hold other grids too or are several: this class of pytorch-grad-cam needs one "
            "picture a grid; use one that reads the tapped block, such as pgc_gradcam"
        )
    return holding[0]


@contextmanager
def without_bars(module: str) -> Iterator[None]:
    """A module of pytorch-grad-cam without its progress bars."""
    found: Any = importlib.import_module(f"{PACKAGE}.{module}")
    before, found.tqdm = found.tqdm, SimpleNamespace(tqdm=lambda rows: rows)
    try:
        yield
    finally:
        found.tqdm = before


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


@register_method("pgc_scorecam")
@dataclass(frozen=True)
class PgcScoreCAM(Bridge):
    r"""pytorch-grad-cam's ``ScoreCAM``, on logits as there.

    Args:
        channels (int, optional): the channels with the largest standard deviation take part; None:
            all, one pass each. Default: 24
        batch_size (int): masked pictures a pass. Default: 8
    """

    channels: int | None = 24
    batch_size: int = 8

    upstream: ClassVar[str] = "ScoreCAM"
    facts: ClassVar[MethodFacts] = MethodFacts(
        "ScoreCAM",
        GROUP,
        "Wang et al., CVPRW 2020",
        "1 + channels (24)",
        ("pixel tokens", "grad-cam"),
        expensive=True,
    )

    def __post_init__(self) -> None:
        positive(self, "channels", "batch_size")

    def check(self, task: AttributionTask) -> None:
        super().check(task)
        for grid in range(len(task.shapes)):
            picture_of(task, grid)

    def _grid(self, task: AttributionTask, position: int, token: int, grid: int) -> Tensor:
        view = View(task, position, grid, picture_of(task, grid))
        cam = upstream("ScoreCAM")(view, [view.layer], Strongest(self.channels))
        cam.batch_size = self.batch_size
        with without_bars("score_cam"):
            return raw(cam, view.own_pixels, logit(token))


@register_method("pgc_ablationcam")
@dataclass(frozen=True)
class PgcAblationCAM(Bridge):
    r"""pytorch-grad-cam's ``AblationCAM``: the fall of the logit without a channel weighs it.

    An ablated channel is 0, as in the paper. The package divides the fall by the logit, which turns
    the map when the logit is negative; here it is multiplied back. The formula comes from features
    that are never negative: a channel that speaks for the word where it is negative is counted with
    the wrong sign.

    Args:
        channels (int, optional): the channels with the largest standard deviation take part; None:
            all, one pass each. Default: 24
        batch_size (int): channels a pass. Default: 8
    """

    channels: int | None = 24
    batch_size: int = 8

    upstream: ClassVar[str] = "AblationCAM"
    facts: ClassVar[MethodFacts] = MethodFacts(
        "AblationCAM",
        GROUP,
        "Desai & Ramaswamy, WACV 2020",
        "2 + channels (24)",
        ("grad-cam",),
        expensive=True,
    )

    def __post_init__(self) -> None:
        positive(self, "channels", "batch_size")

    def _grid(self, task: AttributionTask, position: int, token: int, grid: int) -> Tensor:
        view, chosen = View(task, position, grid), Strongest(self.channels)
        cam = upstream("AblationCAM")(
            view, [view.layer], chosen, zeroing_layer(chosen), self.batch_size
        )
        scores: list[float] = []

        def score(logits: Tensor) -> Tensor:
            scores.append(float(logits[token]))
            return logits[token]

        with without_bars("ablation_cam"):
            return raw(cam, view.dummy, score) * scores[0]


@register_method("pgc_sess")
@dataclass(frozen=True)
class PgcSESS(Bridge):
    r"""pytorch-grad-cam's ``SESS``: Grad-CAM of windows of the enlarged picture, put together.

    Every window's map and the whole are stretched to [0, 1] by definition: the map is never
    negative and its scale means nothing. It is averaged over the pixels of each image token.

    Args:
        scales (int): sizes of the picture, each 2/7 larger than the one before. Default: 3
        batch_size (int): windows a pass. Default: 8
    """

    scales: int = 3
    batch_size: int = 8

    upstream: ClassVar[str] = "SESS"
    facts: ClassVar[MethodFacts] = MethodFacts(
        "SESS",
        GROUP,
        "Tursun et al., ECCV 2022",
        "18 + 9 back",
        ("gradients", "pixel tokens", "grad-cam"),
        expensive=True,
    )

    def __post_init__(self) -> None:
        positive(self, "scales", "batch_size")

    def check(self, task: AttributionTask) -> None:
        super().check(task)
        for grid in range(len(task.shapes)):
            picture_of(task, grid)
        height, width = task.pixels.shape[-2:]
        if height != width:
            raise MethodError(
                f"pixels are {height} × {width}: SESS slides a square window and needs square "
                "pictures; use pgc_gradcam"
            )

    def _grid(self, task: AttributionTask, position: int, token: int, grid: int) -> Tensor:
        forward, picture = task.forward, picture_of(task, grid)
        view = View(task, position, grid, picture)
        sess = upstream("SESS")(
            view, [view.layer], num_scales=self.scales, batch_size=self.batch_size
        )
        try:
            with torch.enable_grad():
                found = torch.as_tensor(sess(view.own_pixels, [logit(token)])[0])
        finally:
            released(sess.base_cam)
        values = torch.zeros(task.pixels.shape)
        (values if values.ndim == 5 else values[:, None])[:, picture] = found
        owners = forward.adapter.pixel_tokens(forward.request)
        return pooled_pixels(values, owners, task.shapes)[grid]
