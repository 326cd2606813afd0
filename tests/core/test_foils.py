"""Why this word and not that one: foils, from their text to the difference of logits."""

import sys
from pathlib import Path

import pytest
import tiny
import torch

import captum_dcam
from captum_dcam import DiffusionCAM, Explanation, explain_generation, sign_check
from captum_dcam.errors import InputError, InputTypeError, TargetError
from captum_dcam.maps import Reading, word_maps
from captum_dcam.methods.text_relevance import text_relevance
from captum_dcam.model.answers import force
from captum_dcam.model.foils import with_foils
from captum_dcam.model.gradients import target_gradients
from captum_dcam.model.words import Target, resolve

sys.path.insert(0, str(Path(__file__).parent.parent / "adapters"))  # importlib mode does not

import made_ar


def spoken(cache="prefix", answer="a red circle and a blue star"):
    """The tiny model with an answer that is known."""
    forward = tiny.bound(cache)
    force(forward, answer)
    return forward


def ids(forward):
    return forward.trajectory.tokens[0].tolist()


def named(forward, text):
    return resolve(forward.adapter, ids(forward), text)


# -- from text to ids ------------------------------------------------------------------------------


def test_a_foil_is_the_tokens_of_its_text():
    forward = spoken()
    adapter, tokens = forward.adapter, ids(forward)
    (red,) = with_foils(adapter, tokens, named(forward, "red"), "green")
    assert red.foil_ids == tuple(adapter.encode("green")) and red.positions == (1,)
    (phrase,) = with_foils(adapter, tokens, named(forward, "red circle"), " blue ring ")
    assert phrase.foil_ids == tuple(adapter.encode("blue ring"))
    both = with_foils(adapter, tokens, named(forward, ["Red", "star"]), {"red": "blue"})
    assert [t.foil_ids for t in both] == [tuple(adapter.encode("blue")), None]
    assert with_foils(adapter, tokens, both, None) == both


@pytest.mark.parametrize("kind", made_ar.KINDS)
def test_a_foil_is_split_as_in_the_words_place(kind):
    """Byte-level and sentencepiece vocabularies put the blank into the word's own token."""
    adapter = made_ar.adapter(kind)
    for text in ("a red circle", " a red circle"):
        tokens = adapter.encode(text)
        for word, foil in (("red", "blue"), ("circle", "square")):
            (target,) = with_foils(adapter, tokens, resolve(adapter, tokens, word), foil)
            other = adapter.encode(text.replace(word, foil, 1))
            assert len(other) == len(tokens)
            assert target.foil_ids == tuple(other[p] for p in target.positions)


@pytest.mark.parametrize(
    ("foil", "error", "message"),
    [
        ("zebra", TargetError, "'zebra' reads ' <unk>' in the vocabulary of mini"),
        ("blue star", TargetError, r"has 2 tokens \[' blue', ' star'\], the word 'red' has 1"),
        ("red", TargetError, "is the word itself"),
        ({"zebra": "red"}, TargetError, "foil for 'zebra', which is not explained"),
        ("", InputTypeError, "foil is ''"),
        (" ", InputTypeError, "foil is ' '"),
        ({}, InputTypeError, "foil is {}"),
        ({"red": 3}, InputTypeError, "foil is {'red': 3}"),
        (["blue"], InputTypeError, r"foil is \['blue'\]"),
        (7, InputTypeError, "foil is 7"),
    ],
)  # fmt: skip
def test_what_is_no_foil_is_refused_before_any_work(foil, error, message, monkeypatch):
    forward = spoken()
    monkeypatch.setattr(forward.adapter, "denoise", pytest.fail)
    with pytest.raises(error, match=message):
        explain_generation(forward, ["red"], foil=foil)
    with pytest.raises(error, match=message):
        captum_dcam.compare_generation(forward, ["red"], ["finer_cam"], foil=foil)
    if error is InputTypeError:
        monkeypatch.setattr(forward.adapter, "generate", pytest.fail)
        for call in (captum_dcam.explain, captum_dcam.compare):
            with pytest.raises(error, match=message):
                call(forward.adapter, tiny.picture(), tiny.PROMPT, foil=foil)


def test_targets_check_their_foils():
    with pytest.raises(TargetError, match="2 token ids and 1 foil ids"):
        Target("x", (0, 1), (3, 4), (5,))
    with pytest.raises(TargetError, match="is the word itself"):
        Target("x", (0,), (3,), (3,))
    with pytest.raises(TargetError, match="expected integers"):
        Target("x", (0,), (3,), ("four",))
    forward = spoken()
    far = Target("x", (0,), (3,), (10**6,))
    with pytest.raises(TargetError, match=r"1000000.* out of"):
        explain_generation(forward, [far])
    with pytest.raises(TargetError, match=r"1000000.* out of"):
        DiffusionCAM(forward).attribute(forward.request.pixels, far)


# -- the difference of logits ----------------------------------------------------------------------


def target_with(forward, *foil):
    positions = tuple(range(1, 1 + len(foil)))
    return Target("w", positions, tuple(ids(forward)[p] for p in positions), foil)


def test_gradients_are_those_of_the_difference(cache):
    """Recomputed by autograd on the whole forward, one score of four logits."""
    forward = tiny.bound(cache, dtype=torch.float64)
    word = target_with(forward, 7, 9)
    rows = target_gradients(forward, [word], score="final")
    seen = []
    handle = forward.tap.register_forward_pre_hook(lambda _m, maps: seen.extend(maps))
    state = forward.arguments(score="final")
    logits = forward(forward.request.pixels, *state)[0]
    handle.remove()
    own, other = word.token_ids, word.foil_ids
    score = sum(logits[p, t] - logits[p, f] for p, t, f in zip((1, 2), own, other, strict=True))
    (expected,) = torch.autograd.grad(score, seen)
    assert len(rows) == 1 and tiny.relative(rows[0].gradients[0], expected[0]) < 1e-9


def test_linear_maps_are_differences_of_maps(cache):
    """Each token and its foil are read at the token's own step; Captum's and ours agree."""
    forward = tiny.bound(cache, dtype=torch.float64)
    word = target_with(forward, 7, 9)
    foil = Target("foil", word.positions, word.foil_ids)
    plain = Target("plain", word.positions, word.token_ids)
    for reading in (Reading("commit", "positionwise", True), Reading(2, "pooled")):
        (maps,) = word_maps(forward, [word, plain, foil], [0] * 3, reading)
        assert tiny.relative(maps[0], maps[1] - maps[2]) < 1e-9
    cam = DiffusionCAM(forward, preset="base")
    one = target_with(forward, 7)
    own, other = ((1, one.token_ids[0]), (1, 7))
    pixels, how = forward.request.pixels, {"relu_attributions": False, "score": "commit"}
    found, a, b = (cam.attribute(pixels, t, **how) for t in (one, own, other))
    assert tiny.relative(found, a - b) < 1e-9
    with pytest.raises(InputError, match="one with a foil two logits"):
        cam.attribute(pixels, one, forward.arguments(own))


def test_text_relevance_and_sign_check_are_of_the_difference():
    forward = tiny.bound("prefix", dtype=torch.float64)
    word = target_with(forward, 7)
    parts = [word, Target("", (1,), word.token_ids), Target("", (1,), (7,))]
    found = text_relevance(forward, parts)
    whole, own, other = found.maps[0]
    assert tiny.relative(whole, own - other) < 1e-5
    whole, own, other = found.values
    assert torch.allclose(whole, own - other, equal_nan=True, atol=1e-6)
    with pytest.raises(InputError, match="'tam' differentiates no difference of logits"):
        text_relevance(forward, [word], by="activation")
    maps = [torch.arange(64.0).view(1, 8, 8)]
    whole, own, other = (
        sign_check(forward, [t], maps, torch.Generator().manual_seed(0)) for t in parts
    )
    assert torch.allclose(whole, own - other, atol=1e-9)


def test_a_token_that_word_and_foil_share_counts_for_nothing(cache):
    """Also where it is read in a state of its own, in which nothing else is."""
    forward = tiny.bound(cache, dtype=torch.float64)
    own = ids(forward)
    shared, alone = target_with(forward, 7, own[2]), target_with(forward, 7)
    assert shared.terms == alone.terms and [p.positions for p in shared.parts] == [(1,)]
    for reading in (Reading(), Reading("final")):
        (maps,) = word_maps(forward, [shared, alone], [0, 0], reading)
        assert tiny.relative(maps[0], maps[1]) < 1e-9
    for name in ("layer_grad_cam", "attn_lrp", "llava_cam"):
        found = [
            captum_dcam.compare_generation(forward, [t], [name], errors="raise").rows[0].raw[0]
            for t in (shared, alone)
        ]
        assert tiny.relative(*found) < 1e-5


# -- explanations ----------------------------------------------------------------------------------


def test_an_explanation_says_and_keeps_its_foils(tmp_path):
    forward = spoken()
    found = explain_generation(forward, ["red", "star"], foil={"red": "green"}, refinements=[])
    plain = explain_generation(forward, ["red", "star"], refinements=[])
    assert not torch.equal(found.maps[0][0], plain.maps[0][0])
    assert torch.equal(found.maps[0][1], plain.maps[0][1])
    assert found.settings["foil"] == {"red": "green"} and plain.settings["foil"] is None
    back = Explanation.load(found.save(tmp_path / "one"))
    assert back.targets == found.targets and back.targets[0].foil_ids is not None
    assert back.settings["foil"] == {"red": "green"}
    compared = captum_dcam.compare_generation(forward, ["red"], ["finer_cam"], foil="green")
    again = captum_dcam.Comparison.load(compared.save(tmp_path / "many"))
    assert again.targets == compared.targets and again.settings["foil"] == "green"


def test_one_call_from_an_image():
    found = captum_dcam.explain(
        tiny.adapter("prefix"), tiny.picture(), tiny.PROMPT, [0], foil="star", gen_length=4
    )
    assert found.targets[0].foil_ids is not None and found.maps[0].any()


def test_methods_without_a_difference_say_so():
    forward = spoken()
    found = captum_dcam.compare_generation(
        forward, ["red"], ["attention", "finer_cam"], foil="green", errors="report"
    )
    assert [row.status for row in found.rows] == ["failed", "done"]
    assert "choose one of attn_lrp, cp_lrp" in found.rows[0].note
    with pytest.raises(InputError, match="'attention' differentiates no difference"):
        captum_dcam.compare_generation(
            forward, ["red"], ["finer_cam", "attention"], foil="green", errors="raise"
        )
