"""Relevance of text tokens: finite differences, the image part, what is excluded."""

import math

import pytest
import tiny
import torch
from methods import made

from captum_dcam.maps import positionwise
from captum_dcam.methods import AttributionTask, method
from captum_dcam.methods.text_relevance import TextRelevance, text_relevance
from captum_dcam.model import gradients as vjp
from captum_dcam.model.forward import single
from captum_dcam.model.sequence import TextTokens, hidden_states, text_tokens
from captum_dcam.model.words import Target

SCORES = ("commit", "final", "teacher")


@pytest.mark.parametrize("score", SCORES)
def test_the_gradient_part_is_the_finite_difference(cache, score):
    """Scaling one token's state by 1 + e changes the logit by e · (gradient · activation)."""
    forward = tiny.bound(cache, dtype=torch.float64)
    (target,) = made.targets(forward, (3,))
    (position,), (token,) = target.positions, target.token_ids
    found = text_relevance(forward, [target], score=score)
    step, prefix = forward.trajectory.step_of(0, 3, score), forward.request.layout.prefix_length
    for k in (0, 2, len(found.tokens) - 8, len(found.tokens) - 1):  # prompt, earlier, later
        at, logits = int(found.tokens.positions[k]), []
        for factor in (1 + 1e-5, 1 - 1e-5):
            calls = []

            def scaled(hidden, _block, factor=factor, at=at, calls=calls):
                start = prefix if calls and cache == "prefix" else 0
                calls.append(1)
                if not 0 <= at - start < hidden.shape[1]:
                    return hidden
                hidden = hidden.clone()
                hidden[:, at - start] *= factor
                return hidden

            with torch.no_grad():
                _, rows = hidden_states(forward, forward.layer, step, scaled)
            logits.append(float(rows[position, token]))
        slope = (logits[0] - logits[1]) / 2e-5
        assert float(found.values[0, k]) == pytest.approx(slope, rel=1e-4, abs=1e-6)


@pytest.mark.parametrize("score", SCORES)
@pytest.mark.parametrize("images", (1, 2))
def test_the_image_part_is_the_positionwise_product(cache, score, images):
    forward = tiny.bound(cache, images=images)
    targets = made.targets(forward, (0, 5))
    found = text_relevance(forward, targets, score=score)
    for row in vjp.target_gradients(forward, targets, score=score):
        for grid, maps in enumerate(found.maps):
            expected = positionwise(row.features[grid], row.gradients[grid])
            assert tiny.relative(maps[row.target], expected) < 1e-4


def test_later_tokens_count_and_the_word_itself_does_not(cache):
    forward = tiny.bound(cache)
    found = text_relevance(forward, made.targets(forward, (3,)), score="teacher")
    own = found.tokens.prompt + 3
    assert found.values[0].isnan().nonzero()[:, 0].tolist() == [own]
    assert found.values[0, own + 1 :].abs().min() > 0
    assert found.values[0, : found.tokens.prompt].abs().min() > 0


def test_a_word_of_several_tokens_is_their_sum(cache):
    forward = tiny.bound(cache)
    first, last = made.targets(forward, (1, 6))
    both = Target("both", (1, 6), first.token_ids + last.token_ids)
    found = text_relevance(forward, (first, last, both))
    image = found.maps[0]
    assert tiny.relative(image[2], image[0] + image[1]) < 1e-4
    seen = ~found.values.isnan().any(0)
    assert tiny.relative(found.values[2, seen], found.values[:2, seen].sum(0)) < 1e-4
    assert found.values[2].isnan().sum() == 2


def test_activation_is_tams_before_normalisation(cache):
    forward = tiny.bound(cache)
    targets = made.targets(forward, (2, 5))
    found = text_relevance(forward, targets, by="activation")
    expected = method("tam", filter=0).attribute(AttributionTask(forward, targets))
    own = found.normalised()
    assert torch.allclose(own.maps[0], expected.maps[0], atol=1e-6)
    assert torch.allclose(own.values, expected.text, atol=1e-6, equal_nan=True)
    assert found.maps[0].min() >= 0 and found.tokens == own.tokens


def test_normalised_keeps_zero_and_signs_over_image_and_text(cache):
    forward = tiny.bound(cache, images=2)
    found = text_relevance(forward, made.targets(forward, (0, 5)))
    own = found.normalised()
    for n in range(2):
        raw = [*found.maps[0][n].flatten().tolist(), *found.maps[1][n].flatten().tolist()]
        raw += [v for v in found.values[n].tolist() if not math.isnan(v)]
        assert min(raw) < 0 < max(raw)
        peak = max(map(abs, raw))
        for before, after in zip((*found.maps, found.values), (*own.maps, own.values), strict=True):
            assert torch.allclose(after[n], before[n] / peak, atol=1e-7, equal_nan=True)


def test_what_hardly_counts_stays_small():
    tokens = TextTokens(torch.arange(3), torch.arange(3), ("a", " b", " c"), 1)
    values = torch.tensor([[7e-6, float("nan"), 0.0], [0.0, float("nan"), 0.0]])
    maps = (torch.tensor([[[-1.0, 0.5]], [[0.0, 0.0]]]),)
    own = TextRelevance(tokens, values, maps).normalised()
    assert own.values[0, 0] == pytest.approx(7e-6) and own.values[0, 2] == 0
    assert own.values[:, 1].isnan().all()
    assert torch.equal(own.maps[0], maps[0]) and not own.values[1].nan_to_num().any()


def test_an_example_of_a_batch_is_that_example(cache):
    forward = tiny.bound(cache, batch=2, prompts=["describe the image .", "image"])
    target = made.targets(forward, (4,), 1)
    found = text_relevance(forward, target, 1)
    alone = text_relevance(single(forward, 1), target)
    assert torch.equal(found.maps[0], alone.maps[0]) and len(found.tokens) == 1 + 8
    with pytest.raises(ValueError, match="example 2"):
        text_relevance(forward, target, 2)


@pytest.mark.parametrize("by", ("gradient", "activation"))
def test_half_precision_and_one_token_answers(cache, by):
    forward = tiny.bound(cache, dtype=torch.bfloat16, gen_length=1)
    found = text_relevance(forward, made.targets(forward, (0,)), by=by)
    assert found.maps[0].dtype == torch.float32 and found.maps[0].isfinite().all()
    assert found.values.shape == (1, len(text_tokens(forward)))


@pytest.mark.parametrize("by", ("gradient", "activation"))
@pytest.mark.parametrize("fails", (False, True))
def test_nothing_is_left_behind(cache, by, fails):
    forward = tiny.bound(cache)
    model = forward.adapter.model.train()
    before = torch.random.get_rng_state()
    handle = model.layers[-1].register_forward_hook(lambda *_: 1 / 0) if fails else None
    if handle is None:
        text_relevance(forward, made.targets(forward), by=by)
    else:
        with pytest.raises(ZeroDivisionError):
            text_relevance(forward, made.targets(forward), by=by)
        handle.remove()
    assert not tiny.hooks(model) and not tiny.hooks(forward.tap)
    assert all(m.training for m in model.modules())
    assert all(p.requires_grad and p.grad is None for p in model.parameters())
    assert not forward.request.pixels.requires_grad
    assert torch.equal(torch.random.get_rng_state(), before)


def test_an_unknown_way_is_named():
    with pytest.raises(ValueError, match="by is 'attention'"):
        text_relevance(tiny.bound("prefix"), (), by="attention")


def test_the_product_covers_the_whole_sequence(cache):
    """Every token but those of the image, whose products the maps have."""
    forward = tiny.bound(cache)
    rows = []
    targets, scores = made.targets(forward, (5,)), ["commit"]
    vjp.mapped_gradients(forward, targets, [0], scores, rows.append, tokens=True)
    (found,) = (row.tokens for row in rows)
    assert found.shape == (forward.request.layout.prefix_length + 8,)
    image = forward.request.layout.grids[0].positions.flatten()
    others = torch.ones(len(found), dtype=torch.bool).index_fill(0, image, False)
    assert not found[image].any() and found[others].all() and forward.tap.leaves is None
    (plain,) = vjp.target_gradients(forward, targets)
    assert plain.tokens is None and torch.equal(plain.gradients[0], rows[0].gradients[0])
