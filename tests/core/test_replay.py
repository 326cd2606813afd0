"""A replayed step gives the bits of the generation; canvases, commits and schedules agree."""

import dataclasses
import math

import pytest
import tiny
import torch

from captum_dcam.errors import InfeasibleStepError
from captum_dcam.mini import modeling as generation
from captum_dcam.model.forward import DenoisingForward


def spied(monkeypatch, make):
    """What ``make`` returns, and the logits of every step of its generation."""
    seen = []
    original = generation.denoise

    def spy(*args):
        out = original(*args)
        seen.append(out.detach().clone())
        return out

    monkeypatch.setattr(generation, "denoise", spy)
    made = make()
    monkeypatch.setattr(generation, "denoise", original)
    return made, seen[: made.trajectory.steps]  # behind them an adapter's first replay is checked


@pytest.mark.parametrize("keep", (True, False))
@pytest.mark.parametrize("settings", ({}, {"steps": 4}, {"gen_length": 12, "block_length": 4}))
def test_replay_has_the_bits_of_the_generation(monkeypatch, cache, keep, settings):
    forward, seen = spied(monkeypatch, lambda: tiny.bound(cache, keep=keep, **settings, anew=True))
    assert len(seen) == forward.trajectory.steps
    for step, expected in enumerate(seen):
        with torch.no_grad():
            got = forward.replay(torch.tensor([0]), torch.tensor([step]))
            state = forward.trajectory.state_at(torch.tensor([0]), torch.tensor([step]))
            plain = forward(forward.request.pixels, *forward.request.extras, *state)
        assert torch.equal(got, expected)
        assert torch.equal(plain, expected)
    with torch.enable_grad():
        assert torch.equal(forward.replay(torch.tensor([0]), torch.tensor([0])).detach(), seen[0])


def test_forward_of_a_whole_batch_has_the_bits_too(monkeypatch, cache):
    make = lambda: tiny.bound(cache, batch=3, anew=True)  # noqa: E731
    forward, seen = spied(monkeypatch, make)
    examples = torch.arange(3)
    for step, expected in enumerate(seen):
        state = forward.trajectory.state_at(examples, torch.full((3,), step))
        with torch.no_grad():
            got = forward(forward.request.pixels, *forward.request.extras, *state)
        assert torch.equal(got, expected)


@pytest.mark.parametrize("keep", (True, False))
def test_batched_replay_agrees_within_rounding(monkeypatch, cache, keep):
    prompts = ["describe the image .", "how many red circles are there ?", ""]
    make = lambda: tiny.bound(cache, batch=3, prompts=prompts, keep=keep, anew=True)  # noqa: E731
    forward, seen = spied(monkeypatch, make)
    examples = torch.tensor([2, 0, 1, 0, 2])
    steps = torch.tensor([0, 3, 7, 0, 5])
    with torch.no_grad():
        got = forward.replay(examples, steps)
    expected = torch.stack([seen[s][b] for b, s in zip(examples, steps, strict=True)])
    assert tiny.relative(got, expected) < 1e-5


def test_a_trajectory_without_kept_states_replays_at_any_layer(cache):
    forward = tiny.bound(cache)
    other = DenoisingForward(forward.adapter, 2)
    other.bind(forward.request, dataclasses.replace(forward.trajectory, kept={}))
    at = torch.tensor([0]), torch.tensor([2])
    with torch.no_grad():
        assert torch.equal(other.replay(*at), forward.replay(*at))
    shared = DenoisingForward(forward.adapter, 2)  # kept at another layer: must not be used
    shared.bind(forward.request, forward.trajectory)
    with torch.no_grad():
        assert torch.equal(shared.replay(*at), forward.replay(*at))


def test_commits_agree_with_the_canvases(cache):
    t = tiny.bound(cache, batch=2, gen_length=12, block_length=4, steps=6).trajectory
    mask = tiny.config().mask_token_id
    canvases = t.states[0]
    for step in range(t.steps):
        hidden = canvases[step] == mask
        assert torch.equal(hidden, t.commit_step >= step)
        assert torch.equal(canvases[step][~hidden], t.tokens[~hidden])
    assert (t.tokens != mask).all()
    blocks = torch.arange(12) // 4
    assert torch.equal(t.commit_step // 2, blocks.expand(2, 12))  # two steps a block, in order


@pytest.mark.parametrize("schedule", generation.SCHEDULES)
@pytest.mark.parametrize(("length", "steps"), ((12, 5), (7, 7), (4, 9), (1, 1), (32, 8)))
def test_schedules_commit_what_their_formula_says(schedule, length, steps):
    found = generation.commits_per_step(length, steps, schedule)
    assert sum(found) == length and len(found) == steps and min(found) >= 0
    if schedule == "linear":
        assert max(found) - min(found) <= 1 and sorted(found, reverse=True) == found
        return
    done = 0
    for step, count in enumerate(found, start=1):
        done += count
        x = step / steps
        share = 1 - math.cos(math.pi * x / 2) if schedule == "cosine" else 3 * x / (1 + 2 * x)
        assert abs(done - length * share) <= 0.5 + 1e-9


@pytest.mark.parametrize("schedule", generation.SCHEDULES)
def test_a_generation_follows_its_schedule(schedule):
    t = tiny.bound("none", gen_length=10, steps=4, schedule=schedule).trajectory
    counts = [int((t.commit_step == s).sum()) for s in range(4)]
    assert counts == generation.commits_per_step(10, 4, schedule)


@pytest.mark.parametrize("remasking", ("low_confidence", "entropy", "margin"))
def test_the_surest_tokens_are_committed_first(monkeypatch, remasking):
    forward, seen = spied(
        monkeypatch,
        lambda: tiny.bound("prefix", gen_length=9, steps=3, remasking=remasking, anew=True),
    )
    t, mask = forward.trajectory, tiny.config().mask_token_id
    for step, logits in enumerate(seen):
        probs = logits[0].double().softmax(-1).numpy()
        sure = []
        for row in probs:
            ordered = sorted(row, reverse=True)
            sure.append(
                {
                    "low_confidence": ordered[0],
                    "entropy": sum(p * math.log(p) for p in row),
                    "margin": ordered[0] - ordered[1],
                }[remasking]
            )
        hidden = [i for i in range(9) if t.states[0][step, 0, i] == mask]
        best = sorted(hidden, key=lambda i: -sure[i])[:3]
        chosen = [i for i in range(9) if t.commit_step[0, i] == step]
        assert sorted(best) == chosen
        for i in chosen:
            assert t.tokens[0, i] == int(logits[0, i].argmax())
            assert t.confidence[0, i] == pytest.approx(probs[i].max(), rel=1e-5)


@pytest.mark.parametrize("settings", ({"temperature": 0.7}, {"remasking": "random"}))
def test_same_seed_same_bits(cache, settings):
    def draw(seed):
        g = torch.Generator().manual_seed(seed)
        return tiny.bound(cache, gen_length=16, steps=8, generator=g, **settings).trajectory

    one, again, other = draw(3), draw(3), draw(4)
    for name in ("tokens", "commit_step", "confidence"):
        assert torch.equal(getattr(one, name), getattr(again, name))
    assert torch.equal(one.states[0], again.states[0])
    assert not torch.equal(one.commit_step, other.commit_step)


def test_the_mask_token_is_never_committed():
    g = torch.Generator().manual_seed(0)
    t = tiny.bound("prefix", gen_length=60, steps=60, temperature=50.0, generator=g).trajectory
    assert (t.tokens != tiny.config().mask_token_id).all()
    assert sorted(t.commit_step[0].tolist()) == list(range(60))


@pytest.mark.parametrize(("gen_length", "steps"), ((8, 8), (8, 4), (80, 4)))
def test_feasible_calls_are_those_of_table_4(cache, gen_length, steps):
    """Also when the response alone is longer than the image span: it still is no image."""
    forward = tiny.bound(cache, gen_length=gen_length, steps=steps)
    t = forward.trajectory
    if cache == "prefix":
        prompt = forward.request.layout.prefix_length
        assert t.lengths == (prompt, *[gen_length] * steps)
        assert t.feasible == (0,) and t.valid_ratio == 1 / (steps + 1)
        for step in range(1, steps + 1):
            with pytest.raises(InfeasibleStepError, match=f"ends at 64 .* has {gen_length} tokens"):
                t.check_call(step)
    else:
        assert t.lengths == (forward.request.layout.prefix_length + gen_length,) * steps
        assert t.feasible == tuple(range(steps)) and t.valid_ratio == 1
    with pytest.raises(InfeasibleStepError, match="not in this generation"):
        t.check_call(len(t.calls))


def test_a_response_longer_than_the_image_is_explained_by_the_prefill():
    import captum_dcam

    forward = tiny.bound("prefix", gen_length=80, steps=4)
    cam = captum_dcam.DiffusionCAM(forward, preset="base")
    one = cam.attribute(forward.request.pixels, tiny.pair(forward, 70))
    assert one.shape == (1, 1, 8, 8) and one.any()
    maps = captum_dcam.explain_generation(forward, [70], preset="base").maps[0]
    assert tiny.relative(maps, one[0]) < 1e-5


@pytest.mark.parametrize("score", ("commit", "final", "teacher"))
def test_the_scores_read_the_states_they_name(score):
    t = tiny.bound("prefix", batch=2, steps=4).trajectory
    for b in range(2):
        for p in range(8):
            (state,) = t.state_at(torch.tensor([b]), torch.tensor([t.step_of(b, p, score)]))
            expected = {
                "commit": t.states[0][t.commit_step[b, p], b],
                "final": t.states[0][3, b],
                "teacher": t.tokens[b],
            }[score]
            assert torch.equal(state[0], expected)
            if score == "commit":
                assert state[0, p] == tiny.config().mask_token_id


@pytest.mark.parametrize(
    ("settings", "message"),
    (
        ({"gen_length": 0}, "at least one"),
        ({"gen_length": 8, "block_length": 3}, "multiple of block_length"),
        ({"gen_length": 8, "block_length": 4, "steps": 3}, "multiple of the 2 blocks"),
        ({"remasking": "best"}, "expected one of"),
        ({"schedule": "slow"}, "expected one of"),
        ({"temperature": 1.0}, "generator"),
    ),
)
def test_settings_that_cannot_work(settings, message):
    with pytest.raises(ValueError, match=message):
        tiny.bound("prefix", **settings)
