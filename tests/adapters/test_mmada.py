"""MMaDA against a double of our own: replay, gradients, feasible steps, layout, errors."""

import sys
from types import ModuleType

import numpy as np
import pytest
import tiny
import torch
from doubles import mmada as double
from doubles import mmada_checks as checks
from doubles.gradients import fd
from doubles.mmada_checks import QUICK, SIDE, SIZES, TOKENS, left, own_ids
from PIL import Image

import captum_dcam
from captum_dcam.adapters.mmada import MmadaAdapter, compat, packing
from captum_dcam.errors import (
    InfeasibleStepError,
    InputError,
    LayerError,
    MethodError,
    ProcessorError,
    WeightsError,
)
from captum_dcam.methods import AttributionTask, method
from captum_dcam.model.forward import DenoisingForward, single
from captum_dcam.model.gradients import target_gradients
from captum_dcam.model.words import Target


def adapter(seed=0, dtype=torch.float32, **options):
    made, vq = double.model(seed, dtype), double.vq(seed, dtype)
    adapter = captum_dcam.wrap(made, (double.tokenizer(), vq), resolution=SIDE, **options)
    adapter.ids, adapter.marks = double.IDS, double.MARKS
    return adapter


def bound(layer=1, dtype=torch.float32, batch=1, prompts=None, keep=True, **settings):
    made = adapter(dtype=dtype)
    forward = DenoisingForward(made, layer)
    pictures = [[tiny.picture(b)] for b in range(batch)]
    request = made.prepare(pictures, prompts or ["what is this ?"] * batch)
    forward.generate(request, keep=keep, **{**QUICK, **settings})
    return forward


def reference(forward, **settings):
    """The double's own generation: the answer, and the canvases and logits of every step."""
    found = checks.reference(forward.adapter, forward.request, {**QUICK, **settings})
    return found.tokens, list(found.canvases), found.logits


# -- 1. trajectory and replay ---------------------------------------------------------------------


@pytest.mark.parametrize("keep", (True, False))
@pytest.mark.parametrize(
    "settings", ({}, {"steps": 8}, {"max_new_tokens": 16, "block_length": 8, "steps": 6})
)
def test_trajectory_and_replay_have_the_bits_of_the_familys_own_generation(keep, settings):
    forward = bound(keep=keep, **settings)
    t = forward.trajectory
    answer, canvases, logits = reference(forward, **settings)
    assert torch.equal(t.tokens, answer)
    assert torch.equal(t.states[0], torch.stack(canvases))
    assert len(logits) == t.steps
    for step, expected in enumerate(logits):
        with torch.no_grad():
            got = forward.replay(torch.tensor([0]), torch.tensor([step]))
            state = t.state_at(torch.tensor([0]), torch.tensor([step]))
            plain = forward(forward.request.pixels, *forward.request.extras, *state)
        assert torch.equal(got, expected)
        assert torch.equal(plain, expected)
    for p in range(t.tokens.shape[1]):
        step = int(t.commit_step[0, p])
        assert canvases[step][0, p] == double.MASK
        after = canvases[step + 1][0, p] if step + 1 < t.steps else answer[0, p]
        assert after == answer[0, p]
        sure = logits[step][0, p].double().softmax(-1)[answer[0, p]]
        assert t.confidence[0, p] == pytest.approx(float(sure), rel=1e-5)


def test_the_schedule_puts_remainders_first():
    t = bound(max_new_tokens=16, block_length=8, steps=6).trajectory
    counts = [int((t.commit_step == s).sum()) for s in range(6)]
    assert counts == [3, 3, 2, 3, 3, 2]


def test_replay_is_not_causal_as_the_trap_is():
    """A mask with a zero makes the model causal; the adapter never passes one."""
    forward = bound()
    ids = torch.cat(
        (own_ids(forward.adapter, forward.request), forward.trajectory.states[0][0]), dim=1
    )
    mask = torch.ones_like(ids)
    mask[:, 0] = 0
    model = forward.adapter.model
    with torch.no_grad():
        got = forward.replay(torch.tensor([0]), torch.tensor([0]))
        trapped = model(ids, attention_mask=mask).logits[:, -8:]
        bias = (mask[:, :, None] & mask[:, None]).bool()[:, None]
        open_ = model(ids, attention_bias=bias).logits[:, -8:]
    assert tiny.relative(trapped, got) > 0.1
    assert tiny.relative(open_, got) < tiny.relative(trapped, got)


@pytest.mark.parametrize("settings", ({"temperature": 0.7}, {"remasking": "random"}))
def test_sampled_generations_are_reproducible(settings):
    def draw(seed):
        state = torch.random.get_rng_state()
        generator = torch.Generator().manual_seed(seed)
        t = bound(generator=generator, max_new_tokens=12, steps=6, **settings).trajectory
        assert torch.equal(torch.random.get_rng_state(), state)
        return t

    one, again, other = draw(1), draw(1), draw(3)
    assert torch.equal(one.tokens, again.tokens)
    assert torch.equal(one.states[0], again.states[0])
    assert not torch.equal(one.states[0], other.states[0])


def test_guided_rows_stand_behind_and_see_no_picture():
    forward = bound(cfg_scale=1.5)
    t = forward.trajectory
    answer, canvases, logits = reference(forward, cfg_scale=1.5)
    assert torch.equal(t.tokens, answer) and torch.equal(t.states[0], torch.stack(canvases))
    assert t.lengths == (forward.request.layout.prefix_length + 8,) * 4
    assert not t.kept.get("calls")
    for step, expected in enumerate(logits):
        with torch.no_grad():
            assert torch.equal(forward.replay(torch.tensor([0]), torch.tensor([step])), expected)
    targets = [Target("x", (2,), (int(t.tokens[0, 2]),))]
    (guided,) = target_gradients(forward, targets, score="teacher")
    assert guided.gradients[0].shape == (32, 4, 4) and guided.gradients[0].any()


# -- 2. gradients ---------------------------------------------------------------------------------


@pytest.mark.parametrize("layer", range(3))
@pytest.mark.parametrize("score", ("commit", "final"))
def test_gradients_are_finite_differences_at_every_usable_block(layer, score):
    forward = bound(layer, torch.float64)
    for position in (0, 7):
        fd(forward, position, score)


def test_gradients_of_guided_logits_are_finite_differences():
    fd(bound(1, torch.float64, cfg_scale=1.5), 3)


def test_the_last_block_is_refused_and_has_no_gradient():
    made = adapter()
    assert made.deepest_block == 2
    with pytest.raises(LayerError, match="deepest usable block of mmada is 2"):
        DenoisingForward(made, 3)
    forward = bound(2)
    forward.layer = 3
    with pytest.raises(InfeasibleStepError, match="no gradient path"):
        target_gradients(forward, [Target("x", (0,), (5,))])


def test_no_gradient_reaches_pixels_and_the_error_says_so():
    forward = bound()
    task = AttributionTask(single(forward), (Target("x", (1,), (7,)),))
    for name in ("saliency", "integrated_gradients", "input_x_gradient"):
        with pytest.raises(MethodError, match="VQ encoder turns the image into integer codes"):
            method(name).attribute(task)
    pixels = forward.request.pixels.clone().requires_grad_()
    logits = forward(pixels, *forward.arguments((1, 7)))
    with pytest.raises(MethodError, match="reads the tapped block"):
        logits[0, 1, 7].backward()
    assert pixels.grad is None and not forward.request.pixels.requires_grad


@pytest.mark.parametrize("name", ("diffusion_cam", "layer_grad_cam", "architecture_surgery", "tam"))
def test_methods_on_the_tap_work(name):
    forward = single(bound())
    task = AttributionTask(forward, (Target("x", (1,), (7,)), Target("y", (5,), (11,))))
    found = method(name).attribute(task)
    assert found.maps[0].shape == (2, 4, 4)
    assert found.maps[0].isfinite().all() and found.maps[0].any()


def test_methods_that_perturb_pixels_work():
    task = AttributionTask(single(bound()), (Target("x", (1,), (7,)),))
    found = method("occlusion").attribute(task)
    assert found.maps[0].shape == (1, 4, 4) and found.maps[0].any()


def test_positions_cached_in_inference_mode_do_not_break_the_backward():
    made = adapter()
    with torch.inference_mode():
        made.model(torch.zeros(1, 90, dtype=torch.long))
    forward = DenoisingForward(made, 1)
    forward.generate(made.prepare([[tiny.picture()]], ["what is this"]), **QUICK)
    (row,) = target_gradients(forward, [Target("x", (0,), (5,))])
    assert row.gradients[0].any()


# -- 3. feasible steps ----------------------------------------------------------------------------


@pytest.mark.parametrize("settings", ({}, {"max_new_tokens": 40, "block_length": 40, "steps": 5}))
def test_every_step_holds_the_picture(settings):
    forward = bound(**settings)
    t, layout = forward.trajectory, forward.request.layout
    assert layout.image_end == 2 + TOKENS
    assert t.lengths == (layout.prefix_length + t.tokens.shape[1],) * t.steps
    assert t.feasible == tuple(range(t.steps)) and t.valid_ratio == 1
    for step in t.feasible:
        (row,) = target_gradients(forward, [Target("x", (0,), (5,))], call=step)
        assert row.gradients[0].any()


# -- 4. layout ------------------------------------------------------------------------------------


@pytest.mark.parametrize("fit", ("crop", "squash"))
@pytest.mark.parametrize("size", SIZES)
def test_pixels_know_where_their_token_lies(size, fit):
    """Red and green are ramps over x and y: a token's mean colour is the centre of its box."""
    width, height = size
    x = (np.arange(width) + 0.5) / width * 255
    y = (np.arange(height) + 0.5) / height * 255
    array = np.stack((*np.meshgrid(x, y), np.zeros((height, width))), axis=-1)
    made = adapter(fit=fit)
    request = made.prepare([[Image.fromarray(array.round().astype(np.uint8))]], ["what"])
    (grid,) = request.layout.grids
    assert grid.image_size == (height, width) and grid.positions.flatten().tolist() == list(
        range(2, 2 + TOKENS)
    )
    owners = made.pixel_tokens(request)
    values = (request.pixels[0] + 1) / 2
    for k in range(TOKENS):
        x0, y0, x1, y1 = grid.box(*divmod(k, 4))
        assert 0 <= x0 < x1 <= width + 1e-6 and 0 <= y0 < y1 <= height + 1e-6
        red = float(values[0][owners[0, 0] == k].mean()) * width
        green = float(values[1][owners[0, 1] == k].mean()) * height
        slack = lambda n: 0.02 * n + 1.5  # noqa: E731  resampling, 8 bits, rounded sides
        assert abs(red - (x0 + x1) / 2) < slack(width)
        assert abs(green - (y0 + y1) / 2) < slack(height)


@pytest.mark.parametrize("size", SIZES[:6])
def test_a_bright_patch_comes_out_at_the_right_token_and_back_at_its_place(size):
    width, _ = size
    made = adapter()
    plain = Image.new("RGB", size)
    (grid,) = made.prepare([[plain]], ["what"]).layout.grids
    for cell in ((1, 2), (3, 0)):
        x0, y0, x1, y1 = grid.box(*cell)
        box = tuple(round(v) for v in (x0, y0, max(x1, x0 + 1), max(y1, y0 + 1)))
        lit = plain.copy()
        lit.paste((255, 255, 255), box)
        request = made.prepare([[lit]], ["what"])
        owners = made.pixel_tokens(request).expand_as(request.pixels)
        light = torch.stack([request.pixels[owners == k].mean() for k in range(TOKENS)])
        assert divmod(int(light.argmax()), 4) == cell
        back = grid.to_pixels((light.view(4, 4) + 1) / 2)
        at = divmod(int(back.argmax()), width)
        assert abs(at[1] + 0.5 - (x0 + x1) / 2) <= x1 - x0
        assert abs(at[0] + 0.5 - (y0 + y1) / 2) <= y1 - y0


def test_what_is_cropped_away_is_in_no_box():
    made = adapter()
    request = made.prepare([[Image.new("RGB", (300, 100))]], ["what"])
    (grid,) = request.layout.grids
    # by the formula: the side of 100 becomes 64, 300 becomes 192, 64 pixels go on both ends
    assert grid.box(0, 0)[0] == pytest.approx(64 * 300 / 192)
    assert grid.box(3, 3)[2] == pytest.approx(128 * 300 / 192)
    painted = grid.to_pixels(torch.ones(4, 4))
    assert painted[:, 101:199].min() == 1
    assert painted[:, :99].max() == 0 and painted[:, 201:].max() == 0
    squashed = adapter(fit="squash").prepare([[Image.new("RGB", (300, 100))]], ["what"])
    assert squashed.layout.grids[0].to_pixels(torch.ones(4, 4)).min() == 1


# -- 5. batches, prompts, conversations -----------------------------------------------------------


def test_a_batch_has_the_answers_of_its_examples():
    forward = bound(batch=3)
    t = forward.trajectory
    answer, _, logits = reference(forward)
    assert torch.equal(t.tokens, answer)
    examples = torch.arange(3)
    for step, expected in enumerate(logits):
        state = t.state_at(examples, torch.full((3,), step))
        with torch.no_grad():
            got = forward(forward.request.pixels, *forward.request.extras, *state)
        assert torch.equal(got, expected)
    for b in range(3):
        alone = single(forward, b)
        with torch.no_grad():
            got = alone.replay(torch.tensor([0]), torch.tensor([1]))
        assert tiny.relative(got[0], logits[1][b]) < 1e-4


def test_an_empty_prompt_and_an_answer_of_one_token():
    forward = bound(prompts=[""], max_new_tokens=1, block_length=1, steps=1)
    assert forward.trajectory.tokens.shape == (1, 1)
    (row,) = target_gradients(forward, [Target("x", (0,), (5,))])
    assert row.gradients[0].any()
    positions, ids = forward.adapter.prompt_tokens(forward.request)
    assert len(positions) == len(ids)


def test_prompts_are_in_the_chat_template():
    made = adapter()
    tokenizer = made.processor[0]
    conversation = [
        {"role": "user", "content": "what is this"},
        {"role": "assistant", "content": "a red circle"},
        {"role": "user", "content": [{"type": "text", "text": "left or right"}]},
    ]
    for prompt, messages in (
        ("what is this", [{"role": "user", "content": "what is this"}]),
        (conversation, [*conversation[:2], {"role": "user", "content": "left or right"}]),
    ):
        request = made.prepare([[tiny.picture()]], [prompt])
        expected = tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, return_dict=False
        )
        assert request.extras[0][0].tolist() == expected
        bare = MmadaAdapter(
            made.model, (double.tokenizer(template=None), made.processor[1]), resolution=SIDE
        )
        again = bare.prepare([[tiny.picture()]], [prompt])
        assert torch.equal(again.extras[0], request.extras[0])
    positions, ids = made.prompt_tokens(request)
    whole = torch.cat((torch.full((2 + TOKENS + 1,), -1), request.extras[0][0]))
    assert torch.equal(whole[positions], ids)
    text = "".join(made.token_texts(ids.tolist()))
    assert "red circle" in text and "<|" not in text


def test_pieces_and_encode():
    made = adapter()
    ids = made.encode("a red circle")
    assert made.token_texts(ids) == ["a", " red", " circle"]
    assert made.token_texts([ids[1], double.TEXT + 3]) == [" red", " <|code 3|>"]
    assert made.mask_id in made.stop_ids and double.IDS.turn_end in made.stop_ids


# -- 6. nothing is left behind, bad input ---------------------------------------------------------


@pytest.mark.parametrize("fails", (False, True))
def test_nothing_is_left_behind(fails):
    made = adapter()
    made.model.train()
    request = made.prepare([[tiny.picture()]], ["what is this"])
    before = left(made)
    forward = DenoisingForward(made, 1)
    generator = torch.Generator().manual_seed(0)
    if fails:
        handle = made.blocks[-1].register_forward_hook(lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            forward.generate(request, generator=generator, **QUICK, temperature=0.5)
        handle.remove()
    else:
        forward.generate(request, generator=generator, **QUICK, temperature=0.5)
        target_gradients(forward, [Target("x", (0,), (5,))])
    assert left(made) == before


def test_a_configuration_without_use_cache_is_repaired_while_it_is_needed(monkeypatch):
    """transformers 5 drops the default; models loaded without the repair work all the same."""
    made = adapter()
    monkeypatch.delattr(double.MMadaConfig, "use_cache")
    if hasattr(made.model.config, "use_cache"):
        pytest.skip("this version of transformers gives every configuration use_cache")
    forward = DenoisingForward(made, 1)
    forward.generate(made.prepare([[tiny.picture()]], ["what"]), **QUICK)
    target_gradients(forward, [Target("x", (0,), (5,))])
    assert not hasattr(made.model.config, "use_cache")


@pytest.mark.parametrize(
    ("images", "prompts", "message"),
    (
        ([[]], ["x"], "no image"),
        ([], [], "one prompt and one list"),
        ([[tiny.picture()] * 2], ["x"], "mmada takes one"),
        ([[[tiny.picture()] * 2]], ["x"], "takes no video"),
        ([[tiny.picture()], [tiny.picture(size=(30, 30))]], ["x", "x"], "different sizes"),
        ([[tiny.picture()]] * 2, ["what", "what is this"], r"explain them one by one"),
        ([[Image.new("RGB", (2000, 3))]], ["x"], "cut it into pieces"),
        ([[tiny.picture()]], [" what" * 600], "context is 512"),
    ),
)
def test_input_that_cannot_work(images, prompts, message):
    with pytest.raises(ValueError, match=message):
        adapter().prepare(images, prompts)


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    (
        ({"eot_token": 3}, TypeError, "ignores it"),
        ({"attention_mask": None}, TypeError, "no padding"),
        ({"length": 3}, TypeError, "Known: max_new_tokens"),
        ({"gen_length": 8}, ValueError, "mean the same"),
        ({"max_new_tokens": 0}, ValueError, "at least one"),
        ({"block_length": 3}, ValueError, "multiple of block_length"),
        ({"steps": 3}, ValueError, "multiple of the 2 blocks"),
        ({"remasking": "best"}, ValueError, "expected one of"),
        ({"temperature": 1.0}, ValueError, "generator"),
        ({"cfg_scale": -1.0}, ValueError, "0 or more"),
    ),
)
def test_settings_that_cannot_work(settings, error, message):
    with pytest.raises(error, match=message):
        bound(**settings)


def test_processors_that_do_not_fit():
    model, vq = double.model(), double.vq()
    with pytest.raises(TypeError, match="expected \\(tokenizer, vq_model\\)"):
        MmadaAdapter(model, double.tokenizer())
    with pytest.raises(TypeError, match="expected \\(tokenizer, vq_model\\)"):
        MmadaAdapter(model, (vq, double.tokenizer()))
    with pytest.raises(ValueError, match="multiple of 16"):
        MmadaAdapter(model, (double.tokenizer(), vq), resolution=100)
    with pytest.raises(ValueError, match="without added tokens"):
        MmadaAdapter(model, (double.tokenizer(size=double.TEXT + 1), vq))
    with pytest.raises(ValueError, match="expected one of"):
        MmadaAdapter(model, (double.tokenizer(), vq), fit="pad")


def test_loading_through_the_upstream_package(monkeypatch, tmp_path):
    package = ModuleType("models")
    package.MMadaModelLM = double.MMadaModelLM

    class Vq:
        @staticmethod
        def from_pretrained(name):
            assert name == "some/vq"
            return double.vq()

    package.MAGVITv2 = Vq
    utils = ModuleType("diffusers.utils")
    monkeypatch.setitem(sys.modules, "diffusers", ModuleType("diffusers"))
    monkeypatch.setitem(sys.modules, "diffusers.utils", utils)
    monkeypatch.setitem(sys.modules, "models", package)
    monkeypatch.setattr(MmadaAdapter, "ids", double.IDS)
    monkeypatch.setattr(MmadaAdapter, "marks", double.MARKS)
    double.model().save_pretrained(tmp_path)
    double.tokenizer().save_pretrained(tmp_path)
    made = captum_dcam.load(tmp_path, vq="some/vq", resolution=SIDE)
    assert isinstance(made, MmadaAdapter) and not hasattr(utils, "FLAX_WEIGHTS_NAME")
    forward = DenoisingForward(made, 1)
    forward.generate(made.prepare([[tiny.picture()]], ["what is this ?"]), **QUICK)
    assert torch.equal(forward.trajectory.tokens, bound().trajectory.tokens)


def test_a_missing_upstream_package_is_named_with_its_install_line(monkeypatch):
    monkeypatch.setitem(sys.modules, "models", None)
    monkeypatch.setitem(sys.modules, "diffusers.utils", ModuleType("diffusers.utils"))
    with pytest.raises(ImportError, match=r"git clone https://github\.com/Gen-Verse/MMaDA"):
        MmadaAdapter.load("some/where")
    monkeypatch.setitem(sys.modules, "models", ModuleType("models"))
    with pytest.raises(ImportError, match="another project's"):
        MmadaAdapter.load("some/where")
    with pytest.raises(WeightsError, match=r"MMaDA-8B-MixCoT"):
        MmadaAdapter.load()


def test_repairs_of_upstreams_classes():
    """transformers 5 calls ``tie_weights`` with arguments and reads ``all_tied_weights_keys``."""

    class Config:
        pass

    class Upstream:
        config_class = Config
        tied = 0

        def tie_weights(self):
            self.tied += 1

    for _ in range(2):  # repairing twice changes nothing more
        compat.repair_classes(Upstream)
    made = Upstream()
    made.tie_weights(missing_keys=set(), recompute_mapping=False)
    assert made.tied == 1 and made.all_tied_weights_keys == {} and Config.use_cache is False


# -- Lumina-DiMOO: rows that end in a newline ------------------------------------------------------


def rows(**options):
    parts = double.tokenizer(tags=double.TAGS), double.vq(rows=True)
    return checks.RowsAdapter(double.model(rows=True), parts, **{"resolution": SIDE, **options})


def test_rows_lie_between_the_text_and_its_last_id():
    made = rows()
    request = made.prepare([[tiny.picture(size=(130, 30))]], ["what is this ?"])
    (grid,) = request.layout.grids
    ids = made._packing.ids(request.pixels, request.extras[0])[0]
    start, newline, end, answer, _ = double.ROW_MARKS
    assert grid.positions.shape == (2, 8) and (ids[grid.positions] >= double.FIRST_CODE).all()
    assert (ids[grid.positions[:, -1] + 1] == newline).all()
    assert int(ids[grid.positions[0, 0] - 1]) == start
    tail = made._tokenizer("</user>")["input_ids"]
    assert ids[int(grid.positions[-1, -1]) + 2 :].tolist() == [end, *tail, answer]
    where, words = made.prompt_tokens(request)
    assert torch.equal(ids[where], words)
    said = request.dialogue[0].nonzero()[:, 0]
    assert made._tokenizer.decode(ids[said]).startswith("what is this")
    # the middle of the image: 130 × 30 scaled to 139 × 32, of which 128 pixels are seen
    assert grid.x_edges[0, 0] == pytest.approx(6 * 130 / 139) and grid.y_edges[-1, 1] == 30


def test_rectangles_of_so_many_patches():
    """All that hold no larger one, and the steps between them, against a walk down the stairs."""
    for patches in (1, 16, 100):
        walk, w, h = [], patches, 1
        while w:
            walk += [(w, h)] if max(w, h) <= 4 * min(w, h) else []
            w, h = (w, h + 1) if (h + 1) * w <= patches else (w - 1, h)
        assert sorted(walk) == packing.shapes(patches)


def test_a_given_answer_ends_as_its_own_do():
    made = rows()
    found = captum_dcam.explain(made, tiny.picture(), "what is this ?", answer="a red circle")
    assert [w.text for w in found.targets] == ["a", "red", "circle"]
    assert found.trajectory.tokens[0, -1] == double.ROW_MARKS[-1]
    assert (found.trajectory.states[0][:3, 0, -1] == double.ROW_MARKS[-1]).all()


def test_an_answer_ends_with_the_block_that_holds_its_end():
    made = rows()
    made.model.register_forward_hook(lambda _module, _args, out: _end(out))
    request = made.prepare([[tiny.picture()]], ["what is this ?"])
    found = DenoisingForward(made, 1).generate(request, gen_length=8, block_length=4, steps=4)
    assert found.steps == 2 and found.tokens[0].tolist() == [
        *[double.IDS.eos] * 8,
        double.ROW_MARKS[-1],
    ]


def _end(out):
    """Every token becomes EOS."""
    out.logits[..., double.IDS.eos] = 99.0


@pytest.mark.parametrize(
    ("options", "said"),
    (
        (dict(fit="squash"), "fit is 'squash': .*Lumina-DiMOO has crop alone"),
        (dict(resolution=48), "resolution is 48: expected a positive multiple of 32"),
    ),
)
def test_settings_of_rows_that_cannot_work(options, said):
    with pytest.raises(InputError, match=said):
        rows(**options)


def test_a_vq_model_of_the_other_kind():
    parts = double.tokenizer(tags=double.TAGS), double.vq()
    with pytest.raises(ProcessorError, match="upstream's VQModel"):
        checks.RowsAdapter(double.model(rows=True), parts)
