r"""How well a word's map localises, fitted to a model: from masks, and function words."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch

from captum_dcam import maps
from captum_dcam.calibration.maps import listed_errors
from captum_dcam.evaluation.plan import Plan, Variant
from captum_dcam.evaluation.trial import Trial
from captum_dcam.metrics import Reliability
from captum_dcam.model.adapter import Adapter
from captum_dcam.model.progress import ProgressLike, as_progress
from captum_dcam.model.tagging import DEFAULT_TAGGER
from captum_dcam.presets import Preset
from captum_dcam.truth.localising import FEATURES, features

#: fewer words of a kind than these fit nothing
LEAST = 10


def fit_reliability(
    adapter: Adapter,
    data: Any,
    ids: Iterable[Any],
    preset: Preset,
    *,
    layer: int | None = None,
    prompt: str | None = None,
    generation: dict[str, Any] | None = None,
    seed: int = 0,
    progress: ProgressLike = None,
) -> Reliability | None:
    r"""Tell words for masked objects from function words by their maps before refinements.

    Args:
        adapter, data, ids, preset, layer, prompt, generation, seed, progress: as for
            :func:`captum_dcam.calibration.collect`.

    Returns:
        Reliability: or None where there are fewer than :data:`LEAST` words of a kind.

    Raises:
        CalibrationError: an image cannot be read or explained (named).
        MissingPackageError: without scikit-learn.
    """
    variant = Variant("maps", "diffusion_cam", layer=layer)
    kinds = ("object", "function")
    plan = Plan((variant,), prompt=prompt, words=kinds, seed=seed, generation=generation or {})
    trial, reading = Trial(plan, adapter), preset.reading(tagger=DEFAULT_TAGGER)
    rows, labels, every = [], list[bool](), tuple(ids)
    bar = as_progress(progress, "reliability")
    bar.begin(len(every))
    try:
        for image_id in every:
            bar.say(f"{image_id}")
            with listed_errors(image_id):
                bound, _ = trial.answer(image_id, data.sample(image_id))
                targets = [w.target for w in bound.words]
                if targets:
                    signed = maps.word_maps(bound.forward, targets, [0] * len(targets), reading)
                    rows.append(features(signed, maps.contexts_of(bound.forward)))
                    labels += [w.kind == "object" for w in bound.words]
            bar.image()
    finally:
        bar.end()
    objects = sum(labels)
    if min(objects, len(labels) - objects) < LEAST:
        return None
    told = (
        f"probability, fitted on {objects} words for objects and {len(labels) - objects} function "
        f"words of {len(every)} images of {data.describe()['name']}, by {adapter.family} at block "
        f"{trial.layer}"
    )
    return Reliability.fit(torch.cat(rows), torch.tensor(labels), fitted_on=told, names=FEATURES)
