"""A given answer: its states, its scores, and what is refused."""

import pytest
import tiny
import torch

from captum_dcam.errors import TargetError
from captum_dcam.explaining import explain_generation
from captum_dcam.model.answers import force
from captum_dcam.model.forward import DenoisingForward


@pytest.mark.parametrize("cache", tiny.CACHES)
def test_every_token_is_read_with_all_others_visible(cache):
    forward = tiny.bound(cache)
    made = force(forward, "a red circle .")
    mask = forward.adapter.mask_id
    assert forward.adapter.token_texts(made.tokens[0].tolist()) == [" a", " red", " circle", " ."]
    for t in range(4):
        expected = made.tokens[0].clone()
        expected[t] = mask
        assert torch.equal(made.states[0][t, 0], expected)
        logits = forward(forward.request.pixels, *forward.arguments((t, 5)))
        probability = logits[0, t].double().softmax(-1)[made.tokens[0, t]]
        assert float(made.confidence[0, t]) == pytest.approx(float(probability), rel=1e-4)
    assert made.valid_ratio == (1 / 5 if cache == "prefix" else 1)


def test_its_words_are_explained_like_any_others():
    forward = tiny.bound("prefix")
    force(forward, "a red circle .")
    found = explain_generation(forward, ["circle"], score="teacher")
    assert found.answer == "a red circle ." and found.words == ("circle",)
    assert bool(found.maps[0].any())


def test_token_ids_do_as_well():
    forward = tiny.bound("none")
    ids = forward.adapter.encode("a red circle .")
    assert force(forward, ids).tokens[0].tolist() == ids


def test_bad_input():
    forward = tiny.bound("none")
    with pytest.raises(TargetError, match="has no token"):
        force(forward, "")
    with pytest.raises(ValueError, match="one example"):
        force(tiny.bound("none", batch=2), "a")


@pytest.mark.parametrize("cache", tiny.CACHES)
def test_nothing_has_to_be_generated_first(cache):
    generated = tiny.bound(cache)
    fresh = DenoisingForward(generated.adapter, generated.layer)
    found = force(fresh, "a red circle", generated.request)
    expected = force(generated, "a red circle")
    assert fresh.request is generated.request and fresh.trajectory is found
    assert torch.equal(found.confidence, expected.confidence)
    assert found.lengths == expected.lengths and found.cache == cache
