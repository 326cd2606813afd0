"""CP-LRP and AttnLRP: conservation, and the whole against relevance propagated by hand."""

import importlib
import sys
import types
from dataclasses import replace
from pathlib import Path

import pytest
import tiny
import torch
import transformers
from methods import made

from captum_dcam.errors import LayerError, MethodError
from captum_dcam.methods import AttributionTask, Budget, metered, method
from captum_dcam.methods.attention import inside_blocks
from captum_dcam.methods.relevance import AttnRules, CPRules, Relevance
from captum_dcam.mini import modeling
from captum_dcam.model.forward import single
from captum_dcam.model.sequence import image_positions, outputs_of, text_tokens
from captum_dcam.model.words import Target

NAMES = ("cp_lrp", "attn_lrp")
RULES = {"cp_lrp": CPRules, "attn_lrp": AttnRules}
DOUBLE = torch.float64
PROMPTS = ["describe the image .", "what color is the heart ?"]
both = pytest.mark.parametrize("rules", RULES.values(), ids=RULES)


def eager(task, on=True):
    config = task.forward.adapter.model.config
    config._attn_implementation = "eager" if on else "sdpa"


def rand(*shape, seed=0, dtype=DOUBLE):
    made_ = torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=DOUBLE)
    return made_.to(dtype)


# -- conservation --------------------------------------------------------------------------------


@pytest.mark.parametrize("example", (0, 1))
@pytest.mark.parametrize("block", (0, 1, 2))
@pytest.mark.parametrize("written", (False, True))
def test_cp_lrp_adds_up_to_the_logit(cache, example, block, written):
    forward = tiny.bound(cache, batch=2, prompts=PROMPTS, dtype=DOUBLE)
    forward = single(forward, example)
    for score in ("commit", "teacher"):
        task = AttributionTask(forward, made.targets(forward), score)
        eager(task, written)
        relevance = Relevance(task, block, CPRules)
        for position, token in ((0, 5), (3, 40), (7, 69)):
            with torch.no_grad():
                logits = forward(task.pixels, *task.arguments(position))[0]
            total = relevance.of(position, token)
            assert total.shape == (forward.request.layout.prefix_length + 8,)
            assert torch.allclose(total.sum(), logits[position, token], rtol=1e-9, atol=1e-12)


@both
def test_the_rules_change_no_bit(cache, rules):
    for dtype in (torch.float32, torch.bfloat16):
        for written in (False, True):
            task = made.task_of(cache, dtype=dtype, keep=False)
            eager(task, written)
            steps = torch.tensor([task.step(3)])
            with torch.no_grad():
                expected = task.forward.replay(torch.tensor([0]), steps)[0]
            got, leaves = Relevance(task, 1, rules).state(3)
            assert torch.equal(got, expected)
            assert len(leaves) == (2 if cache == "prefix" else 1)


# -- the whole, against relevance propagated by hand -----------------------------------------------


def linear(x, weight, relevance):
    """The 0-rule: R_j = Σ_i x_j w_ij R_i / z_i."""
    return x * ((relevance / (x @ weight.T)) @ weight)


def add(a, b, relevance):
    return a * relevance / (a + b), b * relevance / (a + b)


def product(a, b, relevance, cp):
    """(heads, q, k) @ (heads, k, d): shares of both; CP-LRP gives all to the second."""
    ratio = relevance / (a @ b)
    return (1 - cp) / 2 * a * (ratio @ b.mT), (1 + cp) / 2 * b * (a.mT @ ratio)


class Block:
    """A block of the tiny model in plain algebra, forward with all steps kept, then relevance."""

    def __init__(self, block, x, angles, seen, cp):
        self.p, self.x, self.cp = block, x, cp
        heads = self.heads = block.attention.heads
        self.normed = self.norm(block.input_norm, x)
        parts = (block.attention.q_proj, block.attention.k_proj, block.attention.v_proj)
        self.flat = [self.normed @ m.weight.T for m in parts]
        q, k, self.v = (self.split(f) for f in self.flat)
        half = angles.shape[1]
        turn = torch.zeros(len(x), 2 * half, 2 * half, dtype=x.dtype)  # rotary embedding, a matrix
        at = torch.arange(half)
        turn[:, at, at] = turn[:, at + half, at + half] = angles.cos()
        turn[:, at, at + half], turn[:, at + half, at] = -angles.sin(), angles.sin()
        self.turn = turn
        self.pre = q, k
        self.q, self.k = (torch.einsum("lij,hlj->hli", turn, t) for t in (q, k))
        self.scores = self.q @ self.k.mT / (x.shape[1] // heads) ** 0.5
        self.a = self.scores.masked_fill(~seen, -torch.inf).softmax(-1)
        self.mixed = (self.a @ self.v).transpose(0, 1).flatten(1)
        self.attended = self.mixed @ block.attention.o_proj.weight.T
        self.middle = x + self.attended
        self.normed2 = self.norm(block.mlp_norm, self.middle)
        self.gate, self.up = (self.normed2 @ m.weight.T for m in (block.gate_proj, block.up_proj))
        self.act = self.gate / (1 + (-self.gate).exp())
        self.fed = (self.act * self.up) @ block.down_proj.weight.T
        self.out = self.middle + self.fed

    def split(self, x):
        return x.unflatten(1, (self.heads, -1)).transpose(0, 1)

    @staticmethod
    def norm(norm, x):
        return x / (x.square().mean(-1, keepdim=True) + norm.eps).sqrt() * norm.weight

    def relevance(self, relevance):
        block = self.p
        middle, fed = add(self.middle, self.fed, relevance)
        gated = linear(self.act * self.up, block.down_proj.weight, fed)
        of_up = linear(self.normed2, block.up_proj.weight, gated * (1 + self.cp) / 2)
        of_gate = linear(self.normed2, block.gate_proj.weight, gated * (1 - self.cp) / 2)
        middle = middle + of_up + of_gate  # the norm hands on what it gets
        x, attended = add(self.x, self.attended, middle)
        mixed = linear(self.mixed, block.attention.o_proj.weight, attended)
        of_a, of_v = product(self.a, self.v, self.split(mixed), self.cp)
        scores = self.scores * (of_a - self.a * of_a.sum(-1, keepdim=True))
        of_q, of_k = product(self.q, self.k.mT, scores, 0)
        out = x
        of_pre = [
            pre * torch.einsum("lij,hli->hlj", self.turn, part / turned)
            for pre, part, turned in ((self.pre[0], of_q, self.q), (self.pre[1], of_k.mT, self.k))
        ]
        for flat, part, m in zip(
            self.flat,
            (*of_pre, of_v),
            (block.attention.q_proj, block.attention.k_proj, block.attention.v_proj),
            strict=True,
        ):
            assert flat.shape == part.transpose(0, 1).flatten(1).shape
            out = out + linear(self.normed, m.weight, part.transpose(0, 1).flatten(1))
        return out


@torch.no_grad()
def by_hand(task, position, token, cp, tapped=1):
    """Relevance (L,) at the tapped block's output, two blocks below the head."""
    forward = task.forward
    model, request = forward.model, forward.request
    canvas = task.arguments(position)[-1]
    ids = torch.cat((request.extras[0], canvas), 1)
    prefix, length = request.layout.prefix_length, ids.shape[1]
    whole = forward.trajectory.cache == "none"
    seen = torch.ones(length, length).bool()
    if not whole:
        seen[:prefix, prefix:] = False
    segments = (length,) if whole else (prefix, length - prefix)
    with outputs_of({tapped: model.layers[tapped]}) as found:
        logits = model(ids, request.pixels, segments=segments).logits[0]
    half = 48 // 3 // 2
    speeds = model.config.rope_theta ** -(torch.arange(half, dtype=DOUBLE) / half)
    angles = torch.arange(length, dtype=DOUBLE)[:, None] * speeds
    x, blocks = found[tapped][0][0], []
    for layer in model.layers[tapped + 1 :]:
        blocks.append(Block(layer, x, angles, seen, cp))
        x = blocks[-1].out
    normed = Block.norm(model.norm, x)
    row = prefix + position
    assert torch.allclose(normed[row] @ model.embed_tokens.weight[token], logits[row, token])
    relevance = torch.zeros_like(x)
    relevance[row] = normed[row] * model.embed_tokens.weight[token]
    for block in reversed(blocks):
        relevance = block.relevance(relevance)
    return relevance.sum(-1)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("written", (False, True))
def test_relevance_of_two_blocks_by_hand(cache, name, written):
    task = made.task_of(cache, dtype=DOUBLE)
    eager(task, written)
    forward = task.forward
    word = Target("two tokens", (1, 6), (11, 23))
    task = AttributionTask(forward, (*task.targets, word))
    found = method(name).attribute(task)
    spots = image_positions(forward), text_tokens(forward).positions
    for n, target in enumerate(task.targets):
        pairs = zip(target.positions, target.token_ids, strict=True)
        row = sum(by_hand(task, p, t, int(name == "cp_lrp")) for p, t in pairs)
        assert tiny.relative(found.maps[0][n].flatten(), row[spots[0]]) < 1e-5
        assert tiny.relative(found.text[n], row[spots[1]]) < 1e-5
    assert bool((found.maps[0] < 0).any()) and bool((found.maps[0] > 0).any())


# -- another family, and the authors' library ------------------------------------------------------


def llama(attention):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config = transformers.LlamaConfig(
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=3,
            num_attention_heads=4,
            num_key_value_heads=2,
            vocab_size=50,
        )
        model = transformers.LlamaForCausalLM(config).to(DOUBLE).eval().requires_grad_(False)
    model.set_attn_implementation(attention)
    return model


def llama_relevance(model, x, rules=None):
    x = x.clone().requires_grad_()
    if rules is None:
        score = model(inputs_embeds=x).logits[0, -1, 7]
    else:
        with inside_blocks(model.model.layers, rules()):
            score = model(inputs_embeds=x).logits[0, -1, 7]
    (gradient,) = torch.autograd.grad(score, x)
    return float(score.detach()), (x * gradient).sum(-1)[0].detach()


@pytest.mark.parametrize("attention", ("sdpa", "eager"))
def test_cp_lrp_of_a_hugging_face_model_adds_up(attention):
    score, relevance = llama_relevance(llama(attention), rand(1, 6, 32), CPRules)
    assert abs(float(relevance.sum()) - score) < 1e-7  # Llama computes its norms in float32


@pytest.fixture
def patches(monkeypatch):
    """The authors' rules; their package's first lines import what transformers 5 no longer has."""
    lxt = pytest.importorskip("lxt")
    package = types.ModuleType("lxt.efficient")
    package.__path__ = [str(Path(lxt.__file__).parent / "efficient")]
    monkeypatch.setitem(sys.modules, "lxt.efficient", package)
    return importlib.import_module("lxt.efficient.patches")


@pytest.mark.parametrize("attention", ("sdpa", "eager"))
@pytest.mark.parametrize("name", NAMES)
def test_against_the_authors_library(name, attention, patches, monkeypatch):
    from transformers.models.llama import modeling_llama

    cp, x = name == "cp_lrp", rand(1, 6, 32)
    ours = llama_relevance(llama(attention), x, RULES[name])[1]
    wrap = patches.cp_wrap_attention_forward if cp else patches.wrap_attention_forward
    mlp = patches.cp_gated_mlp_forward if cp else patches.gated_mlp_forward
    monkeypatch.setattr(modeling_llama.LlamaMLP, "forward", mlp)
    monkeypatch.setattr(modeling_llama.LlamaRMSNorm, "forward", patches.rms_norm_forward)
    monkeypatch.setattr(
        modeling_llama, "eager_attention_forward", wrap(modeling_llama.eager_attention_forward)
    )
    theirs = llama_relevance(llama("eager"), x)[1]
    assert tiny.relative(ours, theirs) < 1e-5


# -- contract --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_the_block_is_the_tapped_one_unless_named(cache, name):
    task = made.task_of(cache, layer=2)
    default = method(name).attribute(task).maps[0]
    assert torch.equal(default, method(name, block=2).attribute(task).maps[0])
    assert not torch.equal(default, method(name, block=0).attribute(task).maps[0])
    with pytest.raises(LayerError, match="block 3 has no path"):
        method(name, block=3).check(task)


def test_half_precision_is_near_the_whole(cache):
    maps = []
    for dtype in (torch.float32, torch.bfloat16):
        task = made.task_of(cache, dtype=dtype, positions=())
        task = AttributionTask(task.forward, (Target("word", (0,), (5,)),), "commit")
        state = task.forward.trajectory.states[0].clone()
        state[:] = task.forward.adapter.model.config.mask_token_id
        task.forward.bind(
            task.forward.request,
            replace(task.forward.trajectory, states=(state,), kept={}),
        )
        maps.append(method("cp_lrp").attribute(task).maps[0])
    assert tiny.relative(maps[1], maps[0]) < 0.2


def test_states_that_tokens_share_are_run_once():
    forward = tiny.bound("prefix")
    task = AttributionTask(forward, made.targets(forward, range(8)), "teacher")
    with metered(forward) as cost:
        method("attn_lrp").attribute(task)
    assert (cost.forwards, cost.backwards) == (1, 8)


def test_a_budget_leaves_the_words_before():
    task = made.task_of("none", (0, 3, 5), block_length=8)
    with metered(task.forward, Budget(passes=2)):
        found = method("cp_lrp").attribute(task)
    assert found.done.tolist() == [True, True, False] and "budget of 2" in found.note


@pytest.mark.parametrize("name", NAMES)
def test_a_fused_kernel_is_named(cache, name, monkeypatch):
    def kernel(q, k, v, mask, _eager):
        scores = (q @ k.mT - (q @ k.mT).amax(-1, keepdim=True)).exp()
        return scores @ v / scores.sum(-1, keepdim=True)

    task = made.task_of(cache)
    monkeypatch.setattr(modeling, "attend", kernel)
    for work in (method(name).check, method(name).attribute):
        with pytest.raises(MethodError, match=r"block 2 \(MiniBlock\) showed no attention.*sdpa"):
            work(task)
    assert not tiny.hooks(task.forward)
