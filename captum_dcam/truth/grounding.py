r"""Is a word probably not grounded? Said only where a calibrator was fitted to these weights."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from importlib.resources import files

import torch

from captum_dcam.metrics import Calibrator
from captum_dcam.model.adapter import Adapter
from captum_dcam.model.forward import DenoisingForward
from captum_dcam.model.tagging import tag
from captum_dcam.model.weights import fingerprint
from captum_dcam.model.words import Target, words_of
from captum_dcam.presets import Preset
from captum_dcam.results.scores import UNFITTED, WordScores

#: why a calibrator of a preset does not speak
OTHER_WEIGHTS = (
    "the preset's calibrator was fitted to other weights: scores are no verdict; captum-dcam "
    "calibrate --inventions fits one to these"
)
GIVEN = "the answer was given, not chosen by the model: no calibrator judges its words"


@cache
def shipped() -> Calibrator:
    """Fitted on the embedded model's words by ``benchmarks/truth.py fit``."""
    return Calibrator.from_json((files("captum_dcam.mini") / "calibrator.json").read_text())


def calibrator_of(adapter: Adapter, chosen: Preset) -> Calibrator | None:
    """The fit to these weights: the preset's own, the embedded model's, or none."""
    known = [] if chosen.calibrator is None else [chosen.calibrator]
    known += [shipped()] if adapter.family == "mini" else []
    weights = fingerprint(adapter.model) if any(c.model for c in known) else ""
    return next((c for c in known if c.model in ("", weights)), None)


def judged(
    scores: WordScores, forward: DenoisingForward, targets: Sequence[Target], chosen: Preset
) -> WordScores:
    r"""Scores with a calibrator's probability that each word is grounded, where there is one.

    Args:
        scores (WordScores): of the words.
        forward (DenoisingForward): bound, one example.
        targets (sequence of Target): N words.
        chosen (Preset): whose calibrator speaks.
    """
    nobody = torch.full((len(targets),), torch.nan, dtype=torch.float64)
    if forward.trajectory.forced:
        return scores.judged(nobody, GIVEN, 0.0)
    fit = calibrator_of(forward.adapter, chosen)
    if fit is None:
        return scores.judged(nobody, OTHER_WEIGHTS if chosen.calibrator else UNFITTED, 0.0)
    words = words_of(forward.adapter, forward.trajectory.tokens[0].tolist())
    tags = tag([w.text for w in words])
    able = {p for w, t in zip(words, tags, strict=True) if t in fit.tags for p in w.positions}
    kept = torch.tensor([not able.isdisjoint(t.positions) for t in targets], dtype=torch.bool)
    found = fit.probability(scores.features).masked_fill(~kept, torch.nan)
    return scores.judged(found, fit.fitted_on, fit.below)
