r"""How a feature map and its gradient become one map.

All take features and gradients (…, D, H, W) and return the signed map (…, H, W); ReLU is the
caller's.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from captum_dcam.errors import UnknownNameError, near


def pooled(features: Tensor, gradients: Tensor) -> Tensor:
    """Grad-CAM: spatially averaged gradients weigh the channels (Eq. 4)."""
    weights = gradients.mean((-2, -1), keepdim=True)
    return (weights * features).sum(-3)


def positionwise(features: Tensor, gradients: Tensor) -> Tensor:
    """Gradient × feature at every position, summed over channels (HiResCAM)."""
    return (gradients * features).sum(-3)


def plus_plus(features: Tensor, gradients: Tensor) -> Tensor:
    r"""Grad-CAM++: weights :math:`\sum_{ij} \alpha \, \mathrm{ReLU}(g)` with
    :math:`\alpha = g^2 / (2 g^2 + g^3 \sum_{ij} A)`, 0 where the gradient is 0."""
    square = gradients.square()
    below = 2 * square + gradients * square * features.sum((-2, -1), keepdim=True)
    alpha = (square / below.where(below != 0, below.new_ones(()))).where(below != 0, below * 0)
    weights = (alpha * gradients.relu()).sum((-2, -1), keepdim=True)
    return (weights * features).sum(-3)


def centered(features: Tensor) -> Tensor:
    """Features minus their mean over the positions of each channel."""
    return features - features.mean((-2, -1), keepdim=True)


PRODUCTS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "pooled": pooled,
    "positionwise": positionwise,
    "plus_plus": plus_plus,
}


def cam(features: Tensor, gradients: Tensor, product: str, center: bool) -> Tensor:
    """Signed map (…, H, W), computed in float32 or wider."""
    if product not in PRODUCTS:
        raise UnknownNameError(f"unknown product {product!r}{near(product, PRODUCTS)}")
    wide = features.dtype if features.dtype.itemsize > 4 else None
    a = features if wide else features.float()
    g = gradients if wide else gradients.float()
    return PRODUCTS[product](centered(a) if center else a, g)
