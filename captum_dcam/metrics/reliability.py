r"""What a map's shape tells: how few pixels hold it, and whether it localises anything at all.

Gini index, entropy and Hoyer's measure are blind to a map's scale. A map that singles nothing out
(constant, all zero, or of one pixel) is at the dense end of each: Gini 0, entropy 1, Hoyer 0.

:class:`Reliability` is a calibrated probability: a logistic regression on six features of that
kind, fitted on words with and without an object in the image. It reads maps only: neither masks
nor the model.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from scipy import ndimage
from torch import Tensor

from captum_dcam.errors import InputError
from captum_dcam.metrics._checks import checked_maps, result_dtype, unit_peak
from captum_dcam.metrics.logistic import Logistic
from captum_dcam.metrics.otsu import levels_and_cut

#: the features, in the order of :func:`map_features`
MAP_FEATURES = ("entropy", "gini", "peak", "autocorrelation", "separability", "connected")


def gini_index(maps: Tensor) -> Tensor:
    r"""Gini index: 0 for a constant map, 1 - 1/N for one pixel out of N.

    .. math:: G = 1 - 2 \sum_{k=1}^N \frac{c_{(k)}}{\lVert c \rVert_1} \frac{N - k + 1/2}{N}

    with the values sorted from low to high. It is the only common measure with all six properties
    that its source asks for.

    Args:
        maps (Tensor): (..., H, W), floating point, finite, non-negative.

    Returns:
        Tensor: (...), in [0, 1).

    Source:
        Hurley and Rickard, Comparing measures of sparsity, 2009, Eq. 6.
    """
    values = unit_peak(checked_maps(maps, "gini_index")).flatten(-2)
    ranked, count = values.sort(-1).values, values.shape[-1]
    place = torch.arange(1, count + 1, device=values.device, dtype=values.dtype)
    weighted = (ranked * ((count - place + 0.5) / count)).sum(-1)
    total = ranked.sum(-1)
    index = 1 - 2 * weighted / total.masked_fill(total == 0, 1)
    return index.clamp(min=0).masked_fill(total == 0, 0).to(result_dtype(maps))


def normalized_entropy(maps: Tensor) -> Tensor:
    r"""Shannon entropy of the map as a distribution over N pixels, over that of the uniform one.

    .. math:: H = -\sum_i p_i \log p_i / \log N, \quad p = c / \lVert c \rVert_1

    1 for a constant map, 0 for a single pixel out of many.

    Args:
        maps (Tensor): (..., H, W), floating point, finite, non-negative.

    Returns:
        Tensor: (...), in [0, 1].

    Source:
        C. E. Shannon, 1948.
    """
    values = unit_peak(checked_maps(maps, "normalized_entropy")).flatten(-2)
    total, count = values.sum(-1, keepdim=True), values.shape[-1]
    share = values / total.masked_fill(total == 0, 1)
    entropy = torch.special.entr(share).sum(-1) / math.log(max(count, 2))
    dense = (total[..., 0] == 0) | (count == 1)
    return entropy.clamp(0, 1).masked_fill(dense, 1).to(result_dtype(maps))


def hoyer(maps: Tensor) -> Tensor:
    r"""Hoyer's sparseness: 0 for a constant map, 1 for a single pixel out of many.

    .. math:: (\sqrt N - \lVert c \rVert_1 / \lVert c \rVert_2) / (\sqrt N - 1)

    Args:
        maps (Tensor): (..., H, W), floating point, finite, non-negative.

    Returns:
        Tensor: (...), in [0, 1].

    Source:
        P. O. Hoyer, Non-negative matrix factorization with sparseness constraints, 2004.
    """
    values = unit_peak(checked_maps(maps, "hoyer")).flatten(-2)
    root = math.sqrt(values.shape[-1])
    length = values.square().sum(-1).sqrt()
    flat = (length == 0) | (values.shape[-1] == 1)
    ratio = values.sum(-1) / length.masked_fill(length == 0, 1)
    measure = (root - ratio) / max(root - 1, 1e-9)
    return measure.clamp(0, 1).masked_fill(flat, 0).to(result_dtype(maps))


def map_features(maps: Tensor) -> Tensor:
    r"""What tells a blob from clutter, for every map; all blind to its scale.

    ``entropy``: :func:`normalized_entropy`. ``gini``: :func:`gini_index`. ``peak``: log of maximum
    over mean, over log N, in [0, 1]. ``autocorrelation``: of horizontal and vertical neighbours
    (Moran's I), in [-1, 1]. ``separability``: between-class over total variance at Otsu's threshold
    (Otsu's η), in [0, 1]. ``connected``: share of the map's mass in the heaviest 8-connected part
    of the Otsu region, in [0, 1].

    A map that is constant, all zero or of one pixel has entropy 1 and all others 0.

    Args:
        maps (Tensor): (..., H, W), floating point, finite, non-negative.

    Returns:
        Tensor: (..., 6), in the order of :data:`MAP_FEATURES`.
    """
    values = unit_peak(checked_maps(maps, "map_features"))
    levels, cut = levels_and_cut(values)
    region, pixels = levels > cut[..., None, None], max(values.shape[-2:].numel(), 2)
    found = (
        normalized_entropy(values),
        gini_index(values),
        -values.mean((-2, -1)).clamp(min=1e-300).log() / math.log(pixels),
        _autocorrelation(levels),
        _separability(levels, region),
        _connected(values, region),
    )
    dense = torch.tensor([1.0, 0, 0, 0, 0, 0], dtype=values.dtype, device=values.device)
    features = torch.stack([f.to(values) for f in found], dim=-1)
    flat = levels.amax((-2, -1)) == 0
    return torch.where(flat[..., None], dense, features).to(result_dtype(maps))


@dataclass(frozen=True)
class Reliability(Logistic):
    r"""Logistic regression on :func:`map_features`: the probability that a map localises an object.

    Args:
        weights, bias, mean, std, fitted_on: as in
            :class:`~captum_dcam.metrics.logistic.Logistic`.
        features (tuple of str): what the features are, those of :func:`map_features` first.
            Default: those alone
    """

    features: tuple[str, ...] = MAP_FEATURES

    format: ClassVar[str] = "captum_dcam.reliability/1"
    made_by: ClassVar[str] = "map_features(maps)"

    @classmethod
    def check_features(cls, names: Sequence[str]) -> None:
        if tuple(names[: len(MAP_FEATURES)]) != MAP_FEATURES:
            raise InputError(
                f"features are {tuple(names)}: expected {MAP_FEATURES} first; fit it again with "
                "this version"
            )

    def score(self, maps: Tensor) -> Tensor:
        """Probability (...) that maps (..., H, W) localise an object; near 0: trust no region."""
        return self.probability(map_features(maps))


def _autocorrelation(levels: Tensor) -> Tensor:
    away = levels - levels.mean((-2, -1), keepdim=True)
    across = (away[..., :, 1:] * away[..., :, :-1]).sum((-2, -1))
    down = (away[..., 1:, :] * away[..., :-1, :]).sum((-2, -1))
    h, w = levels.shape[-2:]
    pairs = h * (w - 1) + (h - 1) * w
    variance = away.square().mean((-2, -1))
    moran = (across + down) / max(pairs, 1) / variance.masked_fill(variance == 0, 1)
    return moran.clamp(-1, 1)


def _separability(levels: Tensor, region: Tensor) -> Tensor:
    count = levels.shape[-2:].numel()
    above = region.sum((-2, -1)).to(levels.dtype)
    total = levels.sum((-2, -1))
    inside = (levels * region).sum((-2, -1))
    shift = inside / above.clamp(min=1) - (total - inside) / (count - above).clamp(min=1)
    between = above * (count - above) / count**2 * shift.square()
    variance = levels.var((-2, -1), unbiased=False)
    return (between / variance.masked_fill(variance == 0, 1)).clamp(0, 1)


def _connected(values: Tensor, region: Tensor) -> Tensor:
    leading, size = values.shape[:-2], values.shape[-2:]
    mass = values.reshape(-1, *size).cpu().numpy()
    structure = np.zeros((3, 3, 3), dtype=int)
    structure[1] = 1  # neighbours within a map, never across maps
    labels, parts = ndimage.label(region.reshape(-1, *size).cpu().numpy(), structure)
    heavy = np.bincount(labels.ravel(), mass.ravel(), minlength=parts + 1)
    owner = np.zeros(parts + 1, dtype=int)
    owner[labels] = np.arange(len(mass))[:, None, None]
    best = np.zeros(len(mass))
    np.maximum.at(best, owner[1:], heavy[1:])
    total = mass.sum((1, 2))
    share = torch.from_numpy(best / np.where(total == 0, 1, total)).reshape(leading)
    return share.to(values.device, values.dtype).clamp(0, 1)
