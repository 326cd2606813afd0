r"""How few pixels hold a map? Gini index, entropy and Hoyer's measure, all blind to scale.

A map that singles nothing out (constant, all zero, or of one pixel) is at the dense end of each:
Gini 0, entropy 1, Hoyer 0.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from captum_dcam.metrics._checks import checked_maps, result_dtype, unit_peak


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
