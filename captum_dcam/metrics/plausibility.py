r"""TAM's protocol: object words on their masks, function words on nothing (Obj-, Func-, F1-IoU).

Obj-IoU and Func-IoU are counted word by word over a data set, then averaged, and the F1-IoU is that
of the two averages. Otsu's threshold is :func:`~captum_dcam.metrics.otsu.otsu_threshold`; the
authors' OpenCV call works on maps rounded to 8 bits and can differ from it by a level.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from captum_dcam.metrics._checks import checked_maps, result_dtype
from captum_dcam.metrics.localization_scores import obj_iou
from captum_dcam.metrics.otsu import otsu_threshold

#: Penn Treebank tags of words that are scored on masks (Supp. E)
OBJECT_WORD_TAGS = frozenset(("NN", "NNS", "NNP", "NNPS"))
#: tags of words that no pixel shows (Supp. E); IN and CD are left out, as they tell where and how
#: many. (:data:`captum_dcam.targets.FUNCTION_TAGS` is another set, that of SICD.)
FUNCTION_WORD_TAGS = frozenset(
    ("CC", "DT", "EX", "MD", "POS", "PRP", "PRP$", "UH", "WDT", "WP", "WP$", "WRB")
)
#: how :func:`function_iou` brings the maps of one image to one scale
SCALES = ("image", "map")


@dataclass(frozen=True)
class PlausibilityScores:
    """Means over a data set, in [0, 1]."""

    obj_iou: float
    func_iou: float
    f1_iou: float


@dataclass(frozen=True)
class WordMatch:
    r"""Words that name a masked object.

    Args:
        words (tuple of int): indices of consecutive words, as many as the name has.
        masks (tuple of int): indices of all masks of that name (its instances).
        name (str): of the masks.
    """

    words: tuple[int, ...]
    masks: tuple[int, ...]
    name: str


@dataclass(frozen=True)
class WordMatches:
    """What :func:`match_words_to_masks` found, and whose lemmas it compared."""

    matches: tuple[WordMatch, ...]
    lemmatizer: str


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
    checked_maps(maps)
    if maps.ndim < 3 or maps.shape[-3] == 0:
        raise ValueError(
            f"maps have shape {tuple(maps.shape)}: expected (..., K, H, W), one map for each of at "
            "least one token; a word of one token: maps[None]"
        )
    if not isinstance(masks, Tensor):
        raise TypeError(f"masks is a {type(masks).__name__}: use torch.as_tensor(masks)")
    if masks.ndim not in (maps.ndim - 1, maps.ndim):
        raise ValueError(
            f"masks have shape {tuple(masks.shape)} and maps {tuple(maps.shape)}: expected one "
            "(H, W) or C of them, (C, H, W), for all K tokens of a phrase"
        )
    per_token = masks.unsqueeze(maps.ndim - 3)
    shape = list(per_token.shape)
    shape[maps.ndim - 3] = maps.shape[-3]
    return obj_iou(maps, per_token.expand(shape)).amax(-1)


def noun_threshold(maps: Tensor) -> Tensor:
    r"""Mean of Otsu's thresholds of all noun tokens of one image: b of Eq. 9.

    Args:
        maps (Tensor): (n, H, W), n at least 1, non-negative.

    Returns:
        Tensor: (), in the units of the maps.

    Source:
        TAM section 3.4.
    """
    values = checked_maps(maps)
    if values.ndim != 3 or len(values) == 0:
        raise ValueError(
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
        raise ValueError(f"scale is {scale!r}: expected one of {SCALES}")
    values, nouns = checked_maps(function_maps), checked_maps(noun_maps)
    if values.ndim != 3 or values.shape[-2:] != nouns.shape[-2:]:
        raise ValueError(
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
    values = checked_maps(maps)
    pool = values.flatten(-2)
    if text is not None:
        if text.shape[:-1] != maps.shape[:-2] or not bool(torch.isfinite(text).all()):
            raise ValueError(
                f"text has shape {tuple(text.shape)} and maps {tuple(maps.shape)}: expected a "
                "finite (..., K) for maps (..., H, W)"
            )
        pool = torch.cat((pool, text.detach().to(values)), dim=-1)
    low, high = pool.amin(-1)[..., None, None], pool.amax(-1)[..., None, None]
    # halves, so that the span of the largest floats does not overflow
    spread = high / 2 - low / 2
    levels = (values / 2 - low / 2) / spread.masked_fill(spread == 0, 1)
    return levels.clamp(0, 1).to(result_dtype(maps))


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
            raise ValueError(
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
            raise ValueError(
                f"{name} has shape {tuple(scores.shape)}: expected one score a word, at least one"
            )
    means = [float(scores.double().mean()) for scores in (obj.cpu(), func.cpu())]
    return PlausibilityScores(means[0], means[1], float(f1_iou(*means)))


def match_words_to_masks(
    words: Sequence[str], tags: Sequence[str], names: Sequence[str]
) -> WordMatches:
    r"""Which words name which masks: nouns whose lemma is that of a mask's name.

    Names of several words ("traffic light") want all of them in a row; the longest name wins, and
    no word is used twice. Case does not matter. Two words are equal when one's form or lemma is the
    other's, because a lemmatizer may cut a singular ("glass") down as well.

    Args:
        words (sequence of str): of an answer, in order.
        tags (sequence of str): their Penn Treebank tags, see :func:`captum_dcam.targets.tag`; the
            last word of a match must have one of :data:`OBJECT_WORD_TAGS`.
        names (sequence of str): one a mask; equal names are instances of one object.

    Returns:
        WordMatches: in the order of the words, and ``"wordnet"`` (NLTK's lemmatizer, the
        authors', where its data is installed) or ``"textblob"`` (whose rules ship with it).

    Source:
        TAM section 4.1 and Supp. E.
    """
    if len(words) != len(tags):
        raise ValueError(f"{len(words)} words and {len(tags)} tags: expected one tag a word")
    lemma, source = _lemmatizer()
    forms = [_forms(word, lemma) for word in words]
    wanted: dict[str, list[int]] = {}
    for index, name in enumerate(names):
        wanted.setdefault(" ".join(name.lower().split()), []).append(index)
    parts = {name: [_forms(part, lemma) for part in name.split()] for name in wanted if name}
    longest_first = sorted(parts, key=lambda name: -len(parts[name]))
    found: list[WordMatch] = []
    start = 0
    while start < len(words):
        for name in longest_first:
            end = start + len(parts[name])
            run = forms[start:end]
            if len(run) < len(parts[name]) or tags[end - 1] not in OBJECT_WORD_TAGS:
                continue
            if all(a & b for a, b in zip(run, parts[name], strict=True)):
                found.append(WordMatch(tuple(range(start, end)), tuple(wanted[name]), name))
                start = end - 1
                break
        start += 1
    return WordMatches(tuple(found), source)


def _forms(word: str, lemma: Callable[[str], str]) -> frozenset[str]:
    lower = word.lower()
    return frozenset((lower, str(lemma(lower))))


def _lemmatizer() -> tuple[Callable[[str], str], str]:
    r"""NLTK's noun lemmatizer where WordNet is installed, else TextBlob's singular."""
    import nltk

    for where in ("corpora/wordnet", "corpora/wordnet.zip"):
        try:
            nltk.data.find(where)
        except LookupError:
            continue
        return nltk.stem.WordNetLemmatizer().lemmatize, "wordnet"  # of nouns, by default
    from textblob.inflect import singularize

    return singularize, "textblob"
