"""TAM over another method's maps: against loops over that method's single maps, and against TAM."""

import math
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import pytest
import tiny
import torch
from methods import made
from methods.test_methods_tam import causal_by_loops
from refine import loops

from captum_dcam.errors import UnknownNameError
from captum_dcam.methods import (
    METHODS,
    Attribution,
    AttributionTask,
    Budget,
    Method,
    MethodFacts,
    metered,
    method,
    register_method,
)
from captum_dcam.model.sequence import text_tokens
from captum_dcam.model.words import Target


def alone(base, task, position, token):
    """The base's map of one token (64,), asked for by itself."""
    target = Target("", (position,), (token,))
    found = base.attribute(AttributionTask(task.forward, (target,), task.score))
    return found.maps[0][0].flatten().clamp_min(0)


def by_loops(base, task, position, *, relevance="activation", order="commit", prompt=False):
    """Eq. 2, 4, 5 on the base's maps: the refined map (64,), and the relevance with NaN."""
    from methods.test_methods_logit_lens import whole

    forward = task.forward
    tokens, trajectory = text_tokens(forward), forward.trajectory
    answer, commit = trajectory.tokens[0].tolist(), trajectory.commit_step[0].tolist()
    rank = commit if order == "commit" else list(range(len(answer)))
    token = answer[position]
    # (text token, position whose state is read, id)
    first = commit.index(min(commit)) if task.score == "commit" else 0
    context = [(k, first, int(tokens.ids[k])) for k in range(tokens.prompt)]  # no template
    context += [
        (tokens.prompt + p, p, answer[p])
        for p in range(len(answer))
        if rank[p] < rank[position] and answer[p] not in forward.adapter.stop_ids
    ]
    own = whole(forward, task.step(position))[:, token].clamp_min(0)
    shown = torch.full((len(tokens),), math.nan)
    for k, _, _ in context:
        shown[k] = own[tokens.positions[k]]
    mapped = [c for c in context if prompt or c[0] >= tokens.prompt]
    image = alone(base, task, position, token).tolist()
    if mapped:
        maps = [alone(base, task, p, i).tolist() for _, p, i in mapped]
        weights = [1.0 if relevance == "mean" else float(shown[k]) for k, _, _ in mapped]
        image, _ = causal_by_loops(image, maps, weights, [i == token for _, _, i in mapped])
    return torch.tensor(image), shown


def shared_range(image, text):
    both = torch.cat((image, text))
    low, high = np.nanmin(both), np.nanmax(both)
    return (image - low) / (high - low), (text - low) / (high - low)


CASES = (
    ("commit", {}, ("diffusion_cam_base", {"score": "task"})),
    ("teacher", {}, ("diffusion_cam_base", {"score": "task"})),
    (
        "commit",
        {"product": "plus_plus"},
        ("diffusion_cam_base", {"score": "task", "product": "plus_plus"}),
    ),
    (
        "commit",
        {"base": "diffusion_cam"},
        ("diffusion_cam", {"score": "task", "refined": False}),
    ),
    ("commit", {"base": "architecture_surgery"}, ("architecture_surgery", {})),
    (
        "commit",
        {"base": "finer_cam", "product": "positionwise"},
        ("finer_cam", {"product": "positionwise"}),
    ),
    ("final", {"base": "attention", "relevance": "mean", "filter": 0}, ("attention", {})),
    ("commit", {"base": "attention", "order": "position", "filter": 5}, ("attention", {})),
)


@pytest.mark.parametrize(("score", "settings", "base"), CASES, ids=str)
def test_it_is_the_loop(cache, score, settings, base):
    forward = tiny.bound(cache, steps=4)
    name, inner = base[0], method(base[0], **base[1])
    task = AttributionTask(forward, (), score)
    latest = forward.trajectory.commit_step[0].argsort(descending=True).tolist()
    tokens = forward.trajectory.tokens[0].tolist()
    position = next(p for p in latest if alone(inner, task, p, tokens[p]).any())
    task = AttributionTask(forward, made.targets(forward, (position,)), score)
    found = method("tam_over", **settings).attribute(task)
    own = {k: v for k, v in settings.items() if k in ("relevance", "order")}
    prompt = name == "architecture_surgery"
    image, text = by_loops(inner, task, position, prompt=prompt, **own)
    scaled, relevance = shared_range(image, text)
    expected, window = scaled.double().view(8, 8).numpy(), settings.get("filter", 3)
    if window:
        expected = loops.rank_gaussian(expected, window)
    assert np.ptp(expected) > 0
    assert np.abs(found.maps[0][0].numpy() - expected).max() < 1e-3 * expected.max()
    np.testing.assert_allclose(found.text[0], relevance, atol=1e-5)


@pytest.mark.parametrize("score", ("commit", "final", "teacher"))
@pytest.mark.parametrize(
    "settings", ({}, {"relevance": "mean"}, {"order": "position", "filter": 0})
)
@pytest.mark.parametrize("prompt", (tiny.PROMPT, ""))
def test_over_the_logit_lens_it_is_tam(cache, score, settings, prompt):
    forward = tiny.bound(cache, steps=4, prompts=[prompt], images=2)
    words = made.targets(forward, (0, 2, 7))
    pair = Target("two tokens", (1, 6), words[0].token_ids + words[2].token_ids)
    task = AttributionTask(forward, (*words, pair), score)
    found = method("tam_over", base="logit_lens", **settings).attribute(task)
    expected = method("tam", **settings).attribute(task)
    for ours, theirs in zip(found.maps, expected.maps, strict=True):
        assert torch.allclose(ours, theirs, atol=1e-5)
    assert torch.allclose(found.text, expected.text, equal_nan=True, atol=1e-6)


def test_the_context_is_taken_out(cache):
    """A context token's map that is a multiple of the word's leaves nothing of it."""
    forward = tiny.bound(cache, steps=8, block_length=1)  # from left to right
    other = next(i for i in range(9) if i != forward.trajectory.tokens[0, 0])
    task = AttributionTask(forward, (*made.targets(forward, (0,)), Target("x", (1,), (other,))))
    over = {"base": "ramp", "relevance": "mean", "filter": 0}
    with ramp("ramp"):
        found = method("tam_over", **over).attribute(task)
    assert found.maps[0][0].max() > 0.1  # no earlier token
    assert found.maps[0][1].max() < 1e-6


def ramp(name, calls=None, budget=None):
    """A base whose maps are the same ramp, times 1 + the response position; it notes the words
    of every call, and its budget ends after so many of them."""

    @dataclass(frozen=True)
    class Ramp(Method):
        facts: ClassVar[MethodFacts] = MethodFacts(name, "gradient", "this test", "1")

        def attribute(self, task):
            if calls is not None:
                calls.append([(*t.positions, *t.token_ids) for t in task.targets])
            count = len(task.targets)
            ramp = torch.arange(64.0).view(8, 8) * 100
            maps = torch.stack([ramp * (1 + t.positions[0]) for t in task.targets])
            done = torch.arange(count) < (count if budget is None else budget)
            note = "" if bool(done.all()) else "the ramp is tired"
            return Attribution((maps * done[:, None, None],), done, note=note)

    return Registered(name, Ramp)


class Registered:
    """A method that is in the registry while the context is open."""

    def __init__(self, name, cls):
        self.name, self.cls = name, cls

    def __enter__(self):
        return register_method(self.name)(self.cls)

    def __exit__(self, *_):
        METHODS.remove(self.name)


def test_one_call_of_the_base_holds_every_token_once():
    forward = tiny.bound("none", steps=8, block_length=1)
    ids = forward.trajectory.tokens[0].tolist()
    calls = []
    task = AttributionTask(forward, made.targets(forward, (2, 0, 3)))
    with ramp("ramp", calls):
        method("tam_over", base="ramp").attribute(task)
    stops = forward.adapter.stop_ids
    expected = [2, *(p for p in (0, 1) if ids[p] not in stops), 0, 3]
    expected = [(p, ids[p]) for p in dict.fromkeys(expected)]
    assert calls == [expected]


def test_another_token_than_the_answers_is_explained_as_asked():
    """The words of a task may name any token at a position; the context is the answer's."""
    forward = tiny.bound("none", steps=8, block_length=1)
    calls = []
    with ramp("ramp", calls):
        method("tam_over", base="ramp").attribute(
            AttributionTask(forward, (Target("x", (1,), (9,)),))
        )
    assert calls == [[(1, 9), (0, int(forward.trajectory.tokens[0, 0]))]]


def test_a_base_that_ends_early_leaves_the_words_before_it():
    forward = tiny.bound("none", steps=8, block_length=1)
    task = AttributionTask(forward, made.targets(forward, (0, 1, 3)))
    with ramp("ramp", budget=2):
        found = method("tam_over", base="ramp").attribute(task)
    assert found.done.tolist() == [True, True, False] and found.note == "the ramp is tired"
    assert found.maps[0][0].any() and not found.maps[0][2].any() and not found.text[2].any()


@pytest.mark.parametrize("base", ("diffusion_cam_base", "attention", "logit_lens"))
def test_a_spent_budget_leaves_zero_maps(base):
    forward = tiny.bound("none", steps=8, block_length=1)
    task = AttributionTask(forward, made.targets(forward, (1, 7)))
    with metered(forward, Budget(passes=1)):
        found = method("tam_over", base=base).attribute(task)
    assert not found.done.any() and "exhausted" in found.note and not found.maps[0].any()


def test_a_prompt_without_words_and_an_answer_of_one_token(cache):
    forward = tiny.bound(cache, prompts=[""], gen_length=1)
    task = AttributionTask(forward, made.targets(forward, (0,)))
    found = method("tam_over", filter=0).attribute(task)
    raw = method("diffusion_cam_base", score="task").attribute(task).maps[0][0].relu()
    assert found.text.shape == (1, 1) and found.text.isnan().all()
    assert torch.allclose(found.maps[0][0], (raw - raw.min()) / (raw.max() - raw.min()))


def test_a_word_of_several_tokens_is_their_sum_before_eq_3(cache):
    forward = tiny.bound(cache, steps=4)
    first, last = made.targets(forward, (1, 6))
    both = Target("both", (1, 6), first.token_ids + last.token_ids)
    found = method("tam_over", filter=0).attribute(AttributionTask(forward, (both,)))
    task = AttributionTask(forward, (first, last))
    base = method("diffusion_cam_base", score="task")
    parts = [by_loops(base, task, p) for p in (1, 6)]
    text = torch.stack([p[1] for p in parts])
    text = text.nansum(0).masked_fill(text.isnan().all(0), math.nan)
    text[text_tokens(forward).prompt + torch.tensor([1, 6])] = math.nan
    image, text = shared_range(parts[0][0] + parts[1][0], text)
    assert tiny.relative(found.maps[0][0].flatten(), image) < 1e-3
    np.testing.assert_allclose(found.text[0], text, atol=1e-5)


@pytest.mark.parametrize("product", (None, "plus_plus"))
def test_several_pictures(cache, product):
    """Every grid is refined with the maps of all: the scale s is one for all image tokens."""
    forward = tiny.bound(cache, steps=4, images=2)
    last = int(forward.trajectory.commit_step[0].argmax())
    task = AttributionTask(forward, made.targets(forward, (last,)))
    found = method("tam_over", product=product, filter=0).attribute(task)
    assert [tuple(m.shape) for m in found.maps] == [(1, 8, 8)] * 2
    base = method("diffusion_cam_base", score="task", product=product)

    class Both:
        """The base with both grids in one row."""

        def attribute(self, task):
            maps = base.attribute(task).maps
            return Attribution((torch.cat([m.flatten(1) for m in maps], 1),), torch.ones(1))

    image, _ = shared_range(*by_loops(Both(), task, last))
    assert tiny.relative(torch.cat([m.flatten() for m in found.maps]), image) < 1e-3


@pytest.mark.parametrize(
    ("settings", "message"),
    (
        ({"base": "tam_over"}, "is this method"),
        ({"base": "layer_activation"}, "one map for all words"),
        ({"base": "attention", "product": "pooled"}, "has no such setting"),
        ({"relevance": "attention"}, "expected one of"),
        ({"order": "left"}, "expected one of"),
        ({"filter": 2}, "expected an odd window"),
        ({"filter": True}, "filter is True, a bool: expected int"),
    ),
)
def test_settings_are_checked(settings, message):
    with pytest.raises(ValueError, match=message):
        method("tam_over", **settings)


def test_names_are_checked():
    with pytest.raises(UnknownNameError, match="did you mean 'attention'"):
        method("tam_over", base="atention")
    with pytest.raises(UnknownNameError, match="did you mean 'plus_plus'"):
        method("tam_over", product="plusplus")


def test_the_base_says_beforehand_whether_it_can_run():
    task = made.task_of("none")
    with pytest.raises(ValueError, match="block 9"):
        method("logit_lens", block=9).check(task)
    with made.registered("refuses") as cls:

        def check(self, task):
            raise ValueError("not on this model")

        cls.check = check
        with pytest.raises(ValueError, match="not on this model"):
            method("tam_over", base="refuses").check(task)


def test_a_setting_named_score_of_another_kind_is_left_alone():
    """Score-CAM's ``score`` says what is scored, not in which state."""
    assert method("tam_over", base="score_cam").inner == method("score_cam")
