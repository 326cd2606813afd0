"""A verdict only by a calibrator that was fitted to these weights; and it is carried everywhere."""

from dataclasses import replace

import pytest
import tiny
import torch

from captum_dcam import Explanation, explain_generation, word_scores
from captum_dcam.files import VERSION
from captum_dcam.metrics import SCORE_FEATURES, Calibrator
from captum_dcam.model.answers import bind_answer
from captum_dcam.model.weights import fingerprint
from captum_dcam.presets import PRESETS, preset, write_preset
from captum_dcam.refine import Affinity, Compose
from captum_dcam.results.scores import UNFITTED
from captum_dcam.results.summary import summarise
from captum_dcam.truth.grounding import GIVEN, OTHER_WEIGHTS
from captum_dcam.truth.scores import overlaps, phrases
from captum_dcam.viewer import contact_sheet


def calibrator(forward, **changes):
    """By the probability alone: a word is grounded as its log odds say."""
    zeros = (0.0,) * len(SCORE_FEATURES)
    own = {"fitted_on": "made by hand", "tags": ("JJ", "NN", "NNS", "CD", "IN", "DT")}
    weights = fingerprint(forward.adapter.model)
    made = Calibrator((1.0, *zeros[1:]), 0.0, zeros, (1.0,) * len(zeros), model=weights, **own)
    return replace(made, **changes)


def chosen(fit):
    return replace(PRESETS["default"], calibrator=fit)


def test_a_word_is_doubted_where_the_calibrator_says_so():
    forward = tiny.bound("prefix")
    found = explain_generation(forward, preset=chosen(calibrator(forward))).trust.scores
    plain = word_scores(forward)
    judged = ~found.grounded.isnan()
    assert bool(judged.any()) and found.fitted and found.calibrator == "made by hand"
    expected = plain.probability.clamp(1e-9, 1 - 1e-9)
    assert torch.allclose(found.grounded[judged], expected[judged], atol=1e-4)
    assert found.doubted == tuple(bool(g < 0.5) for g in found.grounded)
    assert any(found.doubted)  # random weights are sure of nothing
    few = explain_generation(forward, preset=chosen(calibrator(forward, tags=("XX",)))).trust.scores
    assert bool(few.grounded.isnan().all()) and few.fitted and not any(few.doubted)


@pytest.mark.parametrize(
    ("fit", "says"),
    [
        (lambda f: None, UNFITTED),
        (lambda f: calibrator(f, model="other"), OTHER_WEIGHTS),
    ],
)
def test_nobody_judges_without_a_fit_to_these_weights(fit, says):
    forward = tiny.bound("prefix")
    found = explain_generation(forward, preset=chosen(fit(forward))).trust.scores
    assert found.calibrator == says and not found.fitted and not any(found.doubted)
    assert bool(found.grounded.isnan().all())


def test_a_given_answer_is_not_judged():
    forward = tiny.bound("prefix")
    fit = calibrator(forward)
    bind_answer(forward, forward.request, "a red ring", None, {})
    found = explain_generation(forward, preset=chosen(fit)).trust.scores
    assert found.calibrator == GIVEN and not any(found.doubted)


def test_an_explanation_carries_its_scores(tmp_path):
    """In its file, in rows and on the sheet; what its maps say is there as well."""
    forward = tiny.bound("prefix")
    file = tmp_path / "preset.json"
    stages = Compose([Affinity()])
    write_preset(file, "default", PRESETS["default"], stages, {}, calibrator=calibrator(forward))
    assert preset(file).calibrator == calibrator(forward)
    found = explain_generation(forward, preset=file)
    before = contact_sheet(found, width=600)
    scores = word_scores(found)
    assert scores is found.trust.scores
    assert torch.equal(scores.erased, found.trust.signs[:, 0].double())
    assert torch.equal(
        scores.overlap.nan_to_num(), overlaps(found.targets, found.maps).nan_to_num()
    )
    rows = summarise(found)
    assert [row.doubted for row in rows] == list(scores.doubted)
    assert all(("not grounded?" in row.said) == row.doubted for row in rows)
    assert contact_sheet(found, width=600).height > before.height
    again = Explanation.load(found.save(tmp_path / "saved")).trust.scores
    assert again.records() == scores.records() and again.calibrator == scores.calibrator
    assert VERSION == 5
    with pytest.raises(ValueError, match="targets beside an explanation"):
        word_scores(found, found.targets)


def test_phrases_are_nouns_and_what_belongs_to_them():
    from captum_dcam.model.words import Target

    def words(text):
        return [Target(w, (p,), (0,)) for p, w in enumerate(text.split()) if w not in ("a", ",")]

    def named(text):
        found = words(text)
        return [[found[n].text for n in phrase] for phrase in phrases(found)]

    assert named("a red circle and two blue stars .") == [["red", "circle"], ["blue", "stars"]]
    assert named("red , circle and ring") == []  # a comma parts them
    maps = torch.rand(5, 4, 4, generator=torch.Generator().manual_seed(0))
    targets = words("a red circle and a ring .")[:2]
    a, b = (m / m.max() for m in maps[:2].double())
    expected = float(torch.minimum(a, b).sum() / torch.maximum(a, b).sum())
    assert overlaps(targets, [maps[:2]]).tolist() == pytest.approx([expected] * 2)
