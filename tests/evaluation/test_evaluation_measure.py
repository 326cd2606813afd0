"""Metrics of the harness: each against the library or by hand; and how words find their masks."""

import json
import math
from dataclasses import replace

import numpy as np
import pytest
import tiny
import torch
from evaluation import made

from captum_dcam import faithfulness
from captum_dcam.evaluation.measure import (
    METRICS,
    Scores,
    VariantMaps,
    measure,
    metric_record,
    numbers,
    register_metric,
)
from captum_dcam.evaluation.words import read_answer, read_masks
from captum_dcam.methods import AttributionTask, method
from captum_dcam.metrics import (
    binarize_otsu,
    function_iou,
    gini_index,
    localization,
    map_features,
    noun_threshold,
    obj_iou,
    pointing_game,
)
from captum_dcam.model.answers import force

TEXT = "a red circle and the star in the image ."


class Thing(made.Thing):
    def __init__(self, name, seed, names):
        super().__init__(name, seed)
        self.names = names


THINGS = [
    Thing("red circle", 1, ("red circle", "circle")),
    Thing("blue circle", 2, ("blue circle", "circle")),
    Thing("star", 3, ("star", "stars")),
    Thing("ring", 4, ("ring",)),
]


def bound(text=TEXT):
    forward = tiny.bound("prefix", gen_length=2)
    force(forward, text)
    return forward


def case(kinds=("object", "modifier", "noun", "function"), text=TEXT, relevance=None, **more):
    forward = bound(text)
    words = tuple(w for w in read_answer(forward, THINGS).words if w.kind in kinds)
    masks = read_masks(words, THINGS, (60, 80))
    raw = torch.randn(len(words), 8, 8, generator=torch.Generator().manual_seed(0))
    return VariantMaps(words, (raw.relu(),), (raw,), relevance, masks, forward, **more)


def values(column):
    return torch.tensor([v for v in column if v is not None])


def test_words_and_what_they_name():
    answer = read_answer(bound(), THINGS)
    found = [(w.target.text, w.kind, w.name, w.objects) for w in answer.words]
    assert found == [
        ("a", "function", None, ()),
        ("red", "modifier", "red circle", ("red circle",)),
        ("circle", "object", "red circle", ("red circle",)),
        ("and", "function", None, ()),
        ("the", "function", None, ()),
        ("star", "object", "star", ("star",)),
        ("in", "other", None, ()),
        ("the", "function", None, ()),
        ("image", "noun", None, ()),
    ]
    assert [w.phrase for w in answer.words][1:6] == [0, 0, None, None, 1]
    assert answer.tagger and answer.lemmatizer


def test_a_name_of_several_objects_and_a_word_that_a_tagger_takes_for_a_verb():
    circles = read_answer(bound("two circles ."), THINGS).words[-1]
    assert circles.objects == ("red circle", "blue circle") and circles.name == "circle"
    cross = Thing("green cross", 5, ("green cross", "cross"))
    words = read_answer(bound("a green cross ."), [cross]).words
    assert [w.kind for w in words] == ["function", "modifier", "object"]


def test_only_masks_that_are_named_are_read(monkeypatch):
    words = read_answer(bound(), THINGS).words
    monkeypatch.setattr(THINGS[3], "mask", lambda: 1 / 0, raising=False)
    assert set(read_masks(words, THINGS, (60, 80))) == {"red circle", "star"}


def test_localization_of_one_and_of_several_objects():
    one = case(text="two circles and a star .")
    found = measure(one, [metric_record("localization")]).words
    at = [i for i, w in enumerate(one.words) if w.kind == "object"]
    for i in at:
        masks = torch.stack([one.masks[name] for name in one.words[i].objects])
        expected = localization(one.pixels[i], masks)
        for name in ("obj_iou", "contrast", "concentration", "f3"):
            assert found[name][i] == pytest.approx(float(getattr(expected, name)), rel=1e-6)
    assert all(found["f3"][i] is None for i in range(len(one.words)) if i not in at)
    assert len(one.words[at[0]].objects) == 2


@pytest.mark.parametrize("head_is_best", [True, False])
def test_plausibility_by_hand(head_is_best):
    one = case()
    texts = [w.target.text for w in one.words]
    red, circle, star, image = (texts.index(t) for t in ("red", "circle", "star", "image"))
    order = list(range(len(texts)))
    if not head_is_best:
        order[red], order[circle] = circle, red
    one = replace(one, maps=(one.maps[0][order],), raw=(one.raw[0][order],))
    scores = measure(one, [metric_record("plausibility")])
    mask = one.masks["red circle"]
    own = [float(obj_iou(one.pixels[i], mask)) for i in (red, circle)]
    assert (own[1] > own[0]) is head_is_best
    assert scores.words["phrase_iou"][circle] == pytest.approx(max(own))
    assert scores.words["phrase_iou"][red] is None
    region = binarize_otsu(one.pixels[star])
    truth = one.masks["star"]
    iou = float((region & truth).sum() / (region | truth).sum())
    assert scores.words["phrase_iou"][star] == pytest.approx(iou)
    nouns = one.pixels[[circle, star, image]]
    limit = float(noun_threshold(nouns))
    assert scores.image["noun_threshold_image"] == pytest.approx(limit)
    for i, word in enumerate(one.words):
        if word.kind == "function":
            expected = float((one.pixels[i] < limit).float().mean())
            assert scores.words["func_iou_image"][i] == pytest.approx(expected, abs=1e-6)
            stretched = float(function_iou(one.pixels[i : i + 1], nouns, "map"))
            assert scores.words["func_iou_map"][i] == pytest.approx(stretched, abs=1e-6)
        else:
            assert scores.words["func_iou_image"][i] is None
    assert "func_iou_joint" not in scores.words


def test_text_that_is_louder_than_the_picture_lowers_the_joint_maps():
    quiet = torch.zeros(8, 5)
    loud = quiet.clone()
    words = [w.target.text for w in case().words]
    loud[words.index("and")] = 100.0  # a function word that the text explains
    loud[:, 0] = float("nan")
    columns = [
        measure(case(relevance=text), [metric_record("plausibility")]).words["func_iou_joint"]
        for text in (quiet, loud)
    ]
    assert columns[1][words.index("and")] == 1.0 > columns[0][words.index("and")]
    assert columns[1][words.index("a")] == columns[0][words.index("a")]
    refined = measure(case(relevance=loud, refined=True), [metric_record("plausibility")])
    assert "func_iou_joint" not in refined.words


def test_an_answer_without_nouns_has_no_threshold():
    scores = measure(case(text="a and the ."), [metric_record("plausibility")])
    assert scores.words["func_iou_image"] == [None] * 3 and scores.image == {}
    both = [metric_record(m) for m in ("localization", "pointing", "placebo", "faithfulness")]
    assert measure(case(text="a and the ."), both) == Scores({}, {})


def test_pointing_sparseness_features_and_statistics():
    one = case()
    names = ("pointing", "sparseness", "features", "statistics")
    found = measure(one, [metric_record(n) for n in names]).words
    star = [w.target.text for w in one.words].index("star")
    assert found["pointing"][star] == float(pointing_game(one.pixels[star], one.masks["star"]))
    assert values(found["gini"]).allclose(gini_index(one.maps[0]))
    assert torch.tensor(found["features"]).allclose(map_features(one.maps[0]), rtol=1e-6)
    for i, raw in enumerate(one.raw[0]):
        flat = raw.relu().double().flatten().numpy()
        flat = (flat - flat.min()) / (flat.max() - flat.min())
        skewness = ((flat - flat.mean()) ** 3).mean() / flat.std() ** 3
        expected = (raw.max(), flat.mean(), flat.std(), skewness)
        for name, value in zip(
            ("peak", "map_mean", "map_std", "map_skewness"), expected, strict=True
        ):
            assert found[name][i] == pytest.approx(float(value), rel=1e-5)


def test_placebo_is_the_other_objects_map():
    one = case()
    found = measure(one, [metric_record("placebo")]).words
    circle, star = (i for i, w in enumerate(one.words) if w.kind == "object")
    for own, other in ((circle, star), (star, circle)):
        mask = one.masks[one.words[own].objects[0]]
        expected = localization(one.pixels[other], mask)
        assert found["placebo_f3"][own] == pytest.approx(float(expected.f3), abs=1e-7)
        assert found["placebo_obj_iou"][own] == pytest.approx(float(expected.obj_iou), abs=1e-7)


def test_faithfulness_is_the_librarys():
    one = case(("object", "function"))
    settings = {"name": "faithfulness", "fractions": [0, 0.5, 1], "curves": True}
    found = measure(one, [metric_record(settings)]).words
    at = [i for i, w in enumerate(one.words) if w.kind == "object"]
    targets = [one.words[i].target for i in at]
    for name in ("deletion", "insertion"):
        expected = getattr(faithfulness, name)(
            one.forward,
            targets,
            [one.maps[0][at]],
            fractions=(0, 0.5, 1),
            generator=one.generator(),
        )
        assert values(found[name]).allclose(expected.auc.float())
        assert values(found[f"{name}_gain"]).allclose(expected.gain.float())
        assert [len(c) for c in found[f"{name}_curve"] if c] == [3, 3]
    assert found["deletion"].count(None) == len(one.words) - 2


def test_probes_that_explain_again():
    def explain(forward, targets):
        return method("diffusion_cam_base").attribute(AttributionTask(forward, targets)).maps

    one = case(("object",), explain=explain)
    names = [
        {"name": "sensitivity", "samples": 2},
        {"name": "randomization", "stages": 2},
        {"name": "infidelity", "samples": 4},
        "answer_shuffle",
        {"name": "arcc", "baseline": "mean"},
    ]
    found = measure(one, [metric_record(n) for n in names])
    assert all(len(column) == 2 for column in found.words.values())
    assert found.image["randomization_stages"] == ["block 3", "block 2"]
    assert [len(c) for c in found.words["randomization_spearman"]] == [2, 2]
    targets = [w.target for w in one.words]
    expected = faithfulness.arcc(one.forward, targets, one.maps, explain, baseline="mean")
    assert values(found.words["arcc_removal"]).allclose(expected.removal.float())
    json.dumps(found, allow_nan=False)
    floor = measure(case(("object",)), [metric_record(n) for n in names])
    assert set(floor.words) == {"infidelity"}  # nothing to explain again


def test_labels_and_columns_that_collide():
    one = case(("object",))
    near = metric_record({"name": "pointing", "tolerance": 100.0, "label": "near"})
    found = measure(one, [metric_record("pointing"), near]).words
    assert set(found) == {"pointing", "energy_pointing", "near_pointing", "near_energy_pointing"}
    assert found["near_pointing"] == [1.0, 1.0]
    with pytest.raises(ValueError, match="as another does: label it"):
        measure(one, [near, near])


def test_a_metric_of_ones_own():
    try:

        @register_metric("brightness")
        def brightness(case, scale=2.0):
            at = case.where("object")
            means = case.pixels[at].mean((1, 2)) * scale
            return Scores(case.columns(at, brightness=means), {"words": len(case.words)})

        one = case(("object", "function"))
        found = measure(one, [metric_record({"name": "brightness", "scale": 3})])
        assert found.image == {"words": len(one.words)}
        assert values(found.words["brightness"]).allclose(
            3 * one.pixels[one.where("object")].mean((1, 2))
        )
        with pytest.raises(ValueError, match="belongs to"):
            register_metric("brightness")(lambda case: Scores({}))
    finally:
        METRICS.remove("brightness")


def test_a_word_whose_mask_is_empty_is_not_scored(monkeypatch):
    monkeypatch.setattr(THINGS[2], "mask", lambda: np.zeros((60, 80), dtype=bool), raising=False)
    one = case()
    found = measure(one, [metric_record("localization")]).words["f3"]
    assert found[[w.target.text for w in one.words].index("star")] is None


def test_numbers_keep_float32_exactly_and_shortly():
    given = torch.rand(50, 2, generator=torch.Generator().manual_seed(0))
    assert torch.equal(torch.tensor(numbers(given)), given)
    assert numbers(torch.tensor([0.1, float("nan"), float("inf")])) == [0.1, None, None]
    assert numbers(torch.tensor([math.pi], dtype=torch.float64)) == [math.pi]
