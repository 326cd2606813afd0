"""What an explanation says of itself: each part against the slow way, now or later, or saved."""

import json
import pickle

import numpy as np
import pytest
import tiny
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

import captum_dcam
from captum_dcam import Explanation, explain_generation, sign_check
from captum_dcam.adapters.common.drawn import drawn
from captum_dcam.data.scenes import HELD_OUT, make_scene
from captum_dcam.errors import ExplanationError, NotBoundError
from captum_dcam.maps import odds_of
from captum_dcam.methods.text_relevance import text_relevance
from captum_dcam.metrics import MAP_FEATURES, Reliability, map_features
from captum_dcam.model.words import Target
from captum_dcam.presets import PRESETS, preset, write_preset
from captum_dcam.refine import Affinity, Compose, RefineContext
from captum_dcam.results.scores import COLUMNS
from captum_dcam.results.summary import summarise
from captum_dcam.results.trust import LATER, Trust
from captum_dcam.truth.localising import FEATURES, UNCALIBRATED, features, localises, shipped


@pytest.fixture(params=[1, 2], ids=["one image", "two images"])
def forward(cache, request):
    return tiny.bound(cache, images=request.param)


def test_now_is_what_later_finds(forward):
    """Eagerly from the passes of the maps, or when it is asked for; the maps are the same bits."""
    later, now = (explain_generation(forward, trust=trust) for trust in (False, True))
    assert not later.trust.parts and set(now.trust.parts) == set(LATER)
    assert all(map(torch.equal, later.maps, now.maps))
    assert torch.allclose(later.trust.signs, now.trust.signs, atol=1e-5)
    assert torch.allclose(later.trust.probabilities, now.trust.probabilities, atol=1e-5)
    for one, two in ((later.trust.text, now.trust.text),):
        assert torch.allclose(one.values, two.values, atol=1e-4, equal_nan=True)
    assert torch.allclose(later.trust.shares, now.trust.shares, atol=1e-4)
    for name in COLUMNS:
        one, two = (getattr(e.trust.scores, name).double() for e in (later, now))
        assert torch.allclose(one, two, atol=1e-3, equal_nan=True), name
    assert set(later.trust.parts) == set(LATER)


def test_each_part_is_what_its_own_function_finds(forward):
    found = explain_generation(forward, preset="base").trust
    drawn_from = torch.Generator().manual_seed(0)
    maps = explain_generation(forward, preset="base").maps
    targets = explain_generation(forward, preset="base").targets
    falls = sign_check(forward, targets, maps, drawn_from, score="final")
    assert torch.allclose(found.signs, falls, atol=1e-5)
    text = text_relevance(forward, targets, score="final").normalised()
    assert torch.allclose(found.text.values, text.values, atol=1e-4, equal_nan=True)
    assert float(found.text.values.nan_to_num().abs().max()) <= 1


def test_probabilities_are_those_of_every_step_one_by_one(forward):
    found = explain_generation(forward, every_step=True)
    assert torch.allclose(
        found.trust.probabilities, found.steps.probabilities, atol=1e-5, equal_nan=True
    )
    target, steps = found.targets[2], forward.trajectory.steps
    for step in range(steps):
        with torch.no_grad():
            logits = forward.replay(torch.tensor([0]), torch.tensor([step]))[0]
        odds = odds_of(forward, target, 0, step, logits)
        assert float(found.trust.probabilities[step, 2]) == pytest.approx(odds, abs=1e-5)


def test_candidates_are_the_three_likeliest_at_the_commit_step(forward):
    found = explain_generation(forward)
    for target, word in zip(found.targets, found.trust.candidates, strict=True):
        for position, own, token in zip(target.positions, target.token_ids, word, strict=True):
            step = forward.trajectory.step_of(0, position, "commit")
            with torch.no_grad():
                logits = forward.replay(torch.tensor([0]), torch.tensor([step]))[0, position]
            odds, ids = logits.double().softmax(-1).sort(descending=True)
            assert [c.id for c in token] == ids[:3].tolist() and token[0].id == own
            assert [c.probability for c in token] == pytest.approx(odds[:3].tolist(), rel=1e-4)
    rows = summarise(found)
    assert all(len(row.instead) == 2 and row.word not in dict(row.instead) for row in rows)


def test_shares_add_up_and_follow_the_relevance():
    found = explain_generation(tiny.bound("prefix"), trust=True).trust
    shares, text = found.shares, found.text
    assert torch.allclose(shares.sum(1), torch.ones(len(shares)))
    for n, row in enumerate(shares.tolist()):
        image = sum(float(m[n].clamp(min=0).sum()) for m in text.maps)
        spoken = [v for v in text.values[n].tolist() if v > 0]
        assert row[0] == pytest.approx(image / (image + sum(spoken)), rel=1e-4)


def test_a_given_answer_has_no_steps():
    """Its probabilities by step are missing, the rest is there."""
    adapter = tiny.adapter("prefix")
    found = captum_dcam.explain(
        adapter, tiny.picture(), tiny.PROMPT, answer="a red ring", trust=True
    ).trust
    assert found.probabilities.isnan().all() and found.signs.isfinite().all()


def test_no_word_and_one_token_answers(cache):
    none = features([torch.zeros(0, 4, 4)], [RefineContext(features=torch.ones(3, 4, 4))])
    assert none.shape == (0, 7) and localises(none, None).shape == (0,)
    assert sign_check(tiny.bound(cache), [], [], torch.Generator()).shape == (0, 2)
    one = explain_generation(tiny.bound(cache, gen_length=1), [0], trust=True)
    assert one.trust.signs.shape == (1, 2) and len(one.trust.candidates[0]) == 1


# -- how well a map localises ----------------------------------------------------------------------


def test_features_are_those_of_the_map_and_its_agreement():
    drawn_from = torch.Generator().manual_seed(0)
    seed, states = (torch.rand(*s, generator=drawn_from) for s in ((3, 6, 7), (5, 6, 7)))
    context = RefineContext(features=states)
    found = features([seed], [context])
    assert FEATURES == (*MAP_FEATURES, "agreement") and found.shape == (3, 7)
    assert torch.allclose(found[:, :6], map_features(seed.double()))
    for n, one in enumerate(seed.double()):
        spread = Affinity()(one.float(), context).double()
        expected = float((one * spread).sum() / one.sum() / spread.max())
        assert float(found[n, 6]) == pytest.approx(expected, rel=1e-4)


def test_what_is_spread_thinly_beside_a_blob_lowers_the_agreement():
    """Nine tokens alike of height 1, eight that resemble no other of height 0.4: the square of
    propagation leaves 1 and 0.16 of them."""
    states = torch.randn(40, 8, 8, generator=torch.Generator().manual_seed(0))
    states[:, 2:5, 2:5] = 3
    blob, dots = torch.zeros(8, 8), torch.zeros(8, 8)
    blob[2:5, 2:5], dots[6:, ::2] = 1, 0.4
    found = features([torch.stack((blob, blob + dots))], [RefineContext(features=states)])
    assert float(found[0, 6]) == pytest.approx(1, abs=1e-5)
    assert float(found[1, 6]) == pytest.approx((9 + 8 * 0.064) / (9 + 8 * 0.4), abs=0.03)
    assert localises(found, None).tolist() == pytest.approx(found[:, 6].tolist())


def test_a_map_without_anything_localises_nothing():
    found = features([torch.zeros(1, 4, 4)], [RefineContext(features=torch.ones(3, 4, 4))])
    assert found[0].tolist() == [1, 0, 0, 0, 0, 0, 0]
    assert float(localises(found, shipped())) == 0 == float(localises(found, None))


def test_the_grid_with_the_highest_peak_counts():
    one, two = torch.rand(2, 1, 5, 5, generator=torch.Generator().manual_seed(3))
    contexts = [RefineContext(features=torch.ones(2, 5, 5))] * 2
    both, high = features([one, 3 * two], contexts), features([3 * two], contexts[:1])
    assert torch.allclose(both[:, :6], high[:, :6])


def test_the_embedded_model_has_a_fit_and_others_say_that_they_have_none(cache):
    adapter = captum_dcam.load("mini", cache=cache)
    forward = captum_dcam.DenoisingForward(adapter)
    scene = make_scene(HELD_OUT, 12)
    forward.generate(adapter.prepare([[scene.image]], [tiny.PROMPT]), gen_length=8)
    found = explain_generation(forward).trust
    assert found.calibrated and "embedded model" in found.source
    for other in ({"preset": "base"}, {"score": "final"}, {"backward": "exact"}):
        trust = explain_generation(forward, **other).trust
        assert not trust.calibrated and trust.source == UNCALIBRATED and not any(trust.doubtful)


def test_a_preset_file_carries_a_fit_of_its_own(tmp_path):
    drawn_from = torch.Generator().manual_seed(0)
    values, labels = torch.rand(40, 7, generator=drawn_from), torch.arange(40) < 20
    fit = Reliability.fit(values, labels, fitted_on="forty words", names=FEATURES)
    file = tmp_path / "preset.json"
    write_preset(file, "default", PRESETS["default"], Compose([Affinity()]), {}, reliability=fit)
    assert preset(file).reliability == fit
    found = explain_generation(tiny.bound("prefix"), preset=file).trust
    assert found.calibrated and found.source == "forty words"


# -- pictures of a kind that the model never saw ---------------------------------------------------


def test_scenes_are_drawn_and_photographs_are_not():
    assert all(drawn(make_scene(HELD_OUT, index).image) for index in range(25))
    skimage = pytest.importorskip("skimage.data")
    for name in ("astronaut", "coffee", "cat", "camera", "coins"):
        assert not drawn(Image.fromarray(getattr(skimage, name)())), name
    plain = Image.fromarray(np.full((40, 60, 3), 255, dtype=np.uint8))
    assert not drawn(plain)


def test_the_warning_is_there_where_people_look(tmp_path):
    adapter = captum_dcam.load("mini")
    grey = Image.new("RGB", (60, 40), (120, 120, 120))
    found = captum_dcam.explain(adapter, grey, tiny.PROMPT, [0], gen_length=4)
    assert "this picture is none" in found.trust.warning
    assert Explanation.load(found.save(tmp_path / "saved")).trust.warning == found.trust.warning


# -- saved, copied, damaged ------------------------------------------------------------------------


def test_what_is_there_is_saved(forward, tmp_path):
    found = explain_generation(forward, trust=True)
    again = Explanation.load(found.save(tmp_path / "whole")).trust
    assert again.candidates == found.trust.candidates and again.later is None
    for name in ("signs", "probabilities", "localises", "shares"):
        assert torch.equal(getattr(again, name), getattr(found.trust, name))
    assert again.text.tokens.token_texts == found.trust.text.tokens.token_texts


def test_what_was_not_there_is_missed_by_name(tmp_path):
    found = explain_generation(tiny.bound("prefix"))
    assert float(found.trust.signs.sum()) != 0  # read, so it is saved
    again = Explanation.load(found.save(tmp_path / "part")).trust
    assert torch.equal(again.signs, found.trust.signs)
    with pytest.raises(NotBoundError, match=r"saved without text.*explain again"):
        _ = again.text
    copy = pickle.loads(pickle.dumps(found.trust))
    assert torch.equal(copy.signs, found.trust.signs)
    with pytest.raises(NotBoundError, match="without text"):
        copy.complete()
    assert isinstance(copy, Trust)


def test_what_was_explained_keeps_none_of_the_generations_outputs():
    forward = tiny.bound("none")
    assert forward.trajectory.kept["calls"]
    found = explain_generation(forward)
    assert "calls" not in found.trust.later._forward.trajectory.kept


@pytest.mark.parametrize(
    "name, value",
    [("signs", torch.zeros(3, 1)), ("probabilities", torch.zeros(2, 2)), ("localises", None)],
)
def test_damage_is_named(tmp_path, name, value):
    folder = explain_generation(tiny.bound("prefix"), trust=True).save(tmp_path / "damaged")
    tensors = load_file(folder / "tensors.safetensors")
    del tensors[f"trust.{name}"]
    if value is not None:
        tensors[f"trust.{name}"] = value
    save_file(tensors, folder / "tensors.safetensors")
    manifest = json.loads((folder / "manifest.json").read_text())
    from captum_dcam.files import sealed
    from captum_dcam.results.manifests import hashes

    files = hashes(f for f in folder.iterdir() if f.name != "manifest.json")
    old = {n: v for n, v in manifest.items() if n != "digest"} | {"files": files}
    (folder / "manifest.json").write_text(json.dumps(sealed(old)))
    with pytest.raises(ExplanationError, match=rf"trust\.{name}"):
        Explanation.load(folder)


def test_maps_of_every_step_bring_the_probabilities():
    """They are not computed twice, and are the same."""
    forward = tiny.bound("prefix")
    found = explain_generation(forward, every_step=True)
    assert found.trust.parts["probabilities"] is found.steps.probabilities


def test_a_token_that_word_and_foil_share_has_no_candidates():
    """It is read nowhere, where no other token of the word is read at its step."""
    forward = tiny.bound("prefix")
    tokens, steps = forward.trajectory.tokens[0].tolist(), forward.trajectory.commit_step[0]
    own = (tokens[1], tokens[4])
    other = next(t for t in range(5, 20) if t not in own)
    assert int(steps[1]) != int(steps[4])
    word = Target("word", (1, 4), own, (other, own[1]))
    found = explain_generation(forward, [word], trust=True)
    assert [len(c) for c in found.trust.candidates[0]] == [3, 0]
    assert summarise(found)[0].instead


def test_known_propagated_maps_are_not_made_again():
    """The default preset's own maps: the same features to the bit."""
    drawn_from = torch.Generator().manual_seed(0)
    seed, states = (torch.randn(*s, generator=drawn_from) for s in ((3, 6, 7), (5, 6, 7)))
    context = RefineContext(features=states)
    spread = Affinity()(seed.relu(), context)
    made, given = features([seed], [context]), features([seed], [context], [spread])
    assert torch.equal(made, given)
