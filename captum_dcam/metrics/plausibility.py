r"""TAM's protocol: object words on their masks, function words on nothing (Obj-, Func-, F1-IoU).

Obj-IoU and Func-IoU are counted word by word over a data set, then averaged, and the F1-IoU is that
of the two averages. Otsu's threshold is :func:`~captum_dcam.metrics.otsu.otsu_threshold`; the
authors' OpenCV call works on maps rounded to 8 bits and can differ from it by a level.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from captum_dcam.errors import InputError, InputTypeError
from captum_dcam.metrics._checks import checked_maps, result_dtype, stretched
from captum_dcam.metrics.localization_scores import obj_iou
from captum_dcam.metrics.otsu import otsu_threshold

#: how :func:`function_iou` brings the maps of one image to one scale
SCALES = ("image", "map")


@dataclass(frozen=True)
class PlausibilityScores:
    """Means over a data set, in [0, 1]."""

    obj_iou: float
    func_iou: float
    f1_iou: float


def phrase_iou(maps: Tensor, masks: Tensor) -> Tensor:
    r"""Obj-IoU of a word or phrase: the best over its tokens and over the object's instances.

    Degenerate cases as in :func:`obj_iou`: an empty mask or constant maps score 0.

    Args:
        maps (Tensor): (..., K, H, W), the maps of the phrase's K tokens, non-negative.
        masks (Tensor): bool (..., H, W), or (..., C, H, W) for C instances.

    Returns:
        Tensor: (...), in [0, 1].

    Raises:
        ValueError: no token, or as in :func:`obj_iou`.

    Source:
        TAM Eq. 8 and section 3.4.
    """
    checked_maps(maps, "phrase_iou")
    if maps.ndim < 3 or maps.shape[-3] == 0:
        raise InputError(
            f"maps have shape {tuple(maps.shape)}: expected (..., K, H, W), one map for each of at "
            "least one token; a word of one token: maps[None]"
        )
    if not isinstance(masks, Tensor):
        raise InputTypeError(f"masks is a {type(masks).__name__}: use torch.as_tensor(masks)")
    if masks.ndim not in (maps.ndim - 1, maps.ndim):
        raise InputError(
            f"masks have shape {tuple(masks.shape)} and maps {tuple(maps.shape)}: expected one "
            "(H, W) or C of them, (C, H, W), for all K tokens of a phrase"
        )
    before, own = masks.shape[: maps.ndim - 3], masks.shape[maps.ndim - 3 :]
    per_token = masks.unsqueeze(maps.ndim - 3).expand(*before, maps.shape[-3], *own)
    return obj_iou(maps, per_token).amax(-1)


def noun_threshold(maps: Tensor) -> Tensor:
    r"""Mean of Otsu's thresholds of all noun tokens of one image: b of Eq. 9.

    Args:
        maps (Tensor): (n, H, W), n at least 1, non-negative.

    Returns:
        Tensor: (), in the units of the maps.

    Source:
        TAM section 3.4.
    """
    values = checked_maps(maps, "noun_threshold")
    if values.ndim != 3 or len(values) == 0:
        raise InputError(
            f"noun maps have shape {tuple(maps.shape)}: expected (n, H, W) with at least one noun; "
            "an image without nouns has no threshold: leave its function words out"
        )
    return otsu_threshold(values).mean().to(result_dtype(maps))


def function_iou(function_maps: Tensor, noun_maps: Tensor, scale: str = "image") -> Tensor:
    r"""Func-IoU: the share of a function word's map that lies below the image's noun threshold.

    .. math:: \text{Func-IoU} = |(A < b) \cap J| / |(A < b) \cup J|, \quad J = 1

    The equation compares maps of different words, so their common scale decides. ``image``: the
    maps as the method gave them; one positive factor for all maps of an image changes nothing, a
    factor of its own for each word does. This is right for methods whose scale means something
    across words (logits and their gradients, ablations), and for maps through
    :func:`joint_min_max`, which are what TAM's authors score. ``map``: each map from its lowest to
    its highest value, for methods whose scale means nothing; then only the shape counts, and a weak
    map gets no credit for being weak.

    Degenerate cases follow the equation: below a threshold of 0 (all noun maps zero) lies nothing,
    so a method that returns zeros scores 0, not 1. With ``map`` a constant map is all zero.

    Args:
        function_maps (Tensor): (u, H, W), function words of one image, non-negative.
        noun_maps (Tensor): (n, H, W), all noun tokens of the same image, with or without a mask.
        scale (str, optional): ``image`` or ``map``. Default: ``"image"``

    Returns:
        Tensor: (u,), in [0, 1]; higher: fewer false positives.

    Raises:
        ValueError: no noun; maps of other shapes; another scale.

    Source:
        TAM Eq. 9.
    """
    if scale not in SCALES:
        raise InputError(f"scale is {scale!r}: expected one of {SCALES}")
    values = checked_maps(function_maps, "function_iou", "function_maps")
    nouns = checked_maps(noun_maps, "function_iou", "noun_maps")
    if values.ndim != 3 or values.shape[-2:] != nouns.shape[-2:]:
        raise InputError(
            f"function maps have shape {tuple(function_maps.shape)} and noun maps "
            f"{tuple(noun_maps.shape)}: expected (u, H, W) and (n, H, W) of one image"
        )
    if scale == "map":
        values, nouns = joint_min_max(values), joint_min_max(nouns)
    below = values < noun_threshold(nouns).to(values)
    return below.to(values.dtype).mean((-2, -1)).to(result_dtype(function_maps))


def joint_min_max(maps: Tensor, text: Tensor | None = None) -> Tensor:
    r"""Each word's map and text relevance, scaled together from lowest to highest value.

    Eq. 3: a word that is explained by the text keeps a faint map. Without ``text`` it is an
    ordinary min-max of each map. A constant map without text, or with text of the same value,
    becomes 0.

    Args:
        maps (Tensor): (..., H, W), non-negative.
        text (Tensor, optional): (..., K) relevance of text tokens, on the maps' scale; finite.

    Returns:
        Tensor: (..., H, W), in [0, 1].

    Source:
        TAM Eq. 3.
    """
    values = checked_maps(maps, "joint_min_max")
    pool = values.flatten(-2)
    if text is not None:
        if text.shape[:-1] != maps.shape[:-2] or not bool(torch.isfinite(text).all()):
            raise InputError(
                f"text has shape {tuple(text.shape)} and maps {tuple(maps.shape)}: expected a "
                "finite (..., K) for maps (..., H, W)"
            )
        pool = torch.cat((pool, text.detach().to(values)), dim=-1)
    low, high = pool.amin(-1)[..., None, None], pool.amax(-1)[..., None, None]
    return stretched(values, low, high).clamp(0, 1).to(result_dtype(maps))


def f1_iou(obj: Tensor | float, func: Tensor | float) -> Tensor:
    r"""Harmonic mean of Obj-IoU and Func-IoU; 0 if either is 0.

    Args:
        obj (Tensor or float): in [0, 1], a fraction.
        func (Tensor or float): in [0, 1], a fraction.

    Returns:
        Tensor: of the broadcast shape, float64 for two floats.

    Source:
        TAM Eq. 10.
    """
    pair = []
    for name, value in (("obj", obj), ("func", func)):
        score = value if isinstance(value, Tensor) else torch.tensor(value, dtype=torch.float64)
        good = torch.isfinite(score) & (score >= 0) & (score <= 1 + 1e-6)
        if not bool(good.all()):
            raise InputError(
                f"{name} holds {float(score[~good].flatten()[0])}: expected fractions from 0 to 1; "
                "divide per cent by 100"
            )
        pair.append(score)
    total = pair[0] + pair[1]
    both = torch.minimum(*pair) * (torch.maximum(*pair) / total.masked_fill(total == 0, 1))
    return 2 * both


def plausibility(obj: Tensor, func: Tensor) -> PlausibilityScores:
    r"""Means over all words of a data set, and the F1-IoU of the means.

    Args:
        obj (Tensor): (o,), :func:`phrase_iou` of every matched word of every image.
        func (Tensor): (u,), :func:`function_iou` of every function word of every image.

    Returns:
        PlausibilityScores: three floats.

    Raises:
        ValueError: no word of one kind: its mean is not defined.

    Source:
        TAM Eq. 8-10.
    """
    for name, scores in (("obj", obj), ("func", func)):
        if scores.ndim != 1 or len(scores) == 0:
            raise InputError(
                f"{name} has shape {tuple(scores.shape)}: expected one score per word, at least one"
            )
    means = [float(scores.double().mean()) for scores in (obj.cpu(), func.cpu())]
    return PlausibilityScores(means[0], means[1], float(f1_iou(*means)))
