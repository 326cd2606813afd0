"""A score that is the number of a denoising step, wherever a score is taken."""

import json
from dataclasses import replace

import numpy as np
import pytest
import tiny
import torch

import captum_dcam
from captum_dcam import DenoisingForward, DiffusionCAM, Explanation, explain_generation, sign_check
from captum_dcam.errors import InfeasibleStepError, InputError, TargetError, WrongTypeError
from captum_dcam.evaluation import Plan, Variant
from captum_dcam.faithfulness import arcc, correction, deletion, infidelity
from captum_dcam.maps import Reading, word_maps
from captum_dcam.methods import AttributionTask, method
from captum_dcam.methods.text_relevance import text_relevance
from captum_dcam.model.answers import force
from captum_dcam.model.gradients import target_gradients
from captum_dcam.model.words import Target
from captum_dcam.presets import preset

STEPS = 8
BAD = {
    "before the first": (
        -1,
        InfeasibleStepError,
        f"score is -1: this generation has {STEPS} steps",
    ),
    "behind the last": (STEPS, InfeasibleStepError, f"has {STEPS} steps, expected one from 0"),
    "a truth value": (True, WrongTypeError, "score is True: expected one of"),
    "a number as text": ("3", InputError, "score is '3': expected one of"),
    "a fraction": (1.5, WrongTypeError, "score is 1.5"),
}


def word(forward, position=2):
    return Target("w", (position,), (tiny.pair(forward, position)[1],))


def flat(forward):
    """Maps of one word whose values all differ."""
    return [torch.arange(64.0).view(1, 8, 8)]


#: whatever takes a score of a bound generation
TAKERS = {
    "arguments": lambda f, s: f.arguments((2, 5), s),
    "attribute": lambda f, s: DiffusionCAM(f).attribute(f.request.pixels, (2, 5), score=s),
    "explain_generation": lambda f, s: explain_generation(f, [2], score=s),
    "sign_check": lambda f, s: sign_check(f, [word(f)], flat(f), torch.Generator(), score=s),
    "target_gradients": lambda f, s: target_gradients(f, [], score=s),
    "compare_generation": lambda f, s: captum_dcam.compare_generation(f, [2], ["tam"], score=s),
    "task": lambda f, s: AttributionTask(f, (word(f),), s),
    "text_relevance": lambda f, s: text_relevance(f, [word(f)], score=s),
    "deletion": lambda f, s: deletion(f, [word(f)], flat(f), score=s),
    "arcc": lambda f, s: arcc(f, [word(f)], flat(f), lambda *_: flat(f), score=s),
    "correction": lambda f, s: correction(f, [word(f)], flat(f), score=s),
    "infidelity": lambda f, s: infidelity(f, [word(f)], flat(f), score=s),
}


@pytest.mark.parametrize("taker", TAKERS)
@pytest.mark.parametrize("bad", BAD)
def test_other_scores_are_refused_before_any_work(taker, bad, monkeypatch):
    forward = tiny.bound("prefix")
    monkeypatch.setattr(forward.adapter, "denoise", pytest.fail)
    monkeypatch.setattr(forward.adapter, "prefill", pytest.fail)
    score, error, message = BAD[bad]
    with pytest.raises(error, match=message):
        TAKERS[taker](forward, score)


@pytest.mark.parametrize("score", (-1, True, "3", 1.5))
def test_what_no_generation_has_is_refused_before_one_is_made(score, monkeypatch):
    adapter = tiny.adapter("prefix")
    monkeypatch.setattr(adapter, "generate", pytest.fail)
    for call in (captum_dcam.explain, captum_dcam.compare):
        with pytest.raises(ValueError, match="score is"):
            call(adapter, tiny.picture(), tiny.PROMPT, score=score)
    for make in (
        lambda: DenoisingForward(adapter, score=score),
        lambda: Reading(score),
        lambda: method("diffusion_cam", score=score),
        lambda: Variant("tam", score=score),
    ):
        with pytest.raises(ValueError, match="score is"):
            make()


def test_the_step_that_committed_a_token_is_the_commit_score(cache):
    forward = tiny.bound(cache)
    for position in (0, 3, 7):
        step = int(forward.trajectory.commit_step[0, position])
        at, committed = (
            explain_generation(forward, [position], score=s, refinements=[]).maps[0]
            for s in (step, "commit")
        )
        assert torch.equal(at, committed)
    last, final = (explain_generation(forward, [2], score=s).maps[0] for s in (7, "final"))
    assert torch.equal(last, final)


def test_without_a_cache_the_call_that_is_explained_is_read():
    forward = tiny.bound("none")
    target = [word(forward)]
    own = {s: word_maps(forward, target, [0], Reading(s))[0] for s in (2, 5)}
    assert tiny.relative(own[2], own[5]) > 1e-3
    other = word_maps(forward, target, [0], Reading(2, step=5))[0]
    assert torch.equal(other, own[5])


def test_with_a_cached_prefix_every_step_explains_the_prefill():
    forward = tiny.bound("prefix")
    found = [explain_generation(forward, [2], score=s, step=0).maps[0] for s in range(STEPS)]
    assert len({m.numpy().tobytes() for m in found}) == STEPS
    with pytest.raises(InfeasibleStepError, match="choose a feasible step, here 0"):
        explain_generation(forward, [2], score=3, step=3)


def test_the_forwards_own_score_may_be_a_step(cache):
    forward = tiny.bound(cache, batch=2)
    forward.score = 3
    for given in ((), (tiny.pairs(forward, 2),)):
        state = forward.arguments(*given)[-1]
        assert torch.equal(state, forward.trajectory.states[0][3])
    assert torch.equal(
        forward(forward.request.pixels), forward(forward.request.pixels, *forward.arguments())
    )
    assert forward.twin().score == 3
    assert DenoisingForward(forward.adapter, score=np.int64(3)).score == 3


def test_sign_check_and_curves_read_the_step(cache):
    forward = tiny.bound(cache)
    target, g = word(forward), torch.Generator()
    step = int(forward.trajectory.commit_step[0, 2])
    for at, same in ((step, True), ((step + 4) % STEPS, False)):
        for run in (
            lambda s: sign_check(forward, [target], flat(forward), g.manual_seed(1), score=s),
            lambda s: deletion(forward, [target], flat(forward), score=s, controls=0).probability,
            lambda s: infidelity(forward, [target], flat(forward), score=s, samples=4),
        ):
            assert torch.equal(run(at), run("commit")) == same


def test_a_step_is_saved_as_it_was_given(tmp_path):
    forward = tiny.bound("prefix")
    found = explain_generation(forward, [2], score=np.int64(3))
    assert found.settings["score"] == 3 and type(found.settings["score"]) is int
    found.save(tmp_path / "out")
    assert Explanation.load(tmp_path / "out").settings["score"] == 3
    compared = captum_dcam.compare_generation(forward, [2], ["attention"], score=3)
    compared.save(tmp_path / "both")
    assert captum_dcam.Comparison.load(tmp_path / "both").settings["score"] == 3
    plan = Plan((Variant("tam", score=3), Variant("diffusion_cam", settings={"score": 2})))
    again = Plan.from_record(json.loads(plan.json()))
    assert again == plan and [v.score for v in again.variants] == [3, "commit"]
    assert json.loads(plan.json())["variants"][0]["score"] == 3


def test_a_preset_may_read_a_step():
    forward = tiny.bound("prefix")
    own = replace(preset("base"), score=3)
    found = explain_generation(forward, [2], preset=own)
    assert torch.equal(
        found.maps[0], explain_generation(forward, [2], preset="base", score=3).maps[0]
    )
    with pytest.raises(InfeasibleStepError, match="has 8 steps"):
        explain_generation(forward, [2], preset=replace(own, score=9))


def test_a_given_answer_has_no_steps():
    forward = tiny.bound("prefix")
    force(forward, "a red circle")
    with pytest.raises(InfeasibleStepError, match="was given, not generated"):
        explain_generation(forward, [0], score=1)


def test_a_step_reads_the_tokens_that_it_computes_alone():
    forward = tiny.bound("prefix")
    t = forward.trajectory
    read = torch.ones(t.steps, 1, t.tokens.shape[1], dtype=torch.bool)
    read[4:, 0, :4] = False  # the first four tokens are of a canvas that is finished by then
    forward = forward.again(trajectory=replace(t, read_at=read))
    assert [forward.trajectory.step_of(0, p, "final") for p in (0, 4)] == [3, 7]
    assert explain_generation(forward, [3, 4], score=3).maps[0].any()
    with pytest.raises(InfeasibleStepError, match=r"token 3 .*steps that do, 0, 1, 2, 3, or"):
        explain_generation(forward, [3, 4], score=4)


def test_a_probability_of_0_is_no_sign_of_a_token_that_never_settled():
    made = tiny.bound("prefix").trajectory
    made = replace(made, confidence=torch.zeros_like(made.confidence))
    assert made.step_of(0, 2, "commit") == int(made.commit_step[0, 2])
    step = int(made.commit_step[0, 2])
    tokens = made.tokens.clone()
    tokens[0, 2] = made.states[0][step, 0, 2]
    with pytest.raises(TargetError, match="token 2 of the answer never settled"):
        replace(made, tokens=tokens).step_of(0, 2, "commit")
