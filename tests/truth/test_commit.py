"""The commit record of a word: every part against the steps, maps and gradients one by one."""

import math

import pytest
import tiny
import torch

from captum_dcam import commit_record, explain_generation, explain_steps, word_scores
from captum_dcam.errors import InfeasibleStepError, TargetError
from captum_dcam.methods.edited import pixel_fill, with_pixels
from captum_dcam.methods.text_relevance import text_relevance
from captum_dcam.model.answers import bind_answer
from captum_dcam.model.words import Target


def odds_of(forward, step, position):
    with torch.no_grad():
        return forward.replay(torch.tensor([0]), torch.tensor([step]))[0, position].double()


def late(forward):
    """The position that was committed last."""
    return int(forward.trajectory.commit_step[0].argmax())


def test_a_record_is_what_the_steps_say(cache):
    forward = tiny.bound(cache)
    position = late(forward)
    found = commit_record(forward, position)
    steps, token = forward.trajectory.steps, int(forward.trajectory.tokens[0, position])
    assert (
        found.commit == forward.trajectory.commit_step[0, position] and len(found.maps[0]) == steps
    )
    for step in range(steps):
        odds = odds_of(forward, step, position).softmax(-1)
        best = odds.sort(descending=True).indices[:3].tolist()
        assert [c.id for c in found.candidates[step]] == best
        assert float(found.probability[step]) == pytest.approx(float(odds[token]), abs=1e-5)
        entropy = -float((odds * odds.log()).nan_to_num().sum())
        assert float(found.entropy[step]) == pytest.approx(entropy, abs=1e-4)
    stepped = explain_steps(forward, [position])
    assert torch.allclose(found.maps[0], stepped.maps[0][:, 0], atol=1e-5)
    before, after = (odds_of(forward, s, position).log_softmax(-1)[token]
                     for s in (found.commit - 1, found.commit))  # fmt: skip
    assert found.gained == pytest.approx(float(after - before), abs=1e-4)
    grey = with_pixels(forward, pixel_fill(forward, "mean")(torch.ones(1, 64, dtype=torch.bool)))
    without = odds_of(grey, found.commit, position).log_softmax(-1)[token]
    assert found.picture == pytest.approx(float(after - without), abs=1e-4)


def test_the_contrast_is_the_map_against_the_runner_up():
    forward = tiny.bound("prefix")
    position = late(forward)
    found = commit_record(forward, position)
    token = int(forward.trajectory.tokens[0, position])
    assert found.runner_up.id == next(c.id for c in found.candidates[found.commit] if c.id != token)
    word = Target("", (position,), (token,), (found.runner_up.id,))
    expected = explain_generation(forward, [word]).maps[0][0]
    assert torch.allclose(found.contrast[0], expected, atol=1e-5)
    assert found.runner_up.text == word_scores(forward, [found.target]).runner_up[0]


def test_what_was_revealed_last_is_what_the_states_differ_in(cache):
    forward = tiny.bound(cache)
    position = late(forward)
    found = commit_record(forward, position)
    canvas = forward.trajectory.states[0][:, 0]
    differ = (canvas[found.commit] != canvas[found.commit - 1]).nonzero()[:, 0].tolist()
    assert [t.positions[0] for t in found.revealed] == differ
    text = text_relevance(forward, [found.target], score="commit").normalised()
    at = [text.tokens.prompt + p for p in differ]
    assert torch.allclose(found.relevance, text.values[0, at], atol=1e-5)
    assert sum(found.shares.values()) == pytest.approx(1)
    assert found.shares["revealed"] > 0 or bool((found.relevance <= 0).all())
    assert found.target.text in str(found) and "revealed last" in str(found)


def test_a_word_of_the_first_step_agrees_with_nothing():
    forward = tiny.bound("prefix")
    position = int(forward.trajectory.commit_step[0].argmin())
    found = commit_record(forward, position)
    assert found.commit == 0 and found.revealed == () and math.isnan(found.gained)
    assert found.shares["revealed"] == 0 and "no word stood" in str(found)


def test_errors_teach():
    forward = tiny.bound("prefix")
    with pytest.raises(TargetError, match="is not in the answer"):
        commit_record(forward, "zebra")
    bind_answer(forward, forward.request, "a red ring", None, {})
    with pytest.raises(InfeasibleStepError, match="given, not generated"):
        commit_record(forward, "ring")
