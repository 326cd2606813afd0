r"""Finer-CAM on token scores: what speaks for this token rather than for the likeliest others."""

from __future__ import annotations

import torch
from torch import Tensor

from captum_dcam.errors import InputError
from captum_dcam.maps import PRODUCTS, cam
from captum_dcam.methods.base import (
    AttributionTask,
    PerToken,
    check_choices,
    check_counts,
    entered,
)
from captum_dcam.model.gradients import gradients_of, no_path, watched
from captum_dcam.model.tap import wide

#: how the rivals' logits are averaged
WEIGHTS = ("equal", "probability")


@entered(
    "finer_cam",
    "Finer-CAM",
    "gradient",
    "Zhang et al., CVPR 2025",
    "1 + 1 back",
    "gradients",
    foils=True,
)
class FinerCam(PerToken):
    r"""Finer-CAM (Zhang et al., CVPR 2025): Grad-CAM of a difference of logits.

    .. math:: y_c - \gamma \sum_d w_d \, y_d

    The rivals d are the tokens with the highest logits besides the token's own, at its position and
    in its state. With ``equal``, as in the paper, :math:`w_d = 1/k`. With ``probability``, as in
    pytorch-grad-cam, :math:`w` is the softmax over the rivals' logits, and is differentiated as
    well. (That package takes the logits nearest to the token's: the same, where the token is the
    likeliest.) A word with a foil has the foil's token for its one rival.

    Args:
        gamma (float): :math:`\gamma`, strength of the comparison; 0 is Grad-CAM. Default: 0.6
        comparisons (int): k. Default: 3
        weights (str): ``equal`` or ``probability``. Default: ``"equal"``
        product (str): how features and gradients become the map. Default: ``"pooled"``, Grad-CAM's
    """

    gamma: float = 0.6
    comparisons: int = 3
    weights: str = "equal"
    product: str = "pooled"

    def __post_init__(self) -> None:
        if not 0 <= self.gamma < float("inf"):
            raise InputError(f"gamma is {self.gamma}: expected a number of at least 0")
        check_counts(self, "comparisons")
        check_choices(self, weights=WEIGHTS, product=PRODUCTS)

    def token(self, task: AttributionTask, position: int, token: int) -> tuple[Tensor, ...]:
        step = torch.tensor([task.step(position)])
        with torch.enable_grad():
            logits, features = watched(
                task.forward, lambda: task.forward.replay(torch.tensor([0]), step)
            )
            score = self._score(logits[0, position], token, task.foil(position))
            gradients = gradients_of(score, features)
        if not any(bool(g.any()) for g in gradients):
            raise no_path(task.forward, task.forward.adapter.token_texts([token])[0])
        return tuple(
            cam(f[0].detach(), g[0], self.product, center=False)
            for f, g in zip(features, gradients, strict=True)
        )

    def _score(self, logits: Tensor, token: int, foil: int | None) -> Tensor:
        """The difference for logits (V,) of one position."""
        logits = wide(logits)
        order = logits.detach().argsort(descending=True, stable=True)
        known = order[order != token][: self.comparisons] if foil is None else [foil]
        rivals = logits[known]
        equal = self.weights == "equal"
        mean = rivals.mean() if equal else (rivals.softmax(0) * rivals).sum()
        return logits[token] - self.gamma * mean
