"""Autoregressive families: generation, replay, gradients, feasibility, nothing left behind."""

import json
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))  # importlib mode does not

import made_ar
import tiny

from captum_dcam.errors import InfeasibleStepError, LayerError
from captum_dcam.explaining import explain_generation, explain_steps
from captum_dcam.model import gradients as vjp
from captum_dcam.model.answers import force
from captum_dcam.model.forward import DenoisingForward
from captum_dcam.model.words import Target

every = pytest.mark.parametrize("kind", made_ar.KINDS)
both = pytest.mark.parametrize("cache", ("prefix", "none"))


def spied(monkeypatch, make):
    """What ``make`` returns, and what the family's own ``generate`` did."""
    from transformers import GenerationMixin

    seen = []
    original = GenerationMixin.generate

    def spy(self, **kwargs):
        out = original(self, **kwargs)
        seen.append((kwargs, out))
        return out

    monkeypatch.setattr(GenerationMixin, "generate", spy)
    made = make()
    monkeypatch.setattr(GenerationMixin, "generate", original)
    ((kwargs, out),) = seen
    return made, kwargs, out


# -- generation and replay -------------------------------------------------------------------------


@every
@both
def test_replayed_logits_are_those_of_generate(monkeypatch, kind, cache):
    forward, _, out = spied(monkeypatch, lambda: made_ar.bound(kind, cache, length=4))
    t = forward.trajectory
    expected = torch.stack(out.logits, 1)
    assert torch.equal(t.tokens, out.sequences[:, -len(out.logits) :])
    for step in range(t.steps):
        with torch.no_grad():
            one = forward.replay(torch.tensor([0]), torch.tensor([step]))
            state = t.state_at(torch.tensor([0]), torch.tensor([step]))
            plain = forward(forward.request.pixels, *forward.request.extras, *state)
        assert tiny.relative(one[:, step], expected[:, step]) < 1e-5
        assert tiny.relative(plain, one) < 1e-6
    with torch.no_grad():
        several = forward.replay(torch.zeros(t.steps, dtype=torch.long), torch.arange(t.steps))
        teacher = forward.replay(torch.tensor([0]), torch.tensor([t.steps]))
    at = torch.arange(t.steps)
    assert tiny.relative(several[at, at], expected[0]) < 1e-5
    assert tiny.relative(teacher, expected) < 1e-5
    sure = expected.double().softmax(-1).gather(2, t.tokens[..., None])[..., 0]
    assert tiny.relative(t.confidence, sure) < 1e-6


@every
def test_canvases_commits_and_scores(kind):
    t = made_ar.shared(kind).trajectory
    pad = made_ar.TOKENIZERS[kind]().pad_token_id
    assert t.commit_step.tolist() == [list(range(t.steps))]
    for step, canvas in enumerate(t.states[0]):
        assert torch.equal(canvas[0, :step], t.tokens[0, :step])
        assert (canvas[0, step:] == pad).all()
    assert torch.equal(t.final_state[0], t.tokens)
    assert [t.step_of(0, 1, s) for s in ("commit", "final", "teacher")] == [
        1, t.steps - 1, t.steps,
    ]  # fmt: skip


@every
def test_a_step_reads_what_is_written_by_then(kind):
    """Later steps read a token as its own does; before its turn nothing is known of it."""
    forward = made_ar.shared(kind)
    own, later = (explain_generation(forward, [1], score=s, refinements=[]).maps for s in (1, 3))
    assert all(tiny.relative(b, a) < 1e-4 for a, b in zip(own, later, strict=True))
    with pytest.raises(InfeasibleStepError, match="step 1 computes no logits of token 2 of the"):
        explain_generation(forward, [2], score=1)


@every
def test_every_step_is_the_same_from_a_words_turn_on(kind):
    forward = made_ar.shared(kind)
    found = explain_steps(forward, [0, 2], refinements=[])
    assert found.probabilities.isnan().T.tolist() == [[False] * 4, [True, True, False, False]]
    assert tiny.relative(found.probabilities[3], found.probabilities[2]) < 1e-4
    for maps in found.maps:
        assert not maps[:2, 1].any() and tiny.relative(maps[3, 1], maps[2, 1]) < 1e-3


@every
def test_what_stands_behind_a_token_does_not_matter(kind):
    forward = made_ar.shared(kind)
    step = 2
    (state,) = forward.trajectory.state_at(torch.tensor([0]), torch.tensor([step]))
    other = state.clone()
    other[:, step:] = 5
    with torch.no_grad():
        one, two = (
            forward(forward.request.pixels, *forward.request.extras, s)[:, : step + 1]
            for s in (state, other)
        )
    assert torch.equal(one, two)


@every
@both
def test_generation_stops_where_the_family_stops(kind, cache):
    made = made_ar.adapter(kind, cache)
    request = made.prepare([[made_ar.picture()]], [made_ar.PROMPT])
    forward = DenoisingForward(made, 1)
    free = forward.generate(request, max_new_tokens=6).tokens[0].tolist()
    made.model.generation_config.eos_token_id = free[2]  # now this token ends an answer
    stopped = forward.generate(request, max_new_tokens=6).tokens[0].tolist()
    assert stopped == free[: free.index(free[2]) + 1]
    assert free[2] in made.stop_ids


@every
def test_knobs_of_generate(kind):
    made = made_ar.adapter(kind)
    request = made.prepare([[made_ar.picture()]], [made_ar.PROMPT])

    def draw(seed, **settings):
        g = torch.Generator().manual_seed(seed)
        return made.generate(request, generator=g, max_new_tokens=6, **settings).tokens.tolist()

    before = torch.random.get_rng_state()
    hot = {"temperature": 3.0, "top_k": 0}
    assert draw(0, **hot) == draw(0, do_sample=True, **hot) != draw(1, **hot)
    assert torch.equal(torch.random.get_rng_state(), before)
    greedy = made.generate(request, max_new_tokens=6).tokens.tolist()
    assert greedy == draw(0) == draw(0, temperature=0) == draw(0, num_beams=1)
    made.model.generation_config.do_sample = True  # a checkpoint's default does not surprise
    made.model.generation_config.temperature = 9.0
    assert made.generate(request, gen_length=6).tokens.tolist() == greedy
    assert len(made.generate(request, generator=None, gen_length=1).tokens[0]) == 1
    from transformers import GenerationConfig

    given = made.generate(request, max_new_tokens=2, generation_config=GenerationConfig())
    assert json.dumps(given.settings) and given.settings["max_new_tokens"] == 2
    penalised = made.generate(request, max_new_tokens=6, repetition_penalty=50.0).tokens[0]
    assert len(set(penalised.tolist())) == len(penalised)


@pytest.mark.parametrize(
    ("settings", "message"),
    (
        ({"num_beams": 3}, "one per step"),
        ({"num_return_sequences": 2}, "one answer"),
        ({"steps": 4}, "one step per token"),
        ({"block_length": 4}, "token by token"),
        ({"use_cache": False}, "cache"),
        ({"gen_length": 3, "max_new_tokens": 3}, "mean the same"),
        ({"max_new_tokens": 0}, "at least one"),
        ({"temperature": -1.0}, "0 or more"),
        ({"temperature": 0.7}, "generator"),
        ({"do_sample": True}, "generator"),
        ({"do_sample": True, "temperature": 0}, "leave out one"),
    ),
)
def test_settings_that_cannot_work(settings, message):
    made = made_ar.shared_adapter("llava")
    request = made.prepare([[made_ar.picture()]], [made_ar.PROMPT])
    with pytest.raises(ValueError, match=message):
        made.generate(request, **settings)


@every
@both
def test_an_answer_of_one_token_and_an_empty_prompt(kind, cache):
    forward = made_ar.bound(kind, cache, prompts=("",), length=1)
    assert forward.trajectory.tokens.shape == (1, 1)
    (row,) = vjp.target_gradients(forward, [Target("x", (0,), (7,))])
    assert all(bool(g.any()) for g in row.gradients)


# -- batches ---------------------------------------------------------------------------------------


@every
@both
def test_a_batch_gives_what_its_examples_give(monkeypatch, kind, cache):
    """Prompts of different lengths, padded behind the picture."""
    prompts = ("what is red ?", "", "is the circle in the image blue or red ?")
    make = lambda: made_ar.bound(kind, cache, prompts=prompts, length=3)  # noqa: E731
    forward, _, out = spied(monkeypatch, make)
    t = forward.trajectory
    for b, prompt in enumerate(prompts):
        alone, _, own = spied(
            monkeypatch,
            lambda b=b, p=prompt: made_ar.bound(
                kind, cache, prompts=(p,), pictures=[[made_ar.picture(b)]], length=3
            ),
        )
        for step, logits in enumerate(own.logits):
            assert tiny.relative(out.logits[step][b], logits[0]) < 1e-4
            assert t.tokens[b, step] == alone.trajectory.tokens[0, step]
            with torch.no_grad():
                got = forward.replay(torch.tensor([b]), torch.tensor([step]))
            assert tiny.relative(got[0, step], logits[0]) < 1e-4
    single_ = DenoisingForward(forward.adapter, 1)
    grids = single_.adapter.prepare([[made_ar.picture(0)]], [prompts[0]]).layout.grids
    assert torch.equal(grids[0].positions, forward.request.layout.grids[0].positions)


@every
def test_a_batch_of_different_layouts_is_refused(kind):
    made = made_ar.shared_adapter(kind)
    with pytest.raises(ValueError, match="different places"):
        made.prepare([[made_ar.picture(size=(40, 40))], [made_ar.picture(size=(90, 30))]], ["", ""])
    with pytest.raises(ValueError, match="different places"):
        made.prepare([[made_ar.picture()], [made_ar.picture(), made_ar.picture()]], ["", ""])


# -- gradients -------------------------------------------------------------------------------------


@every
@both
def test_gradients_equal_finite_differences(monkeypatch, kind, cache):
    made_ar.exact(monkeypatch)
    forward = made_ar.bound(kind, cache, dtype=torch.float64, length=3)
    count = len(forward.adapter.blocks)
    for layer in range(count - 1):
        one = DenoisingForward(forward.adapter, layer)
        one.bind(forward.request, forward.trajectory)
        for position in (0, 2):
            (row,) = vjp.target_gradients(one, [Target("x", (position,), (9,))])
            found = row.gradients[0]
            assert bool(found.any())
            direction = torch.randn(found.shape, dtype=torch.float64)
            values = []
            for sign in (1, -1):
                moved = sign * 1e-5 * direction
                with one.edited(lambda f, _i, m=moved: f + m), torch.no_grad():
                    logits = one.replay(torch.tensor([0]), torch.tensor([position]))
                values.append(logits[0, position, 9])
            slope = (values[0] - values[1]) / 2e-5
            assert slope == pytest.approx(float((found * direction).sum()), rel=1e-5, abs=1e-9)


@every
@both
def test_the_last_block_has_no_path_and_is_refused(kind, cache):
    made = made_ar.shared(kind, cache).adapter
    last = len(made.blocks) - 1
    assert made.deepest_block == last - 1
    for layer in (last, -1):
        with pytest.raises(LayerError, match="no path"):
            DenoisingForward(made, layer)
    forward = made_ar.shared(kind, cache).again(last - 1)
    forward.layer = last  # what the refusal saves a caller from
    with pytest.raises(InfeasibleStepError, match="no gradient path"):
        vjp.target_gradients(forward, [Target("x", (1,), (9,))])


@every
@both
def test_captums_layer_gradcam_equals_ours(kind, cache):
    from captum.attr import LayerGradCam

    from captum_dcam import DiffusionCAM

    forward = made_ar.shared(kind, cache)
    target = tiny.pair(forward, 1)
    ours = DiffusionCAM(forward, preset="base").attribute(
        forward.request.pixels, target, score="commit"
    )
    theirs = LayerGradCam(forward, forward.tap).attribute(
        forward.request.pixels,
        target,
        additional_forward_args=forward.arguments(target, "commit"),
        relu_attributions=True,
    )
    assert bool(theirs.any()) or not bool(ours.any())
    theirs = theirs.detach()
    assert float((ours - theirs).abs().max()) <= 1e-5 * float(theirs.abs().max() + 1e-9)


# -- feasibility -----------------------------------------------------------------------------------


@every
def test_feasible_calls(kind):
    forward = made_ar.shared(kind)
    t, prefix = forward.trajectory, forward.request.layout.prefix_length
    assert t.lengths == (prefix, 0, *[1] * (t.steps - 1)) and t.feasible == (0,)
    with pytest.raises(InfeasibleStepError, match="has 1 tokens"):
        t.check_call(2)
    t = made_ar.shared(kind, "none").trajectory
    assert t.lengths == tuple(prefix + s for s in range(t.steps))
    assert t.feasible == tuple(range(t.steps))


@every
@both
def test_lengths_are_those_of_the_familys_calls(kind, cache):
    made = made_ar.adapter(kind, cache)
    request = made.prepare([[made_ar.picture()]], [made_ar.PROMPT])
    seen = []
    handle = made.blocks[0].register_forward_hook(lambda _m, _a, out: seen.append(out.shape[1]))
    t = made.generate(request, max_new_tokens=4)
    handle.remove()
    assert [n for n in t.lengths if n] == seen


# -- forced answers --------------------------------------------------------------------------------


@every
@both
def test_a_given_answer_is_read_token_by_token(monkeypatch, kind, cache):
    forward, kwargs, _ = spied(monkeypatch, lambda: made_ar.bound(kind, cache))
    text = " a red circle"
    t = force(forward, text)
    tokens = t.tokens[0]
    assert "".join(forward.adapter.token_texts(tokens.tolist())) == text
    assert t.commit_step.tolist() == [list(range(len(tokens)))]
    for position in range(len(tokens)):
        with torch.no_grad():
            got = forward.replay(torch.tensor([0]), torch.tensor([position]))[0, position]
        assert t.confidence[0, position] == pytest.approx(
            float(got.double().softmax(-1)[tokens[position]]), rel=1e-5
        )
        if position:  # the family's own forward on prompt and visible tokens
            own = extended(forward, kwargs, tokens[None, :position])
            assert tiny.relative(got, own[0, -1]) < 1e-5


def extended(forward, kwargs, answer):
    """Logits of the family's own forward with the answer behind the prompt."""
    model = forward.adapter.model
    inputs = {k: v for k, v in kwargs.items() if isinstance(v, torch.Tensor)}
    inputs["input_ids"] = torch.cat((inputs["input_ids"], answer), 1)
    inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    if "mm_token_type_ids" in inputs:
        types = inputs["mm_token_type_ids"]
        inputs["mm_token_type_ids"] = torch.cat((types, torch.zeros_like(answer)), 1)
    with torch.no_grad():
        return model(**inputs, use_cache=False).logits


# -- nothing left behind ---------------------------------------------------------------------------


def state(model):
    core = model.model
    return {
        "hooks": tiny.hooks(model),
        "training": [m.training for m in model.modules()],
        "requires_grad": [p.requires_grad for p in model.parameters()],
        "grad": [p.grad is None for p in model.parameters()],
        "attributes": {n: sorted(vars(m)) for n, m in model.named_modules()},
        "generation": model.generation_config.to_dict(),
        "config": model.config.to_dict(),
        "deltas": getattr(core, "rope_deltas", None),
    }


def warm(made):
    """transformers hooks towers at their first run, whoever runs them, and leaves that there."""
    request = made.prepare([[made_ar.picture()]], [made_ar.PROMPT])
    made.model(**made._inputs(request.pixels, request.extras))
    if hasattr(made.model.model, "rope_deltas"):
        made.model.model.rope_deltas = None


@every
@both
def test_nothing_is_left_behind(kind, cache):
    made = made_ar.adapter(kind, cache)
    warm(made)
    made.model.train()
    mark = object()
    if kind in made_ar.QWEN:
        made.model.model.rope_deltas = mark  # what a caller's own generation left there
    before = state(made.model)
    forward = DenoisingForward(made, 1)
    forward.generate(made.prepare([[made_ar.picture()]], [made_ar.PROMPT]), max_new_tokens=3)
    vjp.target_gradients(forward, [Target("x", (1,), (9,))])
    forward(forward.request.pixels, *forward.arguments((1, 9)))
    after = state(made.model)
    assert after == before
    assert made.model.training


@every
def test_nothing_is_left_behind_by_an_error(kind):
    made = made_ar.adapter(kind)
    warm(made)
    request = made.prepare([[made_ar.picture()]], [made_ar.PROMPT])
    before = state(made.model)

    def burst(*_):
        raise ZeroDivisionError

    tower = made.model.model.visual if kind in made_ar.QWEN else made.model.model.vision_tower
    for part in (tower, made.blocks[2]):
        handle = part.register_forward_hook(burst)
        for work in (
            lambda: made.generate(request, max_new_tokens=2),
            lambda: made.prefill(made.embed(request.pixels, *request.extras)),
        ):
            with pytest.raises(ZeroDivisionError):
                work()
        handle.remove()
        assert state(made.model) == before


@every
def test_a_forward_that_another_library_put_there_stays(kind):
    """accelerate replaces ``forward`` on the modules that it dispatches."""
    made = made_ar.adapter(kind)
    language = made.model.model.language_model
    request = made.prepare([[made_ar.picture()]], [made_ar.PROMPT])
    expected = made.prefill(made.embed(request.pixels, *request.extras)).last
    calls = []
    original = language.forward

    def wrapped(*args, **kwargs):
        calls.append(1)
        return original(*args, **kwargs)

    language.forward = wrapped
    memory = made.embed(request.pixels, *request.extras)
    assert not calls and vars(language)["forward"] is wrapped
    assert torch.equal(made.prefill(memory).last, expected) and calls == [1]


@every
@both
def test_half_precision(kind, cache):
    forward = made_ar.bound(kind, cache, dtype=torch.bfloat16)
    assert forward.request.pixels.dtype == torch.bfloat16
    (row,) = vjp.target_gradients(forward, [Target("x", (1,), (9,))])
    assert all(bool(g.isfinite().all()) and bool(g.any()) for g in row.gradients)


@every
def test_a_model_dispatched_by_accelerate(kind):
    from accelerate import dispatch_model

    made = made_ar.adapter(kind)
    plain = DenoisingForward(made, 1)
    request = made.prepare([[made_ar.picture()]], [made_ar.PROMPT])
    tokens = plain.generate(request, max_new_tokens=3).tokens
    (expected,) = vjp.target_gradients(plain, [Target("x", (1,), (9,))])
    names = {n for n, _ in made.model.model.named_children()}
    places = {**{f"model.{n}": "cpu" for n in names}, "lm_head": "cpu"}
    dispatch_model(made.model, places, main_device="cpu", force_hooks=True)
    forward = DenoisingForward(made, 1)
    assert torch.equal(forward.generate(request, max_new_tokens=3).tokens, tokens)
    (row,) = vjp.target_gradients(forward, [Target("x", (1,), (9,))])
    for one, two in zip(row.gradients, expected.gradients, strict=True):
        assert tiny.relative(one, two) < 1e-5
