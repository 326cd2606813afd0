r"""Metrics of an evaluation: functions of a variant's maps, found by name.

A metric gets a :class:`VariantMaps` and returns :class:`Scores`: columns of one value per
word (None where it is not defined for the word), and values of the whole image. To add one::

    >>> @register_metric("coverage")
    ... def coverage(case: VariantMaps, threshold: float = 0.5) -> Scores:
    ...     at = case.where("object")
    ...     covered = (case.pixels[at] > threshold).float().mean((1, 2))
    ...     return Scores(case.columns(at, coverage=covered))
    >>> METRICS.remove("coverage")
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor

from captum_dcam.errors import InputError
from captum_dcam.evaluation.words import Word, stacked
from captum_dcam.faithfulness import Explain
from captum_dcam.files import Record, plain
from captum_dcam.metrics import (
    LocalizationScores,
    energy_pointing_game,
    function_iou,
    gini_index,
    hoyer,
    joint_min_max,
    map_features,
    normalized_entropy,
    noun_threshold,
    otsu_threshold,
    phrase_iou,
    pointing_game,
)
from captum_dcam.metrics import localization as localization_scores
from captum_dcam.model.forward import DenoisingForward
from captum_dcam.model.tagging import NOUN_TAGS
from captum_dcam.model.trajectory import Score
from captum_dcam.refine import min_max
from captum_dcam.refine.checks import check_number
from captum_dcam.registry import Registry


class Scores(NamedTuple):
    """Columns of one value per word, None where there is none; values of the image."""

    words: dict[str, list[Any]]
    image: dict[str, Any] = {}  # noqa: RUF012  never written to


@dataclass(frozen=True, eq=False)
class VariantMaps:
    r"""Maps of N words of one image by one variant; all of them complete.

    Args:
        words (tuple of Word): N.
        maps (tuple of Tensor): one (N, h, w) per grid: non-negative, after refinements.
        raw (tuple of Tensor): the same with the method's own sign and scale.
        text (Tensor or None): (N, K) relevance of text tokens, on the scale of ``raw``.
        masks (dict): (H, W) bool of every object that a word names.
        forward (DenoisingForward): with the bound generation, tapped at the variant's block.
        explain (callable or None): ``(forward, targets) -> maps``, the variant on another forward;
            None for maps that look at no model.
        score (str or int): state that the variant read.
        refined (bool): whether refinements were applied.
        seed (int): of everything that a metric draws.
    """

    words: tuple[Word, ...]
    maps: tuple[Tensor, ...]
    raw: tuple[Tensor, ...]
    text: Tensor | None
    masks: dict[str, Tensor] = field(repr=False)
    forward: DenoisingForward = field(repr=False)
    explain: Explain | None = field(default=None, repr=False)
    score: Score = "commit"
    refined: bool = False
    seed: int = 0

    @cached_property
    def pixels(self) -> Tensor:
        """Maps (N, H, W) of the first grid in the pixels of its image, as masks are."""
        return self.forward.request.layout.grids[0].to_pixels(self.maps[0])

    def generator(self) -> torch.Generator:
        """A new source of randomness, the same on every machine."""
        return torch.Generator().manual_seed(self.seed)

    def where(self, *kinds: str) -> list[int]:
        """Words of these kinds; "object" only where the mask holds a pixel."""
        found = [i for i, w in enumerate(self.words) if w.kind in kinds]
        return [i for i in found if self.words[i].kind != "object" or self._masked(self.words[i])]

    def _masked(self, word: Word) -> bool:
        return any(bool(self.masks[name].any()) for name in word.objects)

    def classes(self, at: Sequence[int]) -> Tensor:
        """Masks (n, C, H, W) of words that name objects."""
        return stacked([self.words[i] for i in at], self.masks)

    def columns(self, at: Sequence[int], **values: Tensor | Sequence[Any]) -> dict[str, list[Any]]:
        """Values of the words ``at``, spread over all words."""
        return {
            name: spread(numbers(own) if isinstance(own, Tensor) else own, at, len(self.words))
            for name, own in values.items()
        }


def spread(values: Sequence[Any], at: Sequence[int], count: int) -> list[Any]:
    """Values of the words ``at`` in a column of ``count`` words; None for the others."""
    column: list[Any] = [None] * count
    for i, value in zip(at, values, strict=True):
        column[i] = value
    return column


def numbers(values: Tensor) -> list[Any]:
    """Python floats; those of float32 with the fewest digits that tell them apart.

    What is not a number becomes None, as JSON has it.
    """
    if values.ndim > 1:
        return [numbers(row) for row in values]
    values = values.detach().cpu()
    if values.dtype == torch.float64:
        flat = values.tolist()
    else:
        flat = [float(text) for text in values.float().numpy().astype(str)]
    return [value if math.isfinite(value) else None for value in flat]


Metric = Callable[..., Scores]
#: metric name → function of a case and its settings
METRICS: Registry[Metric] = Registry("metric", given=1, listed="captum_dcam.evaluation.METRICS")
register_metric = METRICS.register
#: what the metric ``localization`` gives of every word
LOCALIZATION_SCORES = tuple(f.name for f in fields(LocalizationScores))


def metric_record(value: str | Mapping[str, Any]) -> Record:
    r"""A metric's name and all its settings; errors name what is known.

    ``label`` goes before the names of its columns, so that one metric can be asked for twice.
    """
    label = ""
    if isinstance(value, Mapping):
        value = {**value}
        label = str(value.pop("label", ""))
    return {**plain(METRICS.record(plain(value))), "label": label}


def measure(case: VariantMaps, metrics: Sequence[Mapping[str, Any]]) -> Scores:
    """All metrics of a case; two that claim one column are an error."""
    words: dict[str, list[Any]] = {}
    image: dict[str, Any] = {}
    for record in metrics:
        settings = dict(record)
        name, label = settings.pop("name"), settings.pop("label")
        found = METRICS[name](case, **settings)
        before = f"{label}_" if label else ""
        for out, given in ((words, found.words), (image, found.image)):
            own = {f"{before}{key}": value for key, value in given.items()}
            if twice := out.keys() & own.keys():
                raise InputError(
                    f"metric {name!r} gives {sorted(twice)}, as another does: label it"
                )
            out.update(own)
    return Scores(words, image)


@register_metric("localization")
def localization(case: VariantMaps) -> Scores:
    """Obj-IoU, contrast, concentration and F3 of words with a mask (Diffusion-CAM, Eq. 14-17)."""
    if not (at := case.where("object")):
        return Scores({})
    found = localization_scores(case.pixels[at], case.classes(at))
    return Scores(case.columns(at, **{n: getattr(found, n) for n in LOCALIZATION_SCORES}))


@register_metric("plausibility")
def plausibility(case: VariantMaps) -> Scores:
    r"""TAM's protocol (Eq. 8 and 9).

    ``phrase_iou`` of words with a mask, the best over the words of a name that were explained;
    ``otsu``, the threshold of every noun; and of function words the share below the image's mean
    noun threshold: ``func_iou_image`` on the method's own scale, ``func_iou_map`` with every map
    from 0 to 1, and ``func_iou_joint`` with every map from the lowest to the highest value of map
    and text (Eq. 3), where the method gives text relevance and nothing was applied after it.
    """
    objects, functions = case.where("object"), case.where("function")
    nouns = [
        i for i, w in enumerate(case.words) if w.kind in ("object", "noun") or w.tag in NOUN_TAGS
    ]
    best = []
    for head in objects:  # over the words of a name
        parts = [i for i, w in enumerate(case.words) if w.phrase == case.words[head].phrase]
        best += numbers(phrase_iou(case.pixels[parts], case.classes([head])[0])[None])
    out = case.columns(objects, phrase_iou=best)
    out |= case.columns(nouns, otsu=otsu_threshold(case.pixels[nouns]) if nouns else ())
    scales = {"image": case.pixels, "map": joint_min_max(case.pixels)}
    if case.text is not None and not case.refined:
        # NaN marks text that takes no part: a value of the map itself changes no bound
        own_value = case.pixels[:, :1, 0].expand(case.text.shape)
        text = torch.where(case.text.isnan(), own_value, case.text.relu().to(own_value))
        scales["joint"] = joint_min_max(case.pixels, text)
    image = {}
    for name, maps in scales.items():
        own: list[Any] = [None] * len(functions)
        if nouns:
            image[f"noun_threshold_{name}"] = numbers(noun_threshold(maps[nouns])[None])[0]
            own = numbers(function_iou(maps[functions], maps[nouns])) if functions else []
        out |= case.columns(functions, **{f"func_iou_{name}": own})
    return Scores(out, image)


def _check_tolerance(tolerance: float) -> None:
    check_number(tolerance, "pointing", "tolerance")


@register_metric("pointing", _check_tolerance)
def pointing(case: VariantMaps, tolerance: float = 0.0) -> Scores:
    """Whether the maximum lies on the mask; the share of the energy in the objects' boxes."""
    if not (at := case.where("object")):
        return Scores({})
    maps, masks = case.pixels[at], case.classes(at)
    hits = pointing_game(maps, masks, tolerance)
    return Scores(
        case.columns(at, pointing=hits, energy_pointing=energy_pointing_game(maps, masks))
    )


@register_metric("sparseness")
def sparseness(case: VariantMaps) -> Scores:
    """Gini index, entropy and Hoyer's measure of every map, on the grid of image tokens."""
    at, maps = range(len(case.words)), case.maps[0]
    return Scores(
        case.columns(at, gini=gini_index(maps), entropy=normalized_entropy(maps), hoyer=hoyer(maps))
    )


@register_metric("features")
def features(case: VariantMaps) -> Scores:
    """What :class:`captum_dcam.metrics.Reliability` is fitted on, on the grid of image tokens."""
    found = map_features(case.maps[0])
    return Scores(case.columns(range(len(case.words)), features=numbers(found)))


def map_statistics(levels: Tensor) -> dict[str, Tensor]:
    r"""Mean, population standard deviation and skewness (N,) of maps (N, h, w), in float64.

    The skewness of a constant map is 0.
    """
    levels = levels.double().flatten(1)
    mean = levels.mean(1)
    away = levels - mean[:, None]
    std = away.square().mean(1).sqrt()
    skewness = away.pow(3).mean(1) / std.pow(3).masked_fill(std == 0, 1)
    return {"mean": mean, "std": std, "skewness": skewness.masked_fill(std == 0, 0)}


@register_metric("statistics")
def statistics(case: VariantMaps) -> Scores:
    """What thresholds of refinements are fitted on: ``peak`` of the raw map, and mean, standard
    deviation and skewness of the positive part from 0 to 1, on the grid of image tokens."""
    raw = case.raw[0]
    found = {f"map_{n}": v.float() for n, v in map_statistics(min_max(raw.relu())).items()}
    return Scores(case.columns(range(len(case.words)), peak=raw.amax((-2, -1)), **found))
