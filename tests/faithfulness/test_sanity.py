"""Randomised weights come back bit for bit; shuffles and placebos do what they say."""

import awkward
import pytest
import tiny
import torch
from faithfulness.cases import explain, maps, same, state, word, words
from scipy import stats

from captum_dcam import faithfulness
from captum_dcam.errors import MethodError
from captum_dcam.metrics import concentration, obj_iou


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def test_cascade_goes_down_and_weights_come_back(cache):
    forward = tiny.bound(cache, images=2)
    forward.train()
    before, seen = state(forward), []

    def watched(other, targets):
        now = dict(other.model.named_parameters())
        seen.append([n for n, p in now.items() if not torch.equal(p, before[3][n])])
        assert other.trajectory.kept.get("calls") is None
        return explain(other, targets)

    got = faithfulness.parameter_randomization(forward, words(forward), watched, generator())
    assert got.stages == ("block 3", "block 2", "block 1", "block 0", "rest")
    assert got.spearman.shape == got.ssim.shape == (5, 2)
    assert same(before, state(forward))
    assert seen[0] == []
    for depth, names in enumerate(seen[1:5]):
        blocks = {
            int(n.split("layers.")[1].split(".")[0]) for n in names if n.startswith("layers.")
        }
        assert blocks == set(range(3 - depth, 4)) and all(n.startswith("layers.") for n in names)
    assert any(not n.startswith("layers.") for n in seen[5])
    assert (got.spearman.abs() < 0.95).all()


def test_scores_equal_scipy_and_runs_repeat():
    forward = tiny.bound("prefix")
    targets, found = words(forward), []

    def watched(other, given):
        found.append(explain(other, given)[0])
        return (found[-1],)

    got = faithfulness.parameter_randomization(forward, targets, watched, generator(), stages=2)
    assert got.stages == ("block 3", "block 2")
    for stage in range(2):
        for n in range(2):
            a, b = found[0][n].flatten(), found[stage + 1][n].flatten()
            expected = stats.spearmanr(a, b).statistic
            assert float(got.spearman[stage, n]) == pytest.approx(expected)
    again = faithfulness.parameter_randomization(forward, targets, explain, generator(), stages=2)
    assert torch.equal(got.spearman, again.spearman) and torch.equal(got.ssim, again.ssim)


def test_some_stages_are_those_of_the_whole_cascade():
    forward = tiny.bound("prefix")
    arguments = forward, words(forward), explain
    whole = faithfulness.parameter_randomization(*arguments, generator())
    some = faithfulness.parameter_randomization(*arguments, generator(), stages=(-1, 1))
    assert some.stages == ("block 3", "rest")
    assert torch.equal(some.spearman, whole.spearman[[0, -1]])
    assert torch.equal(some.ssim, whole.ssim[[0, -1]])


def test_a_method_that_ignores_the_model_is_found_out():
    forward = tiny.bound("prefix")
    fixed = maps(forward)
    got = faithfulness.parameter_randomization(
        forward, words(forward), lambda _f, _t: fixed, generator()
    )
    assert got.spearman.eq(1).all() and got.ssim.min() > 0.999999


@pytest.mark.parametrize("at", range(1, 6))
def test_weights_come_back_after_an_error(at):
    forward = tiny.bound("none")
    before, calls = state(forward), []

    def fails(other, targets):
        calls.append(1)
        if len(calls) > at:
            raise ZeroDivisionError
        return explain(other, targets)

    with pytest.raises(ZeroDivisionError):
        faithfulness.parameter_randomization(forward, words(forward), fails, generator())
    assert same(before, state(forward))


def test_narrow_weights_and_tied_ones_come_back_too():
    forward = tiny.bound("prefix", dtype=torch.bfloat16)
    before = state(forward)
    got = faithfulness.parameter_randomization(forward, words(forward), explain, generator())
    assert torch.isfinite(got.spearman).all() and same(before, state(forward))


def test_quantised_weights_are_refused(monkeypatch):
    forward = tiny.bound("prefix")
    packed = torch.nn.Parameter(torch.zeros(2, dtype=torch.int8), requires_grad=False)
    forward.model.layers[2].packed = packed
    with pytest.raises(MethodError, match=r"block 2 .*int8.*quantisation"):
        faithfulness.parameter_randomization(forward, words(forward), explain, generator())
    with pytest.raises(ValueError, match="numbers of stages"):
        faithfulness.parameter_randomization(
            tiny.bound("prefix"), words(forward), explain, generator(), stages=(1, 9)
        )
    with pytest.raises(ValueError, match="stages is 9"):
        faithfulness.parameter_randomization(
            tiny.bound("prefix"), words(forward), explain, generator(), stages=9
        )


@pytest.mark.parametrize("example", [0, 1])
@pytest.mark.parametrize("family", ["mini", "causal"])
def test_shuffle_moves_other_tokens_and_keeps_steps(cache, family, example):
    """Answers that end early, with text behind the end."""
    forward = awkward.alone(family, cache, example)
    old, stop = forward.trajectory, forward.adapter.stop_ids
    tokens = old.tokens[0].tolist()
    ends = [p for p, token in enumerate(tokens) if token in stop]
    assert ends and ends[0] < len(tokens) - 1, "the fixture has stop tokens among others"
    target = word(forward, 1, 4)
    before = state(forward)
    new = faithfulness.shuffled_answer(forward, target, generator(1)).trajectory
    assert same(before, state(forward))
    changed = new.tokens[0].tolist()
    free = [p for p in range(len(tokens)) if p not in {1, 4, *ends}]
    order = torch.randperm(len(free), generator=generator(1)).tolist()
    assert (
        [changed[p] for p in free] == [tokens[free[n]] for n in order] != [tokens[p] for p in free]
    )
    assert all(changed[p] == tokens[p] for p in (1, 4, *ends))
    assert torch.equal(new.final_state[0], new.tokens)
    for step in range(old.steps):
        for p, (was, now) in enumerate(
            zip(old.states[0][step, 0].tolist(), new.states[0][step, 0].tolist(), strict=True)
        ):
            assert now == (changed[p] if was == tokens[p] else was)
    for one, other in zip(old.states[1:], new.states[1:], strict=True):
        assert torch.equal(one, other)


def test_shuffle_reads_other_logits_for_the_same_word(cache):
    forward = tiny.bound(cache)
    target = word(forward, 3)
    last = int(forward.trajectory.steps)
    other = faithfulness.shuffled_answer(forward, target, generator(1))
    plain, shuffled = (f.replay(torch.tensor([0]), torch.tensor([last])) for f in (forward, other))
    assert plain.shape == shuffled.shape and not torch.allclose(plain, shuffled)
    short = tiny.bound(cache, gen_length=1)
    alone = faithfulness.shuffled_answer(short, word(short, 0), generator())
    assert torch.equal(alone.trajectory.tokens, short.trajectory.tokens)


def test_answer_shuffle_compares_maps_word_by_word(cache):
    forward = tiny.bound(cache)
    targets = words(forward)
    got = faithfulness.answer_shuffle(forward, targets, explain, generator(1))
    g, before = generator(1), explain(forward, targets)[0]
    for n, target in enumerate(targets):
        other = faithfulness.shuffled_answer(forward, target, g)
        expected = stats.spearmanr(before[n].flatten(), explain(other, (target,))[0].flatten())
        assert float(got[n]) == pytest.approx(expected.statistic, abs=1e-3)
    fixed = maps(forward)
    same_maps = faithfulness.answer_shuffle(
        forward, targets, lambda _f, t: [fixed[0][[targets.index(w) for w in t]]], generator()
    )
    assert same_maps.tolist() == pytest.approx([1, 1])


@pytest.mark.parametrize("metric", [obj_iou, concentration])
def test_placebo_scores_another_words_map(metric):
    g = torch.Generator().manual_seed(0)
    values, masks = torch.rand(4, 6, 6, generator=g), torch.rand(4, 2, 6, 6, generator=g) > 0.7
    groups = torch.tensor([0, 0, 1, 2])
    drawn = set()
    for seed in range(40):
        own, other = faithfulness.placebo(
            values, masks, generator(seed), groups=groups, metric=metric
        )
        assert torch.equal(own, metric(values, masks))
        for n in range(4):
            scores = {j: float(metric(values[j], masks[n])) for j in range(4)}
            hits = {j for j, s in scores.items() if s == float(other[n])}
            assert any(groups[j] != groups[n] for j in hits)
            drawn |= {(n, j) for j in hits}
    assert {(0, 2), (0, 3), (1, 2), (2, 0), (2, 1), (2, 3), (3, 0), (3, 2)} <= drawn
    alike = faithfulness.placebo(values, masks, generator(3), groups=groups, metric=metric)
    assert same(
        alike, faithfulness.placebo(values, masks, generator(3), groups=groups, metric=metric)
    )


def test_placebo_errors_teach():
    values, masks = torch.rand(2, 4, 4), torch.ones(2, 4, 4, dtype=torch.bool)
    with pytest.raises(ValueError, match="word 0 has no other"):
        faithfulness.placebo(values[:1], masks[:1], generator())
    with pytest.raises(ValueError, match="at least two"):
        faithfulness.placebo(values, masks, generator(), groups=torch.zeros(2))
    with pytest.raises(ValueError, match=r"\(N,\)"):
        faithfulness.placebo(values, masks, generator(), groups=torch.zeros(3))
