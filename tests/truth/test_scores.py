"""Scores of words from the trajectory, each against the step's own logits by hand."""

import math

import pytest
import tiny
import torch

from captum_dcam.methods.edited import pixel_fill, with_pixels
from captum_dcam.model.answers import bind_answer
from captum_dcam.model.words import Target, words_of
from captum_dcam.truth.scores import word_scores


def logits_of(forward, step):
    with torch.no_grad():
        return forward.replay(torch.tensor([0]), torch.tensor([step]))[0].double()


def words(forward):
    found = words_of(forward.adapter, forward.trajectory.tokens[0].tolist())
    tokens = forward.trajectory.tokens[0].tolist()
    return [*found, Target("two tokens", (1, 4), (tokens[1], tokens[4]))]


def test_scores_are_those_of_the_steps_one_by_one(cache):
    forward = tiny.bound(cache)
    targets, trajectory = words(forward), forward.trajectory
    found = word_scores(forward, targets)
    odds = torch.stack([logits_of(forward, s).softmax(-1) for s in range(trajectory.steps)])
    entropy = -(odds * odds.log()).nan_to_num().sum(-1)  # (S, T)
    for n, target in enumerate(targets):
        steps = [int(trajectory.commit_step[0, p]) for p in target.positions]
        pairs = list(zip(target.positions, steps, target.token_ids, strict=True))
        at = [float(entropy[s, p]) for p, s, _ in pairs]
        until = [float(entropy[: s + 1, p].mean()) for p, s, _ in pairs]
        every = [float(entropy[:, p].mean()) for p, s, _ in pairs]
        own = [float(odds[s, p, token]) for p, s, token in pairs]
        assert float(found.entropy[n]) == pytest.approx(sum(at) / len(at), abs=1e-4)
        assert float(found.mean_entropy[n]) == pytest.approx(sum(until) / len(until), abs=1e-4)
        assert float(found.all_entropy[n]) == pytest.approx(sum(every) / len(every), abs=1e-4)
        assert float(found.probability[n]) == pytest.approx(min(own), abs=1e-5)
        last = [float(odds[-1, p, token]) for p, _, token in pairs]
        assert float(found.final[n]) == pytest.approx(min(last), abs=1e-5)
        p, s, token = pairs[own.index(min(own))]
        others = odds[s, p].clone()
        others[token] = 0
        assert float(found.margin[n]) == pytest.approx(min(own) - float(others.max()), abs=1e-4)
        (rival,) = forward.adapter.token_texts([int(others.argmax())])
        assert found.runner_up[n] in (rival.strip(), "")  # a stop token has no text
        changes = [int((odds[: s + 1, p].argmax(-1).diff() != 0).sum()) for p, s, _ in pairs]
        assert int(found.flips[n]) == sum(changes) and int(found.commit_step[n]) == max(steps)
        assert int(found.position[n]) == target.positions[0]


def test_falls_are_read_on_other_pictures(cache):
    forward = tiny.bound(cache)
    (target,) = words(forward)[-1:]
    found = word_scores(forward, [target])
    removed = torch.ones(1, 64, dtype=torch.bool)
    for name, baseline in (("grey", "mean"), ("blurred", "blur")):
        other = with_pixels(forward, pixel_fill(forward, baseline)(removed))
        expected = 0.0
        for position, token in zip(target.positions, target.token_ids, strict=True):
            step = int(forward.trajectory.commit_step[0, position])
            before, after = (
                float(logits_of(f, step)[position].log_softmax(-1)[token]) for f in (forward, other)
            )
            expected += (before - after) / 2
        assert float(getattr(found, name)) == pytest.approx(expected, abs=1e-4), name


def test_repetitions_count_what_stood_before():
    forward = tiny.bound("prefix", gen_length=4)
    tokens = forward.adapter.encode("a ring a")
    from captum_dcam.model.trajectory import Trajectory

    trajectory = forward.trajectory
    changed = trajectory.tokens.clone()
    changed[0, :3] = torch.tensor(tokens)
    values = {**vars(trajectory), "tokens": changed, "kept": {}}
    forward.bind(forward.request, Trajectory(**values))
    targets = words_of(forward.adapter, changed[0].tolist())[:3]
    assert word_scores(forward, targets).repetition.tolist() == [0, 0, 1]


def test_records_are_flat_and_an_example_is_that_of_the_batch(cache):
    forward = tiny.bound(cache, batch=2)
    tokens = forward.trajectory.tokens[1].tolist()
    targets = words_of(forward.adapter, tokens)
    both = word_scores(forward, targets, 1)
    rows = both.records()
    assert [r["words"] for r in rows] == [t.text for t in targets]
    assert all(0 <= r["probability"] <= 1 and math.isfinite(r["grey"]) for r in rows)
    none = word_scores(forward, [])
    assert none.records() == [] and none.probability.shape == (0,)


def test_a_given_answer_is_read_where_each_token_is_hidden():
    """Against the states of the given answer, by hand; nothing is said of later steps."""
    forward = tiny.bound("prefix")
    bind_answer(forward, forward.request, "a red ring", None, {})
    found = word_scores(forward)
    odds = torch.stack([logits_of(forward, s)[s].softmax(-1) for s in range(3)])
    own = odds[range(3), forward.trajectory.tokens[0, :3]]
    assert found.words == ("a", "red", "ring")
    assert torch.allclose(found.probability, own, atol=1e-5)
    for entropy in (found.entropy, found.mean_entropy, found.all_entropy):
        assert torch.allclose(entropy, -(odds * odds.log()).sum(-1), atol=1e-4)
    assert found.flips.tolist() == [0, 0, 0] and found.final.isnan().all()
