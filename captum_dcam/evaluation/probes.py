r"""Metrics that run the model again, or draw: faithfulness and sanity (expensive; object words).

They wrap :mod:`captum_dcam.faithfulness`. ``kinds`` says which words are measured.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from captum_dcam import checks
from captum_dcam import faithfulness as tests
from captum_dcam.evaluation.measure import Scores, VariantMaps, register_metric
from captum_dcam.evaluation.plan import check_known
from captum_dcam.evaluation.words import KINDS
from captum_dcam.faithfulness import BASELINES, FRACTIONS
from captum_dcam.faithfulness.captum_metrics import check_radius
from captum_dcam.faithfulness.curves import check_settings
from captum_dcam.faithfulness.reading import check_counts
from captum_dcam.metrics import localization
from captum_dcam.model.trajectory import SCORES, Score, check_score
from captum_dcam.model.words import Target

OBJECTS = ("object",)


def _asked(case: VariantMaps, kinds: Sequence[str]) -> tuple[list[int], tuple[Target, ...]]:
    at = case.where(*kinds)
    return at, tuple(case.words[i].target for i in at)


def _check_words(kinds: Sequence[str], state: Score) -> None:
    for kind in kinds:
        check_known("unknown kind of word", kind, KINDS)
    check_score(state, what="state")


def _check_curves(kinds: Sequence[str], curves: bool, state: Score, **settings: Any) -> None:
    _check_words(kinds, state)
    check_settings(**settings)


def _check_samples(
    kinds: Sequence[str],
    samples: int,
    baseline: str = BASELINES[0],
    radius: float = 1,
    chunk: int = 1,
    state: Score = SCORES[0],
) -> None:
    _check_words(kinds, state)
    check_counts(samples=samples, chunk=chunk)
    checks.choice("baseline", baseline, BASELINES)
    check_radius(radius)


@register_metric("faithfulness", _check_curves)
def faithfulness(
    case: VariantMaps,
    baseline: str = "mean",
    where: str = "pixels",
    patch: int = 1,
    controls: int = 1,
    fractions: Sequence[float] = FRACTIONS,
    chunk: int = 8,
    curves: bool = False,
    kinds: Sequence[str] = OBJECTS,
    state: Score = "commit",
) -> Scores:
    r"""Deletion and insertion under a fixed answer, see :func:`captum_dcam.faithfulness.deletion`.

    The word is read in ``state`` whatever state the map came from: masked, as it was when it was
    written. Read visible it would be given away, and methods could not be compared.

    Columns: ``deletion`` and ``insertion`` (areas), ``…_gain`` over random orders,
    ``…_normalized`` (None for words that the image does not support) and, with ``curves``, the
    word's probability at every fraction.
    """
    at, targets = _asked(case, kinds)
    out: dict[str, list[object]] = {}
    for name, test in (("deletion", tests.deletion), ("insertion", tests.insertion)):
        columns: dict[str, Tensor] = {}
        if at:
            found = test(
                case.forward,
                targets,
                [m[at] for m in case.maps],
                baseline=baseline,
                where=where,
                patch=patch,
                fractions=tuple(fractions),
                score=state,
                controls=controls,
                generator=case.generator(),
                chunk=chunk,
            )
            columns[name], columns[f"{name}_normalized"] = found.auc, found.normalized_auc
            if controls:
                columns[f"{name}_gain"] = found.gain
            if curves:
                columns[f"{name}_curve"] = found.probability
        out |= case.columns(at, **columns)
    return Scores(out)


def _check_arcc(kinds: Sequence[str], baseline: str, chunk: int, state: Score) -> None:
    _check_words(kinds, state)
    check_settings(baseline, "pixels", 1, chunk)


@register_metric("arcc", _check_arcc)
def arcc(
    case: VariantMaps,
    baseline: str = "inpaint",
    chunk: int = 8,
    kinds: Sequence[str] = OBJECTS,
    state: Score = "commit",
) -> Scores:
    """pytorch-grad-cam's ARCC and its three parts, see :func:`captum_dcam.faithfulness.arcc`; the
    coherency takes the variant's map again, refined as it was."""
    at, targets = _asked(case, kinds)
    if not at or case.explain is None:
        return Scores({})
    found = tests.arcc(
        case.forward,
        targets,
        [m[at] for m in case.maps],
        case.explain,
        baseline=baseline,
        score=state,
        generator=case.generator(),
        chunk=chunk,
    )
    parts = {f"arcc_{n}": getattr(found, n) for n in ("coherency", "complexity", "removal")}
    return Scores(case.columns(at, arcc=found.value, **parts))


@register_metric("infidelity", _check_samples)
def infidelity(
    case: VariantMaps,
    baseline: str = "mean",
    samples: int = 32,
    chunk: int = 8,
    kinds: Sequence[str] = OBJECTS,
    state: Score = "commit",
) -> Scores:
    """Captum's infidelity of the signed map, or of the refined one where it was refined; of the
    word's logit in ``state``, whatever state the map came from."""
    at, targets = _asked(case, kinds)
    if not at:
        return Scores({})
    found = tests.infidelity(
        case.forward,
        targets,
        [m[at] for m in (case.maps if case.refined else case.raw)],
        baseline=baseline,
        score=state,
        samples=samples,
        generator=case.generator(),
        chunk=chunk,
    )
    return Scores(case.columns(at, infidelity=found))


@register_metric("sensitivity", _check_samples)
def sensitivity(
    case: VariantMaps, radius: float = 0.02, samples: int = 10, kinds: Sequence[str] = OBJECTS
) -> Scores:
    """Captum's max-sensitivity: the largest relative change of the map under small noise."""
    at, targets = _asked(case, kinds)
    if not at or case.explain is None:
        return Scores({})
    found = tests.sensitivity_max(
        case.forward,
        targets,
        case.explain,
        radius=radius,
        samples=samples,
        generator=case.generator(),
    )
    return Scores(case.columns(at, sensitivity=found))


@register_metric("answer_shuffle")
def answer_shuffle(case: VariantMaps, kinds: Sequence[str] = OBJECTS) -> Scores:
    """Rank correlation of a word's map with its map among shuffled other tokens."""
    at, targets = _asked(case, kinds)
    if not at or case.explain is None:
        return Scores({})
    found = tests.answer_shuffle(case.forward, targets, case.explain, case.generator())
    return Scores(case.columns(at, answer_shuffle=found))


@register_metric("randomization")
def randomization(
    case: VariantMaps, stages: int | Sequence[int] | None = None, kinds: Sequence[str] = OBJECTS
) -> Scores:
    """Rank correlation and structural similarity after stages of weights are drawn anew."""
    at, targets = _asked(case, kinds)
    if not at or case.explain is None:
        return Scores({})
    found = tests.parameter_randomization(
        case.forward, targets, case.explain, case.generator(), stages=stages
    )
    columns = {"randomization_spearman": found.spearman.T, "randomization_ssim": found.ssim.T}
    return Scores(case.columns(at, **columns), {"randomization_stages": list(found.stages)})


@register_metric("placebo")
def placebo(case: VariantMaps) -> Scores:
    """Obj-IoU and F3 of every object's mask with the map of another object's word."""
    at = case.where(*OBJECTS)
    owners = [case.words[i].objects for i in at]
    known = sorted(set(owners))
    if len(known) < 2:
        return Scores({})
    groups = torch.tensor([known.index(o) for o in owners])
    maps, masks, out = case.pixels[at], case.classes(at), {}
    for name in ("obj_iou", "f3"):

        def score(maps: Tensor, masks: Tensor, name: str = name) -> Tensor:
            found: Tensor = getattr(localization(maps, masks), name)
            return found

        _, other = tests.placebo(maps, masks, case.generator(), groups=groups, metric=score)
        out[f"placebo_{name}"] = other
    return Scores(case.columns(at, **out))
