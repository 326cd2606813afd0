"""Logit lens, TAM, ARC and text relevance on every kind of family, against loops: models that
predict a position from its own row or from the one before, two grids, repeated words, words of two
tokens, and ends of the answer that were written first."""

import awkward
import numpy as np
import pytest
import tiny
import torch
from methods.lens_loops import Loops

from captum_dcam.maps import positionwise
from captum_dcam.methods import AttributionTask, method
from captum_dcam.methods.attention import Attentions
from captum_dcam.methods.text_relevance import text_relevance
from captum_dcam.model.gradients import target_gradients
from captum_dcam.model.words import Target, words_of

CASES = (("mini", 0), ("mini", 1), ("lavida", 0), ("causal", 1))
every = pytest.mark.parametrize(("family", "example"), CASES, ids=str)


def task_of(family, cache, example, score="commit"):
    """A word that was there before, one of two tokens, and one that is not written at all."""
    forward = awkward.alone(family, cache, example)
    words = words_of(forward.adapter, forward.trajectory.tokens[0].tolist())
    again = next(w for n, w in enumerate(words) if w.text in [v.text for v in words[:n]])
    long = next(w for w in words if len(w.positions) == 2)
    return AttributionTask(forward, (again, long, Target("other", (0, 9), (12, 30))), score)


def same(found, expected, atol=1e-3):
    for one, other in zip(found, expected, strict=True):
        assert tiny.relative(one, torch.as_tensor(other)) < atol


@every
@pytest.mark.parametrize("score", ("commit", "teacher"))
def test_text_rows_of_the_lens_are_those_that_write_the_answer(family, cache, example, score):
    """The last block's lens at an answer token is the model's logit there."""
    task = task_of(family, cache, example, score)
    forward, count = task.forward, task.forward.trajectory.tokens.shape[1]
    found = method("logit_lens").attribute(task)
    loop = Loops(family, cache, example, score)
    for n, target in enumerate(task.targets):
        pairs = list(zip(target.positions, target.token_ids, strict=True))
        written = 0
        for position, token in pairs:
            step = torch.tensor([loop.steps[position]])
            with torch.no_grad():
                written = written + forward.replay(torch.tensor([0]), step)[0, :, token]
        assert tiny.relative(found.text[n, -count:], written) < 1e-4
        text = sum(loop.text(loop.steps[p], i) for p, i in pairs)
        assert tiny.relative(found.text[n], text) < 1e-4
        image = loop.grids(sum(loop.lens(loop.steps[p], i) for p, i in pairs))
        same([m[n] for m in found.maps], image)


SETTINGS = (
    {"relevance": "mean"},
    {"relevance": "attention"},
    {"order": "position"},
    {"eci": False},
    {"filter": 0},
    {"filter": 5},
)


@pytest.mark.parametrize(
    ("family", "example", "score", "settings"),
    [
        *((f, e, "commit", {}) for f, e in CASES),
        ("lavida", 0, "teacher", {}),
        *(("mini", 0, "commit", one) for one in SETTINGS),
        ("causal", 1, "commit", {"order": "position", "relevance": "attention"}),
    ],
    ids=str,
)
def test_tam_is_the_loop(family, example, score, settings, cache):
    task = task_of(family, cache, example, score)
    found = method("tam", **settings).attribute(task)
    loop, attentions = Loops(family, cache, example, score), Attentions(task)
    places = [*loop.prompt, *range(task.length - len(loop.answer), task.length)]

    def attention(position):
        return attentions.row(position, range(len(attentions.blocks)))[places]

    for n, target in enumerate(task.targets):
        pairs = list(zip(target.positions, target.token_ids, strict=True))
        maps, text = loop.tam(pairs, rows=attention, **settings)
        same([m[n] for m in found.maps], maps)
        np.testing.assert_allclose(found.text[n], text, atol=1e-4)


@pytest.mark.parametrize(
    ("family", "example", "score", "settings"),
    [
        *((f, e, "commit", {"k": 5}) for f, e in CASES),
        ("lavida", 0, "teacher", {}),
        ("mini", 0, "commit", {"k": 8, "p": 0.5, "order": "position", "filter": 0}),
        ("causal", 1, "commit", {"order": "position", "filter": 5}),
    ],
    ids=str,
)
def test_arc_is_the_loop(family, example, score, settings, cache):
    task = task_of(family, cache, example, score)
    found = method("arc", **settings).attribute(task)
    loop = Loops(family, cache, example, score)
    for n, target in enumerate(task.targets):
        pairs = list(zip(target.positions, target.token_ids, strict=True))
        same([m[n] for m in found.maps], loop.arc(pairs, **settings))


@every
@pytest.mark.parametrize("by", ("gradient", "activation"))
def test_text_relevance_of_a_batch_is_that_of_the_example_alone(family, cache, example, by):
    both = awkward.bound(family, cache)
    task = task_of(family, cache, example, "commit")
    found = text_relevance(both, task.targets, example, score="commit", by=by)
    alone = text_relevance(task.forward, task.targets, score="commit", by=by)
    assert found.tokens.ids.tolist() == alone.tokens.ids.tolist()
    assert found.tokens.token_texts == alone.tokens.token_texts
    np.testing.assert_allclose(
        found.values, alone.values, rtol=1e-3, atol=1e-4 * float(alone.values.nan_to_num().max())
    )
    loop = Loops(family, cache, example, "commit")
    for n, target in enumerate(task.targets):
        own = [len(loop.prompt) + p for p in target.positions]
        absent = set(found.values[n].isnan().nonzero()[:, 0].tolist())
        if by == "gradient":
            template = set(range(len(loop.prompt))) - set(awkward.question(task.forward))
            assert absent == {*template, *own}
            continue
        seen = {k for p in target.positions for k, _, _ in loop.context(p, "commit")} - set(own)
        assert absent == set(range(len(loop.rows))) - seen


@every
def test_relevance_by_gradient_follows_the_sequence(family, cache, example):
    """The image's part is the position-wise product; in a causal model a word's logit depends on
    no row from its own on."""
    task = task_of(family, cache, example)
    found = text_relevance(task.forward, task.targets, score="commit")
    for row in target_gradients(task.forward, task.targets, score="commit"):
        if len(task.targets[row.target].positions) > 1:
            continue  # tokens that are read in several states: several rows
        for maps, feature, gradient in zip(found.maps, row.features, row.gradients, strict=True):
            assert tiny.relative(maps[row.target], positionwise(feature, gradient)) < 1e-3
    prompt = found.tokens.prompt
    for n, target in enumerate(task.targets):
        first, last = min(target.positions), max(target.positions)
        before, behind = found.values[n, prompt:][:first], found.values[n, prompt:][last + 1 :]
        assert before.abs().gt(0).all()
        assert bool(behind.abs().gt(0).all()) is (family != "causal") or not len(behind)
