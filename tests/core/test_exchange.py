"""A word of an answer is exchanged: both explanations, and how far the maps moved."""

import numpy as np
import pytest
import tiny
import torch
from scipy.stats import spearmanr

import captum_dcam
from captum_dcam.errors import InputError, TargetError
from captum_dcam.viewer import edit_sheet

ANSWER = "a red circle and a blue circle ."


@pytest.fixture(scope="module")
def adapter():
    return tiny.adapter("prefix")


def exchanged(adapter, word, other, *words, **how):
    asked = {"answer": ANSWER, **how}
    image, prompt = tiny.picture(), tiny.PROMPT
    return captum_dcam.exchange_word(adapter, image, prompt, word, other, *words, **asked)


@pytest.fixture(scope="module")
def edit(adapter):
    return exchanged(adapter, "red", "light green", ["red", "blue circle", "red circle"])


def test_both_answers_are_explained_as_given_ones(adapter, edit):
    """Behind the exchanged word all moves on by as many tokens as the new one has more."""
    assert edit.before.words == ("red", "blue circle", "red circle")
    assert edit.after.words == ("light green", "blue circle", "light green circle")
    assert edit.after.answer == "a <unk> green circle and a blue circle ."
    assert [t.positions for t in edit.after.targets] == [(1, 2), (6, 7), (1, 2, 3)]
    assert edit.exchanged == (True, False, True)
    ids = edit.after.trajectory.tokens[0].tolist()
    for one, answer in ((edit.before, ANSWER), (edit.after, ids)):
        alone = captum_dcam.explain(
            adapter, tiny.picture(), tiny.PROMPT, list(one.targets), answer=answer
        )
        assert torch.equal(alone.maps[0], one.maps[0]) and one.trajectory.forced


def test_how_far_maps_moved_is_what_others_compute(edit):
    both = [e.maps[0].double().numpy() for e in (edit.before, edit.after)]
    grid = edit.before.layout.grids[0]
    for n, record in enumerate(edit.records()):
        one, other = (maps[n] for maps in both)
        assert record["correlation"] == pytest.approx(spearmanr(one.ravel(), other.ravel())[0])
        count = round(0.1 * one.size)
        tops = [set(np.argsort(-m.ravel(), kind="stable")[:count].tolist()) for m in (one, other)]
        assert record["overlap"] == pytest.approx(len(tops[0] & tops[1]) / len(tops[0] | tops[1]))
        centres = []
        for values in (one, other):
            x0, y0, x1, y1 = grid.box(*np.unravel_index(values.argmax(), values.shape))
            centres.append(np.array([x0 + x1, y0 + y1]) / 2)
        apart = np.linalg.norm(centres[0] - centres[1]) / np.hypot(*grid.image_size)
        assert record["distance"] == pytest.approx(float(apart))
    assert edit_sheet(edit, width=400).width == 400


def test_a_filled_answer_does_as_well(adapter):
    image, prompt, answer = tiny.picture(), tiny.PROMPT, "[MASK:2] red ."
    before = captum_dcam.explain(adapter, image, prompt, answer=answer).answer
    filled = exchanged(adapter, "red", "blue", "red", answer=answer)
    assert filled.before.answer == before and filled.after.answer == before.replace("red", "blue")


@pytest.mark.parametrize(
    ("word", "other", "how", "error", "message"),
    [
        ("green", "red", {}, TargetError, "word 'green' is not in the answer"),
        ("circle", "star", {}, TargetError, "stands in the answer 2 times: give more of the text"),
        ("red", " ", {}, TargetError, "other is ' ': expected a text"),
        ("red", "red", {}, InputError, "word and other are both 'red'"),
        ("red", "blue", {"gen_length": 3}, TypeError, "gen_length"),
        ("red", "blue", {"generation": {"steps": 3}}, InputError, "steps beside an answer"),
        ("red", "blue", {"answer": "a [mask]"}, InputError, "expected .MASK. for one token"),
    ],
)
def test_bad_input(adapter, word, other, how, error, message):
    with pytest.raises(error, match=message):
        exchanged(adapter, word, other, **how)
