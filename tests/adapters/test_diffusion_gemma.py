"""DiffusionGemma: generation, replay, gradients, canvases, feasibility, nothing left behind."""

import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers.models.diffusion_gemma")
sys.path.insert(0, str(Path(__file__).parent))  # importlib mode does not

import made_diffusion_gemma as made_dg
import tiny

from captum_dcam.errors import InfeasibleStepError, LayerError
from captum_dcam.explaining import explain_generation, explain_steps
from captum_dcam.model import gradients as vjp
from captum_dcam.model.answers import force
from captum_dcam.model.forward import DenoisingForward
from captum_dcam.model.words import Target
from captum_dcam.results.explanation import Explanation

C = made_dg.CANVAS
CASES = ({}, {"canvases": 3, "seed": 2}, {"canvases": 2, "text": {"sliding_window": 4096}})


def spied(monkeypatch, make):
    """What ``make`` returns, and of every step of the family's ``generate`` ids and logits."""
    from transformers import DiffusionGemmaForBlockDiffusion as Model

    seen = []
    original = Model.forward

    def spy(self, *args, **kwargs):
        out = original(self, *args, **kwargs)
        seen.append((kwargs["decoder_input_ids"].clone(), out.logits.clone()))
        return out

    monkeypatch.setattr(Model, "forward", spy)
    made = make()
    monkeypatch.setattr(Model, "forward", original)
    return made, seen


def one(forward, step):
    with torch.no_grad():
        return forward.replay(torch.tensor([0]), torch.tensor([step]))


# -- generation and replay -------------------------------------------------------------------------


@pytest.mark.parametrize("settings", CASES)
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
def test_replay_has_the_bits_of_the_generation(monkeypatch, settings, dtype):
    forward, seen = spied(monkeypatch, lambda: made_dg.bound(dtype=dtype, steps=2, **settings))
    t = forward.trajectory
    assert len(seen) == t.steps == 2 * settings.get("canvases", 1)
    for step, (ids, expected) in enumerate(seen):
        number = step // 2
        own = slice(number * C, (number + 1) * C)
        state = t.state_at(torch.tensor([0]), torch.tensor([step]))
        assert torch.equal(state[0][:, own], ids) and state[1].tolist() == [number]
        assert torch.equal(state[0][:, : own.start], t.tokens[:, : own.start])
        got = one(forward, step)
        assert got.shape == (1, t.tokens.shape[1], forward.adapter.vocabulary)
        assert torch.equal(got[:, own], expected)
        assert not got[:, : own.start].any() and not got[:, own.stop :].any()
        with torch.no_grad():
            plain = forward(forward.request.pixels, *forward.request.extras, *state)
        assert torch.equal(plain, got)


def test_states_of_several_canvases_run_in_one_batch():
    forward = made_dg.shared(canvases=3)
    steps = torch.tensor([14, 0, 7, 3, 15, 9])  # 15: the visible answer
    with torch.no_grad():
        several = forward.replay(torch.zeros(6, dtype=torch.long), steps)
    for row, step in zip(several, steps.tolist(), strict=True):
        assert tiny.relative(row, one(forward, step)[0]) < 1e-5


def test_tokens_are_those_of_generate_with_the_same_seed():
    forward = made_dg.bound(canvases=2, seed=3)
    model, request = forward.adapter.model, forward.request
    g = torch.Generator().manual_seed(3)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(int(torch.randint(2**31, (), generator=g)))
        out = model.generate(
            input_ids=request.extras[0],
            pixel_values=request.pixels[0],
            image_position_ids=request.extras[2][0],
            mm_token_type_ids=(request.extras[0] == model.config.image_token_id).long(),
            max_new_tokens=2 * C,
            max_denoising_steps=5,
        )
    assert torch.equal(out.sequences[:, -2 * C :], forward.trajectory.tokens)
    again = forward.generate(request, gen_length=2 * C, steps=5, seed=3)
    with_generator = forward.generate(
        request, gen_length=2 * C, steps=5, generator=torch.Generator().manual_seed(3)
    )
    assert torch.equal(again.tokens, with_generator.tokens)
    assert torch.equal(again.states[2], with_generator.states[2])
    assert torch.equal(again.tokens, out.sequences[:, -2 * C :])


def test_self_conditioning_is_what_the_step_before_expected(monkeypatch):
    forward, seen = spied(monkeypatch, lambda: made_dg.bound(canvases=2, t_min=0.3, t_max=1.1))
    words = forward.adapter.model.lm_head.weight
    for step, signal in enumerate(forward.trajectory.states[2]):
        at = step % 5
        if at == 0:
            assert not signal.any()
            continue
        heat = 0.3 + 0.8 * (5 - (at - 1)) / 5
        expected = (seen[step - 1][1] / heat).softmax(-1) @ words * 32**0.5
        assert tiny.relative(signal, expected.detach()) < 1e-5


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
def test_self_conditioning_is_rebuilt_from_ids_alone(dtype):
    forward = made_dg.bound(canvases=2, dtype=dtype, t_max=0.9)
    t, adapter = forward.trajectory, forward.adapter
    canvases = [t.states[0][5 * n : 5 * n + 5, :, C * n : C * n + C] for n in range(2)]
    states = adapter.rebuilt_states(forward.request, canvases, t.tokens, steps=5, t_max=0.9)
    for found, expected in zip(states, t.states, strict=True):
        assert torch.equal(found, expected)


@pytest.mark.parametrize("seed", range(3))
def test_a_token_commits_where_its_argmax_becomes_final(monkeypatch, seed):
    forward, seen = spied(
        monkeypatch, lambda: made_dg.bound(canvases=2, steps=8, seed=seed, entropy_bound=2.0)
    )
    t = forward.trajectory
    for position in range(2 * C):
        number = position // C
        drafts = [int(logits[0, position % C].argmax()) for _, logits in seen[8 * number :][:8]]
        step = next(s for s in range(8) if set(drafts[s:]) == {drafts[-1]})
        assert int(t.commit_step[0, position]) == 8 * number + step
        odds = seen[8 * number + step][1][0, position % C].double().softmax(-1)[drafts[-1]]
        assert float(t.confidence[0, position]) == pytest.approx(float(odds), rel=1e-4)


def test_acceptance_is_not_sticky():
    """Somewhere a canvas held the final token and lost it again: commits cannot be read there."""
    forward = made_dg.shared()

    def dropped(seed):
        t = forward.generate(forward.request, gen_length=C, steps=12, seed=seed)
        right = t.states[0][:, 0] == t.tokens[0]
        return bool((right[:-1] & ~right[1:]).any())

    assert any(dropped(seed) for seed in range(20))


@pytest.mark.parametrize("score", ("commit", "final", "teacher"))
def test_the_scores_read_the_states_they_name(score):
    t = made_dg.shared(canvases=2).trajectory
    for p in range(2 * C):
        step = t.step_of(0, p, score)
        if score == "teacher":
            assert step == t.steps
        else:
            assert step // 5 == p // C
            assert score == "commit" or step % 5 == 4
    ids, number, signal = (f for f in t.final_state)
    assert torch.equal(ids, t.tokens) and number.tolist() == [-1] and not signal.any()


def test_the_visible_state_shows_every_canvas():
    """Canvas n with its tokens visible, the canvases before it encoded: the family's own calls."""
    forward = made_dg.shared(canvases=2)
    model, request, t = forward.adapter.model, forward.request, forward.trajectory
    got = one(forward, t.steps)
    for number in range(2):
        before, canvas = t.tokens[:, : number * C], t.tokens[:, number * C : number * C + C]
        ids = torch.cat((request.extras[0], before), 1)
        types = (ids == model.config.image_token_id).long()
        masks = model.model.encoder.create_masks_for_generate(
            model.config, torch.empty(1, ids.shape[1], 0), None, None, None, types
        )
        with torch.no_grad():
            expected = model(
                input_ids=ids,
                attention_mask=masks,
                pixel_values=request.pixels[0],
                image_position_ids=request.extras[2][0],
                decoder_input_ids=canvas,
            ).logits
        assert tiny.relative(got[:, number * C : number * C + C], expected) < 1e-4


def test_an_answer_that_ends_is_padded_behind_its_end():
    forward = made_dg.bound(canvases=3)
    made, free = forward.adapter, forward.trajectory.tokens[0].tolist()
    made.model.generation_config.eos_token_id = free[2]
    t = forward.generate(forward.request, gen_length=3 * C, steps=5, seed=0)
    assert t.tokens[0].tolist() == [*free[:3], *[0] * (C - 3)]  # one canvas of three
    assert made.stop_ids >= {free[2], 0}
    assert t.steps == 5


def test_adaptive_stopping_is_the_familys():
    t = made_dg.bound(steps=9, stability_threshold=0, confidence_threshold=1e9).trajectory
    assert t.steps == 1 and t.commit_step.tolist() == [[0] * C]


@pytest.mark.parametrize(("asked", "written"), ((1, C), (C, C), (C + 1, 2 * C)))
def test_answers_are_whole_canvases(asked, written):
    made = made_dg.shared().adapter
    request = made.prepare([[made_dg.picture()]], [made_dg.PROMPT])
    t = made.generate(request, max_new_tokens=asked, max_denoising_steps=2, seed=0)
    assert t.tokens.shape == (1, written)


@pytest.mark.parametrize(
    ("settings", "message"),
    (
        ({}, "no greedy mode"),
        ({"seed": 0, "generator": torch.Generator()}, "one of them"),
        ({"seed": 0, "do_sample": False}, "would ignore them"),
        ({"seed": 0, "use_cache": False}, "would ignore them"),
        ({"seed": 0, "temperature": 0.0}, "t_max to t_min"),
        ({"seed": 0, "block_length": 3}, f"canvas has {C} tokens"),
        ({"seed": 0, "gen_length": 4, "max_new_tokens": 4}, "mean the same"),
        ({"seed": 0, "gen_length": 0}, "at least 1"),
        ({"seed": 0, "steps": 0}, "at least 1"),
        ({"seed": 0, "t_min": 2.0}, "t_max"),
        ({"seed": 0, "gen_length": 600}, "context is 512"),
    ),
)
def test_settings_that_cannot_work(settings, message):
    made = made_dg.shared().adapter
    request = made.prepare([[made_dg.picture()]], [made_dg.PROMPT])
    with pytest.raises(ValueError, match=message):
        made.generate(request, **settings)


# -- gradients -------------------------------------------------------------------------------------


def exact(monkeypatch):
    """Norms in the type of their input: the family's compute in float32 whatever they get."""
    from transformers.models.diffusion_gemma import modeling_diffusion_gemma as family

    def forward(self, x):
        scale = (x.square().mean(-1, keepdim=True) + self.eps).rsqrt()
        return x * scale * (self.weight if self.with_scale else 1)

    monkeypatch.setattr(family.DiffusionGemmaRMSNorm, "forward", forward)
    softmax = torch.nn.functional.softmax
    monkeypatch.setattr(
        family.nn.functional, "softmax", lambda x, dim, dtype=None: softmax(x, dim=dim)
    )


@pytest.mark.parametrize("canvases", (1, 2))
def test_gradients_equal_finite_differences(monkeypatch, canvases):
    exact(monkeypatch)
    forward = made_dg.bound(dtype=torch.float64, canvases=canvases, steps=3)
    for layer in range(made_dg.LAYERS - 1):
        tapped = DenoisingForward(forward.adapter, layer)
        tapped.bind(forward.request, forward.trajectory)
        for position in (2, canvases * C - 1):
            (row,) = vjp.target_gradients(tapped, [Target("x", (position,), (9,))])
            found = row.gradients[0]
            assert bool(found.any())
            step = torch.tensor([forward.trajectory.step_of(0, position, "commit")])
            g = torch.Generator().manual_seed(layer)
            direction = torch.randn(found.shape, dtype=torch.float64, generator=g)
            values = []
            for sign in (1, -1):
                moved = sign * 1e-6 * direction
                with tapped.edited(lambda f, _i, m=moved: f + m), torch.no_grad():
                    values.append(tapped.replay(torch.tensor([0]), step)[0, position, 9])
            slope = float(values[0] - values[1]) / 2e-6
            assert slope == pytest.approx(float((found * direction).sum()), rel=1e-5, abs=1e-8)


def test_a_later_canvas_reaches_the_picture_by_the_canvas_before(monkeypatch):
    """Without the prefix in the decoder's cache the second canvas still has a path: the first."""
    forward = made_dg.shared(canvases=2)
    adapter, t = forward.adapter, forward.trajectory
    memory, maps = vjp.watched(forward, forward.prefill)
    logits = forward.step(memory, torch.tensor([0]), torch.tensor([9]))
    whole = torch.autograd.grad(logits[0, C + 2, 9], maps, retain_graph=True)[0]
    from captum_dcam.adapters.diffusion_gemma import decoding

    original = decoding.extended

    def cut(*args):
        cache = original(*args)
        for layer in cache.layers:  # the prefix's own part of it
            for name in ("keys", "values"):
                held = getattr(layer, name)
                own = held[:, :, -C:] if held.shape[2] > C else held
                setattr(layer, name, torch.cat((held[:, :, :-C].detach(), own), 2))
        return cache

    monkeypatch.setattr(decoding, "extended", cut)
    logits = forward.step(memory, torch.tensor([0]), torch.tensor([9]))
    through = torch.autograd.grad(logits[0, C + 2, 9], maps)[0]
    assert bool(through.any()) and not torch.allclose(through, whole)
    assert t.commit_step.max() == 9 and adapter.canvas == C


def test_the_last_block_has_no_path_and_is_refused():
    made = made_dg.shared().adapter
    last = made_dg.LAYERS - 1
    assert made.deepest_block == last - 1
    for layer in (last, -1):
        with pytest.raises(LayerError, match="no path"):
            DenoisingForward(made, layer)
    forward = made_dg.shared().again(last - 1)
    forward.layer = last  # what the refusal saves a caller from
    with pytest.raises(InfeasibleStepError, match="no gradient path"):
        vjp.target_gradients(forward, [Target("x", (1,), (9,))])


def test_captums_layer_gradcam_equals_ours():
    from captum.attr import LayerGradCam

    from captum_dcam import DiffusionCAM

    forward = made_dg.shared(canvases=2)
    for position in (1, C + 1):
        target = tiny.pair(forward, position)
        for score in ("commit", "final", "teacher"):
            ours = DiffusionCAM(forward, preset="base").attribute(
                forward.request.pixels, target, score=score, relu_attributions=False
            )
            theirs = LayerGradCam(forward, forward.tap).attribute(
                forward.request.pixels,
                target,
                additional_forward_args=forward.arguments(target, score),
            )
            assert bool(theirs.any()) and tiny.relative(ours, theirs.detach()) < 1e-4


def test_half_precision():
    forward = made_dg.bound(dtype=torch.bfloat16, canvases=2)
    for row in vjp.target_gradients(
        forward, [Target("x", (1,), (9,)), Target("y", (C + 1,), (9,))]
    ):
        assert all(bool(g.any()) and bool(g.isfinite().all()) for g in row.gradients)


# -- feasibility -----------------------------------------------------------------------------------


@pytest.mark.parametrize("canvases", (1, 3))
def test_the_prefill_is_the_only_feasible_call(canvases):
    made = made_dg.shared().adapter
    request = made.prepare([[made_dg.picture()]], [made_dg.PROMPT])
    encoder, steps = [], []
    parts = (made.blocks[0], encoder), (made.step_blocks[0], steps)
    handles = [
        b.register_forward_hook(lambda _m, _a, out, seen=seen: seen.append(out.shape[1]))
        for b, seen in parts
    ]
    t = made.generate(request, gen_length=canvases * C, steps=4, seed=0)
    for handle in handles:
        handle.remove()
    prefix = request.layout.prefix_length
    assert [n for n in t.lengths if n] == encoder == [prefix, *[C] * (canvases - 1)]
    assert steps == [C] * t.steps and len(t.lengths) == t.steps + 1
    assert t.feasible == (0,) and t.valid_ratio == 1 / (1 + t.steps)
    with pytest.raises(InfeasibleStepError, match="has 0 tokens"):
        t.check_call(2)


# -- batches, pictures -----------------------------------------------------------------------------


def test_a_batch_replays_as_it_was_generated(monkeypatch):
    prompts = ("what is red ?", "what is blue ?", "what is  is ?")
    made = made_dg.shared().adapter
    lengths = [len(made.encode(p)) for p in prompts]
    prompts = [p for p, n in zip(prompts, lengths, strict=True) if n == lengths[0]]
    assert len(prompts) > 1
    forward, seen = spied(monkeypatch, lambda: made_dg.bound(prompts=prompts, canvases=2, steps=3))
    t = forward.trajectory
    for step, (_, expected) in enumerate(seen):
        own = slice(step // 3 * C, step // 3 * C + C)
        for b in range(len(prompts)):
            with torch.no_grad():
                got = forward.replay(torch.tensor([b]), torch.tensor([step]))
            assert tiny.relative(got[0, own], expected[b]) < 1e-5
    rows = vjp.target_gradients(forward, [Target("x", (1,), (9,))] * 2, [0, 1])
    assert t.tokens.shape == (len(prompts), 2 * C)
    assert not torch.allclose(rows[0].gradients[0], rows[1].gradients[0])


def test_a_batch_of_prompts_of_different_lengths_is_refused():
    made = made_dg.shared().adapter
    with pytest.raises(ValueError, match="prompts of one length"):
        made.prepare([[made_dg.picture()]] * 2, ["what is red ?", "what is the image ?"])


def test_several_pictures():
    pictures = [[made_dg.picture(1), made_dg.picture(2, (90, 30))]]
    forward = made_dg.bound(pictures=pictures, canvases=2)
    shapes = forward.request.layout.shapes
    assert len(shapes) == 2 and shapes[0] != shapes[1]
    (row,) = vjp.target_gradients(forward, [Target("x", (C + 1,), (9,))])
    assert tuple(g.shape[1:] for g in row.gradients) == shapes
    assert all(bool(g.any()) for g in row.gradients)
    found = explain_generation(forward, [1])
    assert tuple(m.shape[1:] for m in found.maps) == shapes


def test_an_empty_prompt():
    forward = made_dg.bound(prompts=("",))
    (row,) = vjp.target_gradients(forward, [Target("x", (0,), (7,))])
    assert bool(row.gradients[0].any())


# -- given answers ---------------------------------------------------------------------------------


def test_a_given_answer_hides_a_token_behind_noise():
    forward = made_dg.shared()
    t = force(forward, " a red circle is the image is a blue square")
    adapter, tokens = forward.adapter, t.tokens[0]
    assert len(tokens) == 2 * C and len(set(tokens[10:].tolist()) - adapter.stop_ids) == 0
    text = "".join(adapter.token_texts(tokens[:10].tolist()))
    assert text == " a red circle is the image is a blue square"
    ids, number, signal = t.states
    for step in range(2 * C):
        canvas, own = ids[step, 0], slice(step // C * C, step // C * C + C)
        changed = (canvas[own] != tokens[own]).nonzero()[:, 0] + own.start
        assert changed.tolist() == [step]
        assert torch.equal(canvas[: own.start], tokens[: own.start])
        assert not canvas[own.stop :].any() and int(number[step]) == step // C
        odds = one(forward, step)[0, step].double().softmax(-1)[tokens[step]]
        assert float(t.confidence[0, step]) == pytest.approx(float(odds), rel=1e-4)
    assert not signal.any()
    again = force(forward, tokens.tolist())
    assert torch.equal(again.states[0], ids)
    found = explain_generation(forward, ["circle", "square"], score="teacher")
    assert all(bool(m.any()) for m in found.maps[0])


def test_a_step_reads_its_own_canvas():
    forward = made_dg.shared(canvases=2)
    t = forward.trajectory
    first = int(t.final_step[0, 0])
    assert t.final_step.tolist() == [[first] * C + [t.steps - 1] * C] and first < t.steps - 1
    for step in range(t.steps):
        mine, other = (1, C + 1) if step <= first else (C + 1, 1)
        assert explain_generation(forward, [mine], score=step).maps[0].any()
        with pytest.raises(InfeasibleStepError, match=f"step {step} computes no logits of token"):
            explain_generation(forward, [other], score=step)


def test_every_step_of_its_own_canvas():
    forward = made_dg.shared(canvases=2)
    t = forward.trajectory
    first = int(t.final_step[0, 0])
    found = explain_steps(forward, [1, C + 1], refinements=[])
    there = found.probabilities.isnan().logical_not()
    steps = torch.arange(t.steps)
    assert torch.equal(there, torch.stack((steps <= first, steps > first), 1))
    for step in (0, first, first + 1, t.steps - 1):
        n = int(step > first)
        one = explain_generation(forward, [(1, C + 1)[n]], score=step, refinements=[])
        assert tiny.relative(found.peaks[0][step, n], one.peaks[0][0]) < 1e-5
    with pytest.raises(InfeasibleStepError, match="no step of diffusion_gemma computes all tokens"):
        explain_steps(forward, [Target("both", (C - 1, C), (5, 6))])


# -- results and what is left behind ---------------------------------------------------------------


def test_explanations_are_saved_with_their_states(tmp_path):
    forward = made_dg.shared(canvases=2)
    found = explain_generation(forward, [1, C + 1], preset="paper")
    found.save(tmp_path / "out")
    back = Explanation.load(tmp_path / "out").trajectory
    for name in ("tokens", "commit_step", "read_at"):
        assert torch.equal(getattr(back, name), getattr(forward.trajectory, name))
    again = DenoisingForward(forward.adapter, 1)
    again.bind(forward.request, back)
    for step in (3, 8):
        assert torch.equal(one(again, step), one(forward, step))


def state(model):
    return {
        "hooks": tiny.hooks(model),
        "training": [m.training for m in model.modules()],
        "requires_grad": [p.requires_grad for p in model.parameters()],
        "grad": [p.grad is None for p in model.parameters()],
        "attributes": {n: sorted(vars(m)) for n, m in model.named_modules()},
        "generation": model.generation_config.to_dict(),
        "config": model.config.to_dict(),
        "random": torch.random.get_rng_state().tolist(),
    }


def test_nothing_is_left_behind():
    made_dg.bound()
    forward = made_dg.bound()  # transformers hooks towers at their first run and leaves that there
    model = forward.adapter.model
    model.train()
    before = state(model)
    forward.generate(forward.request, gen_length=2 * C, steps=3, seed=0)
    vjp.target_gradients(forward, [Target("x", (1,), (9,))])
    forward(forward.request.pixels, *forward.arguments((1, 9)))
    assert state(model) == before


@pytest.mark.parametrize("where", ("block", "step", "head"))
def test_nothing_is_left_behind_by_an_error(where):
    forward = made_dg.bound()
    made, request = forward.adapter, forward.request
    before = state(made.model)

    def burst(*_):
        raise ZeroDivisionError

    part = {"block": made.blocks[2], "step": made.step_blocks[2], "head": made.model.lm_head}[where]
    handle = part.register_forward_hook(burst)
    with pytest.raises(ZeroDivisionError):
        forward.generate(request, gen_length=C, steps=2, seed=0)
    with pytest.raises(ZeroDivisionError):
        vjp.target_gradients(forward, [Target("x", (1,), (9,))])
    handle.remove()
    assert state(made.model) == before
