"""CAM / logit lens (TAM Eq. 1) against the model's own logits of the whole sequence."""

import pytest
import tiny
import torch
from methods import made

from captum_dcam.errors import LayerError
from captum_dcam.methods import AttributionTask, Budget, lens, metered, method
from captum_dcam.methods.lens import Lens, context_of, lens_logits, own_steps, reads
from captum_dcam.model.forward import DenoisingForward, single
from captum_dcam.model.sequence import text_tokens
from captum_dcam.model.words import Target


def canvas_of(forward, step):
    trajectory = forward.trajectory
    return trajectory.tokens if step == trajectory.steps else trajectory.states[0][step]


def whole(forward, step, watch=None):
    """Logits (L, V) of prefix and answer in one plain call of the model (segments: no cache)."""
    model, request = forward.adapter.model, forward.request
    ids = torch.cat((request.extras[0], canvas_of(forward, step)), dim=1)
    parts = (request.layout.prefix_length, ids.shape[1] - request.layout.prefix_length)
    segments = parts if forward.trajectory.cache == "prefix" else (sum(parts),)
    with torch.set_grad_enabled(watch is not None):
        return model(ids, request.pixels, segments=segments).logits[0]


@pytest.mark.parametrize("score", ("commit", "final", "teacher"))
@pytest.mark.parametrize("position", range(0, 8, 3))
def test_maps_and_text_are_rows_of_the_models_logits(cache, score, position):
    forward = tiny.bound(cache)
    task = AttributionTask(forward, made.targets(forward, (position,)), score)
    found = method("logit_lens").attribute(task)
    logits = whole(forward, task.step(position))[:, task.targets[0].token_ids[0]]
    prefix = forward.request.layout.prefix_length
    prompt = forward.adapter.prompt_tokens(forward.request)[0].tolist()
    at = [*prompt, *range(prefix, prefix + 8)]
    assert tiny.relative(found.maps[0][0].flatten(), logits[:64]) < 1e-5
    assert tiny.relative(found.text[0], logits[at]) < 1e-5


def test_maps_keep_their_sign(cache):
    forward = tiny.bound(cache)
    token = int(whole(forward, 0)[:64].sum(0).argmin())
    found = method("logit_lens").attribute(
        AttributionTask(forward, (Target("least", (0,), (token,)),))
    )
    assert found.maps[0].mean() < 0


@pytest.mark.parametrize("block", (0, 2, -2))
def test_any_block_goes_through_the_final_norm_and_head(cache, block):
    forward = tiny.bound(cache)
    task = AttributionTask(forward, made.targets(forward, (2,)))
    found = method("logit_lens", block=block).attribute(task)
    model, seen = forward.adapter.model, []
    handle = model.layers[block].register_forward_hook(lambda _m, _a, out: seen.append(out[0][0]))
    whole(forward, task.step(2))
    handle.remove()
    hidden = seen[0].double()
    normed = hidden / (hidden.square().mean(-1, keepdim=True) + model.config.rms_norm_eps).sqrt()
    head = model.embed_tokens.weight[task.targets[0].token_ids[0]].double()
    expected = (normed * model.norm.weight.double() @ head).detach()
    assert tiny.relative(found.maps[0][0].flatten(), expected[:64]) < 1e-5
    assert tiny.relative(found.text[0][-8:], expected[-8:]) < 1e-5


def test_a_word_of_several_tokens_is_their_sum(cache):
    forward = tiny.bound(cache)
    first, last = made.targets(forward, (1, 6))
    both = Target("both", (1, 6), first.token_ids + last.token_ids)
    found = method("logit_lens").attribute(AttributionTask(forward, (first, last, both)))
    assert torch.allclose(found.maps[0][2], found.maps[0][:2].sum(0), atol=1e-5)
    assert torch.allclose(found.text[2], found.text[:2].sum(0), atol=1e-5)


def test_one_prefill_serves_all_words_and_every_state_is_computed_once():
    for cache, expected in (("prefix", 1), ("none", 4)):
        task = made.task_of(cache, range(8), steps=4)
        with metered(task.forward) as cost:
            method("logit_lens").attribute(task)
        assert (cost.forwards, cost.backwards) == (expected, 0)


def test_a_budget_leaves_the_words_before_it():
    task = made.task_of("none", range(4))
    with metered(task.forward, Budget(passes=2)):
        found = method("logit_lens").attribute(task)
    assert found.done.tolist() == [True, True, False, False] and "budget" in found.note
    assert found.maps[0][:2].any() and not found.maps[0][2:].any()


def test_chunks_change_nothing(cache, monkeypatch):
    maps = []
    for at_once in (2**24, 100, 1):
        monkeypatch.setattr(lens, "LOGITS_AT_ONCE", at_once)
        maps.append(method("logit_lens").attribute(made.task_of(cache)).maps[0])
    assert all(torch.allclose(maps[0], m, atol=1e-6) for m in maps)


def test_no_chunk_holds_more_logits_than_allowed(monkeypatch):
    adapter, sizes = tiny.adapter("prefix"), []
    original = adapter.unembed
    monkeypatch.setattr(
        adapter, "unembed", lambda h: sizes.append(len(h) * adapter.vocabulary) or original(h)
    )
    monkeypatch.setattr(lens, "LOGITS_AT_ONCE", 300)
    lens_logits(adapter, torch.randn(20, 48), [1, 2])
    assert max(sizes) <= 300


def test_left_padding_is_no_text(cache):
    forward = tiny.bound(cache, batch=2, prompts=["describe the image .", "image"])
    task = AttributionTask(single(forward, 1), made.targets(forward, (2,), 1))
    alone = tiny.adapter(cache)
    request = alone.prepare([[tiny.picture(10)]], ["image"])
    own = bound_to(alone, request, forward, 1)
    found = method("logit_lens").attribute(task)
    expected = method("logit_lens").attribute(AttributionTask(own, task.targets))
    assert found.text.shape == expected.text.shape == (1, 1 + 8)
    assert tiny.relative(found.maps[0], expected.maps[0]) < 1e-4
    assert tiny.relative(found.text, expected.text) < 1e-4


def bound_to(adapter, request, like, example):
    forward = DenoisingForward(adapter, like.layer)
    forward.bind(request, like.trajectory.single(example))
    return forward


def test_the_gradient_at_the_last_state_that_predicts_is_the_heads_row(cache):
    """TAM: CAM is Grad-CAM. True at the predicting position, after the final norm ..."""
    forward = tiny.bound(cache)
    task = AttributionTask(forward, made.targets(forward, (3,)))
    found = method("logit_lens").attribute(task).maps[0][0].flatten()
    model, seen = forward.adapter.model, []
    handle = model.norm.register_forward_hook(lambda _m, _a, out: seen.append(out) or out)
    logits = whole(forward, task.step(3), watch=True)
    handle.remove()
    at = forward.request.layout.prefix_length + 3
    (gradient,) = torch.autograd.grad(logits[at, task.targets[0].token_ids[0]], seen[0])
    weights = gradient[0, at]
    assert torch.allclose(weights, model.embed_tokens.weight[task.targets[0].token_ids[0]])
    assert tiny.relative(seen[0][0, :64].detach() @ weights, found) < 1e-5
    # ... and Grad-CAM proper, pooled over image positions, is zero there: no path.
    assert not gradient[0, :64].any()


def test_context_is_the_prompt_and_what_was_committed_before(cache):
    forward = tiny.bound(cache, steps=4)
    task = AttributionTask(forward, made.targets(forward, (2,)))
    commit = forward.trajectory.commit_step[0].tolist()
    tokens = forward.trajectory.tokens[0].tolist()
    stops = forward.adapter.stop_ids
    prompt = text_tokens(forward).prompt
    for position in range(8):
        for order, before in (
            ("commit", [p for p in range(8) if commit[p] < commit[position]]),
            ("position", list(range(position))),
        ):
            expected = [*range(prompt), *(prompt + p for p in before if tokens[p] not in stops)]
            assert context_of(task, position, order).tolist() == expected
    assert own_steps(task) == [0] * prompt + commit
    assert own_steps(AttributionTask(forward, (), "teacher")) == [4] * (prompt + 8)


def test_settings_and_blocks_are_checked():
    task = made.task_of()
    with pytest.raises(LayerError, match="block 9 is not in the model"):
        method("logit_lens", block=9).check(task)
    with pytest.raises(TypeError, match="block is True"):
        method("logit_lens", block=True).check(task)


def test_image_states_behind_a_cached_prefix_know_no_step():
    forward = tiny.bound("prefix")
    task = AttributionTask(forward, made.targets(forward, (0, 5)))
    read = Lens(forward, reads(task))
    token = task.targets[0].token_ids[0]
    assert torch.equal(read.image(task.step(0), token), read.image(task.step(5), token))
    assert read.rankings(0, 4).shape == (len(read.tokens), 4)
