"""Architecture surgery and feature surgery against loops written by hand."""

import math

import pytest
import tiny
import torch
import torch.nn.functional as F
from methods import made

from captum_dcam.errors import LayerError, MethodError
from captum_dcam.methods import AttributionTask, Budget, metered, method
from captum_dcam.methods.attention import Fused, inside_blocks
from captum_dcam.methods.surgery import Surgery, ValueAttention, answer_ids, without_redundancy
from captum_dcam.mini import modeling
from captum_dcam.model.forward import single
from captum_dcam.model.words import Target

NAMES = ("architecture_surgery", "feature_surgery")
DOUBLE = torch.float64
PROMPTS = ["describe the image .", "what color is the heart ?"]


def eager(task, on=True):
    config = task.forward.adapter.model.config
    config._attn_implementation = "eager" if on else "sdpa"


@pytest.fixture(params=(0, 1))
def padded(request, cache):
    """One of two examples of which the first is padded on the left, in double precision."""
    forward = tiny.bound(cache, batch=2, prompts=PROMPTS, dtype=DOUBLE)
    forward = single(forward, request.param)
    return AttributionTask(forward, made.targets(forward, (0, 3)))


@torch.no_grad()
def by_hand(task, position, start):
    """Second path and the last block's output (L, D): the original path block by block, and beside
    it value-value attention from the blocks' own parts."""
    forward = task.forward
    model, request = forward.model, forward.request
    canvas = task.arguments(position)[-1]
    ids, valid = request.extras
    ids = torch.cat((ids, canvas), 1)
    keys = torch.cat((valid.bool(), torch.ones_like(canvas).bool()), 1)
    prefix, length = request.layout.prefix_length, ids.shape[1]
    if forward.trajectory.cache == "prefix":
        ids, keys, length = ids[:, :prefix], keys[:, :prefix], prefix
    spots = (keys.long().cumsum(1) - 1).clamp_min(0)
    x, rope = model.embed(ids, request.pixels), model.rope(spots, DOUBLE)
    second = None
    for index, block in enumerate(model.layers):
        if index == start:
            second = x.clone()
        if index >= start:
            attention = block.attention
            values = (block.input_norm(x) @ attention.v_proj.weight.T)[0].chunk(3, -1)
            heads = []
            for v in values:
                scores = v @ v.T / math.sqrt(v.shape[1])
                scores[:, ~keys[0]] = -math.inf
                heads.append(scores.softmax(-1) @ v)
            second = second + torch.cat(heads, -1) @ attention.o_proj.weight.T
        x, _ = block(x, rope, (length,), (keys[:, None, None],))
    return second[0], x[0]


@pytest.mark.parametrize("start", (0, 2, 3))
@pytest.mark.parametrize("written", (False, True))
def test_the_second_path_is_the_papers(padded, start, written):
    eager(padded, written)
    surgery, step = Surgery(padded), padded.step(3)
    second, last = by_hand(padded, 3, start)
    assert tiny.relative(surgery.second_path(step, start), second[:64]) < 1e-9
    assert tiny.relative(surgery.plain(step, 3), last[:64]) < 1e-9


def test_the_original_path_runs_on_unchanged(cache):
    """The second run sees every block's own input and output, bit for bit."""
    task = made.task_of(cache, keep=False)
    seen = []
    handles = [
        block.register_forward_hook(lambda _m, a, out: seen.append((a[0], out[0])))
        for block in task.forward.model.layers
    ]
    Surgery(task).second_path(task.step(3), 1)
    for handle in handles:
        handle.remove()
    assert len(seen) == 8
    for first, second in zip(seen[:4], seen[4:], strict=True):
        assert torch.equal(first[0], second[0]) and torch.equal(first[1], second[1])


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("features", (False, True))
@torch.no_grad()
def test_maps_are_logits_of_the_states(padded, name, features):
    word = Target("two tokens", (1, 6), (11, 23))
    task = AttributionTask(padded.forward, (*padded.targets, word))
    settings = {"start": 1, "features": features} if name == "architecture_surgery" else {}
    if not settings and not features:
        settings = {"block": 3}
    found = method(name, **settings).attribute(task)
    model = task.forward.model
    known = answer_ids(task.forward)
    for n, target in enumerate(task.targets):
        expected = torch.zeros(64, dtype=DOUBLE)
        for position, token in zip(target.positions, target.token_ids, strict=True):
            if name == "architecture_surgery":
                state = by_hand(task, position, 1)[0][:64]
            else:
                block = settings.get("block", 2)
                state = Surgery(task).plain(task.step(position), block)
            normed = state / (state.square().mean(-1, keepdim=True) + model.norm.eps).sqrt()
            logits = normed * model.norm.weight @ model.embed_tokens.weight.T
            if features or name == "feature_surgery":
                ids = known + [token] * (token not in known)
                a = [logits[:, k] for k in ids]
                top = max(abs(float(x.mean())) for x in a)
                exp = [math.exp(2 * float(x.mean()) / top) for x in a]
                w = [len(ids) * e / sum(exp) for e in exp]
                common = sum(wk * ak for wk, ak in zip(w, a, strict=True)) / len(ids)
                mine = ids.index(token)
                expected += w[mine] * a[mine] - common
            else:
                expected += logits[:, token]
        assert tiny.relative(found.maps[0][n].flatten(), expected) < 1e-5
    assert found.text is None and bool(found.done.all())


def test_answer_ids_are_unique_and_without_stop_tokens():
    forward = tiny.bound("prefix")
    tokens = forward.trajectory.tokens
    stop = min(forward.adapter.stop_ids)
    tokens[0] = torch.tensor([9, 8, 9, 7, stop, 8, stop, stop])
    assert answer_ids(forward) == [9, 8, 7]


def test_redundancy():
    logits = torch.randn(4, 10, dtype=DOUBLE)
    got = without_redundancy(logits)
    assert torch.allclose(got.sum(0), torch.zeros(10, dtype=DOUBLE), atol=1e-12)
    # the same everywhere and for all words: nothing is left
    assert not without_redundancy(torch.full((3, 5), 2.0)).any()
    assert not without_redundancy(logits[:1]).any() and not without_redundancy(0 * logits).any()


@pytest.mark.parametrize("settings", ({}, {"scale": 0.3}, {"is_causal": True}))
@pytest.mark.parametrize("masked", (False, True))
def test_values_take_the_place_of_queries_and_keys(settings, masked):
    """Behind a cache (two queries of five), with grouped heads, masks and a scale."""
    queries = 5 if settings.get("is_causal") else 2
    q, k, v = torch.randn(1, 4, queries, 6), torch.randn(1, 2, 5, 6), torch.randn(1, 2, 5, 6)
    if masked and not settings.get("is_causal"):
        settings = {**settings, "attn_mask": torch.rand(1, 1, queries, 5) > 0.3}
        settings["attn_mask"][..., 0] = True
    module = torch.nn.Identity()
    call = Fused(q, k, v, enable_gqa=True, **settings)
    mode = ValueAttention(0)
    module.register_forward_hook(lambda *_: call.run(F.scaled_dot_product_attention))
    with inside_blocks([module], mode):
        mode.block = 0
        got = call.run(F.scaled_dot_product_attention)
    wide = v.repeat_interleave(2, 1)
    scores = wide[:, :, -queries:] @ wide.mT * settings.get("scale", 6**-0.5)
    mask = settings.get("attn_mask")
    if settings.get("is_causal"):
        mask = torch.ones(5, 5).tril().bool()
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf)
    assert mode.replaced == {0} and torch.allclose(got, scores.softmax(-1) @ wide, atol=1e-6)


@pytest.mark.parametrize("name, passes", [(NAMES[0], 2), (NAMES[1], 1)])
def test_one_prefill_serves_all_words(name, passes):
    task = made.task_of("prefix", range(8))
    with metered(task.forward) as cost:
        method(name).attribute(task)
    assert (cost.forwards, cost.backwards) == (passes, 0)


def test_a_budget_leaves_the_words_before():
    task = made.task_of("none", (0, 3, 5), block_length=8)
    with metered(task.forward, Budget(passes=5)):
        found = method("architecture_surgery").attribute(task)
    assert found.done.tolist() == [True, True, False] and not found.maps[0][2].any()


def test_settings_are_checked(cache, monkeypatch):
    task = made.task_of(cache)
    for name, settings in (
        ("architecture_surgery", {"start": 4}),
        ("feature_surgery", {"block": 9}),
    ):
        with pytest.raises(LayerError, match="is not in the model"):
            method(name, **settings).check(task)
    method("architecture_surgery", start=-1).check(task)

    def kernel(q, k, v, mask, _eager):
        scores = (q @ k.mT - (q @ k.mT).amax(-1, keepdim=True)).exp()
        return scores @ v / scores.sum(-1, keepdim=True)

    monkeypatch.setattr(modeling, "attend", kernel)
    for work in ("check", "attribute"):
        with pytest.raises(MethodError, match=r"\[2, 3\] \(MiniBlock\) cannot be replaced.*sdpa"):
            getattr(method("architecture_surgery"), work)(task)
    assert not tiny.hooks(task.forward)
