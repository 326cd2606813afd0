"""LaViDa on a stand-in that decodes by itself: recording, replay, gradients, feasible calls."""

import contextlib
import dataclasses
import functools

import pytest
import tiny
import torch
from doubles import lavida as double
from doubles import lavida_bound as made

import captum_dcam
from captum_dcam.adapters.common.llada import Llada
from captum_dcam.errors import InfeasibleStepError, LayerError, TargetError
from captum_dcam.methods import AttributionTask, method
from captum_dcam.model import gradients as vjp
from captum_dcam.model.forward import DenoisingForward
from captum_dcam.model.words import Target

pytestmark = pytest.mark.filterwarnings(
    "ignore:None of the inputs have requires_grad", "ignore:Converting a tensor with requires_grad"
)
variants = pytest.mark.parametrize("variant", made.VARIANTS)


@pytest.mark.parametrize(("variant", "settings", "own"), made.GREEDY)
def test_the_models_own_generate_is_recorded_and_replayed_bit_for_bit(
    cache, variant, settings, own
):
    forward = made.bound(variant, cache, **settings)
    own = dict(own)
    length = own.pop("max_new_tokens")
    canvases, seen = made.own(forward.adapter, forward.request, length, **own)
    check_record(forward, canvases)
    for step, expected in enumerate(made.expected_logits(forward.adapter, length, seen)):
        with torch.no_grad():
            got = forward.replay(torch.tensor([0]), torch.tensor([step]))[0]
            state = forward.trajectory.state_at(torch.tensor([0]), torch.tensor([step]))
            plain = forward(forward.request.pixels, *forward.request.extras, *state)[0]
        assert torch.equal(got, expected) and torch.equal(plain, expected)


def check_record(forward, canvases):
    """States, commits and confidences say what the canvases say."""
    t = forward.trajectory
    assert t.steps == len(canvases) - 1
    assert torch.equal(t.states[0][:, 0], torch.stack(canvases[:-1]))
    assert torch.equal(t.tokens[0], canvases[-1])
    for position in range(t.tokens.shape[1]):
        masked = [s for s in range(t.steps) if canvases[s][position] == double.MASK]
        assert t.commit_step[0, position] == max(masked, default=0)
    with torch.no_grad():
        logits = forward.replay(torch.zeros(t.steps, dtype=torch.long), torch.arange(t.steps))
    for p, step in enumerate(t.commit_step[0].tolist()):
        sure = logits[step, p].double().softmax(-1)[t.tokens[0, p]]
        if t.tokens[0, p] == double.MASK:  # the model chose the mask itself: nothing was committed
            sure = 0.0
        assert t.confidence[0, p] == pytest.approx(float(sure), rel=1e-4)


@pytest.mark.parametrize(("variant", "settings", "own"), made.SAMPLED)
def test_sampling_is_the_models_own_and_the_generators(cache, variant, settings, own):
    g = lambda seed: torch.Generator().manual_seed(seed)  # noqa: E731
    forward = made.bound(variant, cache, generator=g(3), **settings)
    before = torch.random.get_rng_state()
    with made.as_drawn(g(3)):
        canvases, _ = made.own(forward.adapter, forward.request, 8, **own)
    check_record(forward, canvases)
    again = made.bound(variant, cache, generator=g(3), **settings).trajectory
    assert torch.equal(again.states[0], forward.trajectory.states[0])
    other = made.bound(variant, cache, generator=g(4), **settings).trajectory
    assert not torch.equal(again.commit_step, other.commit_step) or not torch.equal(
        again.tokens, other.tokens
    )
    assert torch.equal(before, torch.random.get_rng_state())


@variants
@pytest.mark.parametrize("keep", (True, False))
def test_batched_replay_agrees_within_rounding(cache, variant, keep):
    forward = made.bound(variant, cache, keep=keep)
    steps = torch.tensor([5, 0, 8, 3])
    with torch.no_grad():
        got = forward.replay(torch.zeros(4, dtype=torch.long), steps)
        for row, step in zip(got, steps, strict=True):
            one = forward.replay(torch.tensor([0]), step[None])[0]
            assert tiny.relative(row, one) < 1e-5


def test_dreams_first_token_is_the_prefills():
    """It is committed before the first step: its logits are the prefill's at every step."""
    forward = made.bound("dream", "prefix")
    _, seen = made.own(forward.adapter, forward.request, 8)
    t = forward.trajectory
    assert t.commit_step[0, 0] == 0 and t.states[0][0, 0, 0] == t.tokens[0, 0] != double.MASK
    assert t.tokens[0, 0] == seen[0][-1].argmax()
    sure = seen[0][-1].double().softmax(-1).max()
    assert float(t.confidence[0, 0]) == pytest.approx(float(sure), rel=1e-6)
    with torch.no_grad():
        rows = forward.replay(torch.zeros(8, dtype=torch.long), torch.arange(8))[:, 0]
    assert all(torch.equal(r, seen[0][-1]) for r in rows)


# -- gradients -------------------------------------------------------------------------------------


def slope(forward, step, position, token, directions, size):
    """Central difference of a logit along a direction in the tapped states."""

    def shifted(sign):
        edit = lambda m, i: m + sign * size * directions[i]  # noqa: E731
        with torch.no_grad(), forward.edited(edit):
            return forward.replay(torch.tensor([0]), torch.tensor([step]))[0, position, token]

    return (shifted(1) - shifted(-1)) / (2 * size)


@functools.cache
def exactly_bound(variant, cache, layer):
    """In float64, made once: read, and change nothing."""
    return made.bound(variant, cache, layer=layer, dtype=torch.float64)


@variants
@pytest.mark.parametrize("layer", (0, 1, 2))
@pytest.mark.parametrize("position", (0, 5))
def test_gradients_are_finite_differences(cache, variant, layer, position):
    forward = exactly_bound(variant, cache, layer).again()
    t = forward.trajectory
    token = int(t.tokens[0, position])
    (row,) = vjp.target_gradients(forward, [Target("", (position,), (token,))])
    assert all(g.abs().max() > 1e-8 for g in row.gradients)
    g = torch.Generator().manual_seed(0)
    directions = [torch.randn(m.shape, generator=g, dtype=torch.float64) for m in row.gradients]
    step = t.step_of(0, position, "commit")
    found = slope(forward, step, position, token, directions, 1e-5)
    expected = sum((a * b).sum() for a, b in zip(row.gradients, directions, strict=True))
    assert float(found) == pytest.approx(float(expected), rel=1e-6)


@variants
def test_many_words_share_one_prefill(cache, variant):
    forward = exactly_bound(variant, cache, 1).again()
    tokens = forward.trajectory.tokens[0].tolist()
    written = [p for p in range(8) if tokens[p] != forward.adapter.mask_id]
    assert len(written) >= 7, "Dream's loop may leave a mask"
    targets = [Target("", (p,), (tokens[p],)) for p in written]
    targets.append(Target("", tuple(written), tuple(tokens[p] for p in written)))
    rows = vjp.target_gradients(forward, targets)
    singles = [vjp.target_gradients(forward, [t]) for t in targets[:-1]]
    for row, (single,) in zip(rows[: len(written)], singles, strict=True):
        for a, b in zip(row.gradients, single.gradients, strict=True):
            assert tiny.relative(a, b) < 1e-9
    if cache == "prefix":
        for i, whole in enumerate(rows[-1].gradients):
            assert tiny.relative(whole, sum(r.gradients[i] for r in rows[:-1])) < 1e-9


@variants
def test_captums_gradient_is_ours(cache, variant):
    from captum.attr import LayerGradCam

    forward = exactly_bound(variant, cache, 1).again()
    target = (3, int(forward.trajectory.tokens[0, 3]))
    theirs = LayerGradCam(forward, forward.tap).attribute(
        forward.request.pixels,
        target,
        additional_forward_args=forward.arguments(target, "final"),
        relu_attributions=True,
    )
    ours = captum_dcam.DiffusionCAM(forward, preset="base").attribute(
        forward.request.pixels, target
    )
    for one, two in zip(ours, theirs, strict=True):
        assert one.any() and tiny.relative(one, two.detach()) < 1e-6


@variants
def test_the_last_block_is_refused(variant):
    with pytest.raises(LayerError, match=r"block 3 has no path .* deepest usable block .* is 2"):
        DenoisingForward(made.adapter(variant), 3)


def test_checkpointing_would_cut_the_gradient_and_is_put_back(cache, monkeypatch):
    """LLaDA's constructor leaves it on: hooks then see states outside of the graph."""
    forward = made.bound("llada", cache)
    inner = forward.model.model
    assert inner.activation_checkpointing_strategy == "whole_layer"
    with monkeypatch.context() as patch:
        patch.setattr(Llada, "as_written", lambda self: contextlib.nullcontext())
        with pytest.raises((InfeasibleStepError, RuntimeError)):
            vjp.target_gradients(forward, [Target("", (1,), (5,))])
    vjp.target_gradients(forward, [Target("", (1,), (5,))])
    assert inner.activation_checkpointing_strategy == "whole_layer"
    inner.set_activation_checkpointing(None)
    vjp.target_gradients(forward, [Target("", (1,), (5,))])
    assert inner.activation_checkpointing_strategy is None


def test_positions_cached_in_inference_mode_can_be_used(monkeypatch):
    forward = made.bound("llada", "none")
    block = forward.model.model.transformer.blocks[0]
    block.rotary_emb = torch.nn.Identity()
    with torch.inference_mode():
        table = {"rope_pos_sin": torch.ones(3)}
    vars(block.rotary_emb)["_RotaryEmbedding__cache"] = table
    vjp.target_gradients(forward, [Target("", (1,), (5,))])
    assert not table["rope_pos_sin"].is_inference() and table["rope_pos_sin"].sum() == 3


# -- feasible calls --------------------------------------------------------------------------------


@variants
@pytest.mark.parametrize(("length", "steps"), ((8, 8), (8, 4), (150, 3)))
def test_feasible_calls_are_those_of_table_4(cache, variant, length, steps):
    """Also when the response alone is longer than the image span."""
    forward = made.bound(variant, cache, gen_length=length, steps=steps)
    t, prefix = forward.trajectory, forward.request.layout.prefix_length
    if cache == "none":
        assert t.lengths == (prefix + length,) * steps
        assert t.feasible == tuple(range(steps)) and t.valid_ratio == 1
        return
    assert t.lengths == (prefix, *[length] * steps)
    assert t.feasible == (0,) and t.valid_ratio == 1 / (steps + 1)
    for step in range(1, steps + 1):
        with pytest.raises(InfeasibleStepError, match=f"has {length} tokens from position"):
            t.check_call(step)


@variants
def test_table_4_of_the_paper(variant):
    """Prefix 579 tokens, image up to 551, steps of 64 tokens: PASS, then FAIL at every step."""
    words = "the dog on a mat " * 40
    changes = {"tile": 384, "layers": 2}
    made_up = made.adapter(variant, "prefix", **changes)
    ids = made_up.tokenizer.encode
    picture = tiny.picture(1, (768, 340))
    span = 196 + 12 * 29  # base view, 12 rows of 28 tokens and a newline
    front = 551 - span
    turn = [{"type": "text", "text": "w50 " * (front - len(ids("<|bos|><|head|>user\n")))}]
    bare = len(ids("<|bos|>" + "<|head|>user\n<|eot|>" + "<|head|>assistant\n"))
    rest = 579 - span - bare - len(ids(turn[0]["text"]))
    turn += [{"type": "image"}, {"type": "text", "text": " ".join(words.split()[:rest])}]
    forward = DenoisingForward(made_up, 0)
    request = made_up.prepare([[picture]], [[{"role": "user", "content": turn}]])
    # the last newline token, behind the last image token, ends the span
    assert request.layout.prefix_length == 579 and request.layout.image_end + 1 == 551
    t = forward.generate(request, gen_length=64, steps=2)
    passed = ["PASS" if c.valid else "FAIL" for c in t.calls]
    assert [c.length for c in t.calls] == [579, 64, 64] and passed == ["PASS", "FAIL", "FAIL"]


# -- the rest --------------------------------------------------------------------------------------


@variants
def test_one_token_and_no_prompt(cache, variant):
    forward = made.bound(variant, cache, prompt="", gen_length=1)
    assert forward.trajectory.tokens.shape == (1, 1)
    found = captum_dcam.explain_generation(forward, [0], preset="base")
    assert all(torch.isfinite(m).all() for m in found.maps)


@variants
def test_explain_in_one_call(cache, variant):
    made_up = made.adapter(variant, cache)
    found = captum_dcam.explain(
        made_up, tiny.picture(1, (160, 120)), made.PROMPT, [1, 2], gen_length=8, preset="paper"
    )
    assert [m.shape for m in found.maps] == [(2, 4, 4), (2, 6, 8)]
    assert found.settings["family"] == "lavida" and found.settings["layer"] == 1


@variants
@pytest.mark.parametrize("name", ("attention", "attn_lrp", "logit_lens", "tam", "occlusion"))
def test_methods_that_read_more_than_the_tap(variant, name):
    forward = made.bound(variant, "prefix", gen_length=3)
    token = int(forward.trajectory.tokens[0, 1])
    task = AttributionTask(
        forward,
        (Target("", (1,), (token,)),),
        score="commit",
        generator=torch.Generator().manual_seed(0),
    )
    maps = method(name).attribute(task).maps
    assert [m.shape for m in maps] == [(1, 4, 4), (1, 6, 8)]
    assert all(torch.isfinite(m).all() for m in maps) and any(m.any() for m in maps)


@variants
def test_a_given_answer(cache, variant):
    from captum_dcam.model.answers import force

    forward = made.bound(variant, cache)
    t = force(forward, " the dog")
    ids = forward.adapter.encode(" the dog")
    assert t.tokens.tolist() == [ids] and forward.adapter.token_texts(ids) == [" the", " dog"]
    assert captum_dcam.explain_generation(forward, "dog", preset="base").maps[0].any()
    with pytest.raises(TargetError):
        force(forward, "")


@variants
def test_nothing_is_left_behind(cache, variant):
    made_up = made.adapter(variant, cache)
    model = made_up.model.train()
    before = tiny.hooks(model), {n: p.requires_grad for n, p in model.named_parameters()}
    held = lambda: [sorted(vars(part)) for part in (model, model.model, model.config)]  # noqa: E731
    attributes = held()
    captum_dcam.explain(made_up, tiny.picture(), made.PROMPT, [0], gen_length=4)
    with pytest.raises(ZeroDivisionError):
        broken(made_up)
    assert before == (
        tiny.hooks(model),
        {n: p.requires_grad for n, p in model.named_parameters()},
    )
    assert all(p.grad is None for p in model.parameters())
    assert all(m.training for m in model.modules())
    assert attributes == held()
    if variant == "llada":
        assert model.model.activation_checkpointing_strategy == "whole_layer"


def broken(made_up):
    def fail(*_args):
        raise ZeroDivisionError

    handle = made_up.blocks[2].register_forward_hook(fail)
    try:
        made_up.generate(made_up.prepare([[tiny.picture()]], ["a"]), generator=None, gen_length=4)
    finally:
        handle.remove()


@pytest.mark.parametrize(
    ("variant", "settings", "message"),
    (
        ("llada", {"gen_length": 0}, "at least one token"),
        ("llada", {"gen_length": 4, "max_new_tokens": 4}, "two names of one setting"),
        ("llada", {"block_length": 3}, "gen_length 8 is not a multiple of block_length 3"),
        ("llada", {"steps": 3, "block_length": 4}, "multiple of the 2 blocks"),
        ("llada", {"steps": 9}, "at most one step per token"),
        ("llada", {"steps": 4, "step_ratio": 0.5}, "give one of them"),
        ("llada", {"step_ratio": 1.5}, "0 < step_ratio <= 1"),
        ("llada", {"step_ratio": 0.1}, "is no step: give at least 0.125"),
        ("llada", {"remasking": "best"}, "expected one of"),
        ("llada", {"schedule": "slow"}, "expected one of"),
        ("llada", {"shift": 0.33}, "schedule='shift'"),
        ("llada", {"temperature": 1.0}, "needs a generator"),
        ("llada", {"remasking": "random"}, "needs a generator"),
        ("dream", {"alg": "origin"}, "needs a generator"),
        ("dream", {"alg": "best"}, "expected one of"),
        ("dream", {"schedule": "shift"}, "8 steps with schedule 'shift'.* the 7 tokens"),
    ),
)
def test_settings_that_cannot_work(variant, settings, message):
    with pytest.raises(ValueError, match=message):
        made.bound(variant, "prefix", **settings)


@pytest.mark.parametrize(
    ("variant", "name", "message"),
    (
        ("llada", "alg", "counterpart here is remasking"),
        ("dream", "remasking", "counterpart here is alg"),
        ("llada", "cfg_scale", "Known: gen_length, block_length"),
    ),
)
def test_settings_of_the_other_model_are_named(variant, name, message):
    with pytest.raises(TypeError, match=message):
        made.bound(variant, "prefix", **{name: "entropy"})


def test_the_trap_that_the_check_keeps_from(cache):
    """Dream's own decoder fails in the middle of its work, or (full) not at all."""
    forward = made.bound("dream", cache)
    run = functools.partial(made.own, forward.adapter, forward.request, 8, schedule="shift")
    if cache == "none":
        run(steps=8)
        made.bound("dream", cache, schedule="shift")
        return
    with pytest.raises(IndexError):
        run(steps=8)


@variants
def test_a_saved_trajectory_replays_at_another_block(cache, variant):
    forward = made.bound(variant, cache)
    other = DenoisingForward(forward.adapter, 2)
    other.bind(forward.request, dataclasses.replace(forward.trajectory, kept={}))
    at = torch.tensor([0]), torch.tensor([2])
    with torch.no_grad():
        assert torch.equal(other.replay(*at), forward.replay(*at))
