r"""Metrics of labelled words: scores from the steps, and what rivals and maps say.

Which of them tell true words from invented ones, the table ``inventions`` shows.
"""

from __future__ import annotations

import torch

from captum_dcam.data.common import LABELS
from captum_dcam.evaluation.measure import Scores, VariantMaps, register_metric
from captum_dcam.metrics import MAP_FEATURES, map_features
from captum_dcam.results.scores import COLUMNS
from captum_dcam.truth.rivals import internal_confidence, prelim_attention
from captum_dcam.truth.scores import overlaps, scores_of
from captum_dcam.truth.signs import sign_check
from captum_dcam.truth.steps import StepRecord

#: scores that come from the steps alone
FROM_STEPS = tuple(c for c in COLUMNS if c not in ("erased", "overlap", "grounded"))


@register_metric("word_scores")
def word_scores(case: VariantMaps) -> Scores:
    """What :func:`captum_dcam.word_scores` says of labelled words; ``true`` is 1 of true words and
    0 of invented ones, ``span`` numbers the spans of an image."""
    at = case.where("labelled")
    if not at:
        return Scores({})
    words = [case.words[i] for i in at]
    found = scores_of(StepRecord(case.forward, [w.target for w in words]))
    columns = {name: getattr(found, name).double() for name in FROM_STEPS}
    true = [float(w.label == LABELS[0]) for w in words]
    return Scores(case.columns(at, true=true, span=[w.span for w in words], **columns))


@register_metric("rivals")
def rivals(case: VariantMaps) -> Scores:
    """VL-interp's internal confidence and PAS of labelled words."""
    at = case.where("labelled")
    if not at:
        return Scores({})
    targets = [case.words[i].target for i in at]
    inside = internal_confidence(case.forward, targets)
    prelim = prelim_attention(case.forward, targets)
    return Scores(case.columns(at, internal_confidence=inside, prelim_attention=prelim))


@register_metric("evidence")
def evidence(case: VariantMaps) -> Scores:
    r"""What a word's map looks like, for labelled words; ``map_…``.

    The features of :func:`captum_dcam.metrics.map_features` before refinements, on the grid with
    the highest peak; ``map_peak_value`` and ``map_mass`` on the method's own scale;
    ``map_overlap`` with the other words of the phrase; ``map_erased``, the fall of the word when
    what the map highlights is removed.
    """
    at = case.where("labelled")
    if not at:
        return Scores({})
    targets = [case.words[i].target for i in at]
    raw = [m[at].relu().double() for m in case.raw]
    peaks = torch.stack([m.amax((-2, -1)) for m in raw])
    best = peaks.argmax(0).tolist()
    features = torch.cat([map_features(raw[grid][n][None]) for n, grid in enumerate(best)])
    columns = {f"map_{name}": features[:, i] for i, name in enumerate(MAP_FEATURES)}
    falls = sign_check(case.forward, targets, raw, case.generator(), score=case.score)
    columns |= {
        "map_peak_value": peaks.amax(0),
        "map_mass": torch.stack([m.sum((-2, -1)) for m in raw]).sum(0),
        "map_overlap": overlaps(targets, raw),
        "map_erased": falls[:, 0],
    }
    return Scores(case.columns(at, **columns))
