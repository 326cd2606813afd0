"""Attention weights without changing the model, and the three maps made of them."""

import functools

import pytest
import tiny
import torch
import torch.nn.functional as F
import transformers
from methods import made

from captum_dcam.errors import LayerError, MethodError
from captum_dcam.methods import AttributionTask, Budget, metered, method
from captum_dcam.methods.attention import Attentions, Fused, FusedCall, recording, through
from captum_dcam.mini import modeling
from captum_dcam.model.forward import single
from captum_dcam.model.sequence import image_positions, text_tokens
from captum_dcam.model.words import Target

NAMES = ("attention", "attention_rollout", "grad_rollout")
DOUBLE = torch.float64
PROMPTS = ["describe the image .", "what color is the heart ?"]


def eager(task, on=True):
    config = task.forward.adapter.model.config
    config._attn_implementation = "eager" if on else "sdpa"


def own_attend(log):
    """Attention written by hand on a sequence of segments; ``log`` gets a leaf a call that is added
    to the weights, so that autograd gives their gradient, and the weights."""

    def attend(q, k, v, mask, _eager):
        scores = torch.einsum("bhqd,bhkd->bhqk", q, k) / q.shape[-1] ** 0.5
        if mask is not None:
            scores = scores.masked_fill(~mask, -torch.inf)
        exp = (scores - scores.amax(-1, keepdim=True)).exp()
        weights = exp / exp.sum(-1, keepdim=True)
        leaf = torch.zeros_like(weights, requires_grad=True)
        log.append((weights.detach(), leaf))
        return torch.einsum("bhqk,bhkd->bhqd", weights + leaf, v)

    return attend


def by_hand(task, position, monkeypatch):
    """Logits (T, V), weights and their leaves (heads, L, L) of every block, from one run over the
    whole sequence: no cache, and with a prefix cache two segments."""
    forward = task.forward
    model, request = forward.model, forward.request
    canvas = task.arguments(position)[-1]
    ids, valid = request.extras
    ids = torch.cat((ids, canvas), 1)
    prefix, length = request.layout.prefix_length, ids.shape[1]
    whole = forward.trajectory.cache == "none"
    segments = (length,) if whole else (prefix, length - prefix)
    keys = torch.cat((valid.bool(), torch.ones_like(canvas).bool()), 1)[:, None, None]
    masks = (keys,) if whole else (keys[..., :prefix], keys)
    spots = (torch.cat((valid, torch.ones_like(canvas)), 1).cumsum(1) - 1).clamp_min(0)
    with torch.no_grad():
        embedded = model.embed(ids, request.pixels)
    log = []
    with monkeypatch.context() as patch:
        patch.setattr(modeling, "attend", own_attend(log))
        logits = model(
            inputs_embeds=embedded, segments=segments, segment_masks=masks, position_ids=spots
        ).logits
    count = len(segments)
    calls = [log[i : i + count] for i in range(0, len(log), count)]
    return logits[0, prefix:], calls, length


def assembled(parts, length):
    return torch.cat([F.pad(p[0], (0, length - p.shape[-1])) for p in parts], dim=1)


@functools.cache
def of_two(cache):
    return tiny.bound(cache, batch=2, prompts=PROMPTS, dtype=DOUBLE)


@pytest.fixture(params=(0, 1))
def padded(request, cache):
    """One of two examples of which the first is padded on the left, in double precision."""
    forward = single(of_two(cache), request.param)
    return AttributionTask(forward, made.targets(forward, (0, 3, 7)))


def test_weights_are_those_of_a_model_written_by_hand(padded, monkeypatch):
    for position in (0, 3, 7):
        _, calls, length = by_hand(padded, position, monkeypatch)
        attentions = Attentions(padded)
        for block, parts in enumerate(calls):
            expected = assembled([weights for weights, _ in parts], length).mean(0)
            got = attentions.matrix(position, block)
            assert got.dtype == DOUBLE and tiny.relative(got, expected) < 1e-12
            assert torch.allclose(got.sum(1), torch.ones(length, dtype=DOUBLE))


@pytest.mark.parametrize("written", (False, True))
def test_gradients_of_weights_are_autograds(padded, monkeypatch, written):
    eager(padded, written)
    logits, calls, _ = by_hand(padded, 3, monkeypatch)
    leaves = [leaf for parts in calls for _, leaf in parts]
    grads = iter(
        torch.autograd.grad(logits[3, 17], leaves, allow_unused=True, materialize_grads=True)
    )
    got = Attentions(padded, gradients=True).gradients(3, 17)
    for block, parts in enumerate(calls):
        for call, (weights, _) in zip(got[block], parts, strict=True):
            expected = (weights * next(grads))[0].clamp_min(0).mean(0)
            assert tiny.relative(call, expected) < 1e-9


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
@pytest.mark.parametrize("written", (False, True))
@pytest.mark.parametrize("gradients", (False, True))
def test_recording_changes_no_bit(cache, dtype, written, gradients):
    task = made.task_of(cache, dtype=dtype, keep=False)
    eager(task, written)
    forward = task.forward
    with torch.no_grad():
        expected = forward.replay(torch.tensor([0]), torch.tensor([task.step(3)]))[0]
    got, calls = Attentions(task, gradients).at(3)
    assert torch.equal(got, expected) and got.requires_grad == gradients
    assert len(calls) == 4 and all(len(c) == (2 if cache == "prefix" else 1) for c in calls)


@pytest.mark.parametrize("name", NAMES)
def test_fused_and_written_attention_agree(cache, name):
    maps = []
    for written in (False, True):
        task = made.task_of(cache, dtype=DOUBLE)
        eager(task, written)
        found = method(name).attribute(task)
        maps.append(torch.cat((found.maps[0].flatten(1), found.text), 1))
    assert tiny.relative(*maps) < 1e-5


def random_call(heads=4, groups=2, queries=5, keys=7, **settings):
    g = torch.Generator().manual_seed(0)
    q = torch.randn(1, heads, queries, 6, generator=g, dtype=DOUBLE)
    k = torch.randn(1, groups, keys, 6, generator=g, dtype=DOUBLE)
    return Fused(q, k, torch.eye(keys, dtype=DOUBLE).expand(1, groups, keys, keys), **settings)


some = torch.rand(1, 4, 5, 7, generator=torch.Generator().manual_seed(1)) > 0.4
SETTINGS = {
    "plain": {},
    "scale": {"scale": 0.3},
    "causal": {"is_causal": True},
    "boolean mask": {"attn_mask": some},
    "shared mask": {"attn_mask": some[:1, :1, :1]},
    "mask of two dimensions": {"attn_mask": some[0, 0]},
    "added mask": {"attn_mask": 3 * torch.randn(1, 1, 5, 7, dtype=DOUBLE)},
    "masked throughout": {"attn_mask": torch.zeros(5, 7, dtype=torch.bool)},
}


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
@pytest.mark.parametrize("groups", (4, 2, 1))
def test_masks_scales_and_groups_are_torchs(settings, groups):
    """With the identity as values, torch's attention returns its own weights."""
    call = random_call(groups=groups, **settings, enable_gqa=groups < 4)
    expected = call.run(F.scaled_dot_product_attention).nan_to_num(0)
    found = FusedCall(call, expected)
    got = torch.stack([found.head(h) for h in range(4)])
    assert torch.allclose(got, expected[0], atol=1e-12)


def test_gradients_of_grouped_heads():
    call = random_call(groups=2, enable_gqa=True)
    call = call._replace(value=torch.randn(1, 2, 7, 3, dtype=DOUBLE))
    above = torch.randn(1, 4, 5, 3, dtype=DOUBLE)
    found = FusedCall(call, above)
    values = call.value.repeat_interleave(2, 1)
    weights = torch.stack([found.head(h) for h in range(4)])[None].requires_grad_()
    (expected,) = torch.autograd.grad(weights @ values, weights, above)
    got = torch.stack([found.head_gradient(h, above) for h in range(4)])
    assert torch.allclose(got, expected[0])
    mean = (weights * expected).clamp_min(0).mean(1)[0].detach()
    assert torch.allclose(found.mean_positive(above), mean)


@pytest.mark.parametrize("written", (False, True))
def test_a_hugging_face_model_with_grouped_heads(written):
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=50,
    )
    model = transformers.LlamaForCausalLM(config).eval()
    ids = torch.arange(9)[None]
    model.set_attn_implementation("eager")
    with torch.no_grad():
        expected = model(ids, output_attentions=True).attentions
    model.set_attn_implementation("eager" if written else "sdpa")
    with torch.no_grad(), recording(model.model.layers) as calls:
        model(ids)
    for block, weights in enumerate(expected):
        (call,) = calls[block]
        got = torch.stack([call.head(h) for h in range(4)])
        assert torch.allclose(got, weights[0], atol=1e-6)


# -- the maps ------------------------------------------------------------------------------------


def expected_rows(name, task, position, token, monkeypatch):
    """The dense matrices of the formulas, multiplied block after block."""
    logits, calls, length = by_hand(task, position, monkeypatch)
    weights = [assembled([w for w, _ in parts], length) for parts in calls]
    query, one = task.forward.request.layout.prefix_length + position, torch.eye(length)
    if name == "attention":
        return torch.stack(weights).mean((0, 1))[query]
    if name == "attention_rollout":
        product = one.double()
        for a in weights:
            mixed = 0.5 * a.mean(0) + 0.5 * one
            product = (mixed / mixed.sum(1, keepdim=True)) @ product
        return product[query]
    leaves = [leaf for parts in calls for _, leaf in parts]
    grads = torch.autograd.grad(
        logits[position, token], leaves, allow_unused=True, materialize_grads=True
    )
    grads, relevance = iter(grads), one.double()
    for a, parts in zip(weights, calls, strict=True):
        gradient = assembled([next(grads) for _ in parts], length)
        relevance = relevance + (a * gradient).relu().mean(0) @ relevance
    return relevance[query]


@pytest.mark.parametrize("name", NAMES)
def test_maps_are_the_papers_formulas(padded, name, request, monkeypatch):
    score = ("commit", "teacher")[request.node.callspec.params["padded"]]
    task = AttributionTask(padded.forward, padded.targets, score)
    target = Target("two tokens", (1, 6), (11, 23))
    found = method(name).attribute(
        AttributionTask(padded.forward, (*padded.targets, target), score)
    )
    spots = image_positions(task.forward), text_tokens(task.forward).positions
    pairs = [tuple(zip(t.positions, t.token_ids, strict=True)) for t in (*padded.targets, target)]
    for n, tokens in enumerate(pairs):
        row = sum(expected_rows(name, task, p, t, monkeypatch) for p, t in tokens)
        assert tiny.relative(found.maps[0][n].flatten(), row[spots[0]]) < 1e-6
        assert tiny.relative(found.text[n], row[spots[1]]) < 1e-6
    assert bool((found.maps[0] >= 0).all()) and bool(found.done.all())


def test_one_block_of_raw_attention(cache, monkeypatch):
    task = made.task_of(cache)
    attentions = Attentions(task)
    for block in (0, 3, -1):
        row = attentions.matrix(3, block)[attentions.query(3)]
        got = method("attention", block=block).attribute(task).maps[0][1]
        assert torch.allclose(got.flatten(), row[:64])
    with pytest.raises(LayerError, match="block 4"):
        method("attention", block=4).check(task)


def test_row_times_matrix_in_parts():
    parts = [torch.rand(3, 3), torch.rand(2, 5)]
    dense = torch.cat((F.pad(parts[0], (0, 2)), parts[1]))
    row = torch.rand(5)
    assert torch.allclose(through(row, parts), row @ dense)


def test_states_that_tokens_share_are_run_once():
    forward = tiny.bound("prefix")
    task = AttributionTask(forward, made.targets(forward, range(8)), "teacher")
    with metered(forward) as cost:
        method("grad_rollout").attribute(task)
    assert (cost.forwards, cost.backwards) == (1, 8)


def test_a_budget_leaves_the_words_before():
    task = made.task_of("none", (0, 3, 5), block_length=8)
    with metered(task.forward, Budget(passes=2)):
        found = method("attention").attribute(task)
    assert found.done.tolist() == [True, True, False] and "budget of 2" in found.note
    assert found.maps[0][1].any() and not found.maps[0][2].any() and not found.text[2].any()


# -- models that do not show their weights, and what is left behind --------------------------------


def hidden_kernel(q, k, v, mask, _eager):
    scores = (q @ k.mT - (q @ k.mT).amax(-1, keepdim=True)).exp()
    return scores @ v / scores.sum(-1, keepdim=True)


@pytest.mark.parametrize("name", NAMES)
def test_a_fused_kernel_is_named(cache, name, monkeypatch):
    task = made.task_of(cache)
    monkeypatch.setattr(modeling, "attend", hidden_kernel)
    chosen = method(name)
    for work in (chosen.check, chosen.attribute):
        with pytest.raises(MethodError, match=r"\[0, 1, 2, 3\] \(MiniBlock\).*sdpa"):
            work(task)
    assert not tiny.hooks(task.forward)


def test_the_vision_tower_is_ignored(cache):
    task = made.task_of(cache)
    adapter, request = task.forward.adapter, task.forward.request
    with recording(adapter.blocks) as calls, torch.no_grad():
        adapter.embed(request.pixels, *request.extras)
    assert not calls
