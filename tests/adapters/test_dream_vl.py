"""Dream-VL against a double of our own: replay, gradients, feasible steps, layout, errors."""

import types

import numpy as np
import pytest
import tiny
import torch
from doubles import dream_vl as double
from doubles import dream_vl_checks as suite
from doubles.gradients import fd
from PIL import Image

import captum_dcam
from captum_dcam.adapters.dream_vl import DreamVLAdapter, compat
from captum_dcam.errors import (
    InputError,
    LayerError,
    MethodError,
    RemoteCodeError,
    SettingError,
    WeightsError,
)
from captum_dcam.methods import AttributionTask, method
from captum_dcam.model.forward import DenoisingForward, single
from captum_dcam.model.gradients import target_gradients
from captum_dcam.model.hub import families, family_of
from captum_dcam.model.trajectory import Given
from captum_dcam.model.words import Target

pytest.importorskip("transformers", minversion="4.46")  # no other has what the family is built on


def adapter(dtype=torch.float32, **changes):
    return captum_dcam.wrap(double.model(dtype=dtype, **changes), double.processor())


def bound(layer=1, dtype=torch.float32, pictures=None, prompts=None, keep=True, **settings):
    made = adapter(dtype)
    forward = DenoisingForward(made, layer)
    pictures = pictures or [[tiny.picture(size=(84, 56))]]
    request = made.prepare(pictures, prompts or ["what is this"] * len(pictures))
    forward.generate(request, keep=keep, **{**suite.QUICK, **settings})
    return forward


def logits_and_leaf(forward, pair):
    """Raw logits (L, V) in a token's state, and the tapped block's output (1, L, D), a leaf."""
    model, kept = forward.adapter.model, {}

    def cut(_module, _args, out):
        kept["leaf"] = out[0].detach().requires_grad_()
        return (kept["leaf"], *out[1:])

    def note(_module, _args, out):
        kept["logits"] = out[0]

    handles = [
        forward.adapter.blocks[forward.layer].register_forward_hook(cut),
        model.lm_head.register_forward_hook(note),
    ]
    forward(forward.request.pixels, *forward.arguments(pair, "commit"))
    for handle in handles:
        handle.remove()
    return kept["logits"], kept["leaf"]


def target(forward, position):
    return Target("x", (position,), (int(forward.trajectory.tokens[0, position]),))


# -- 1. trajectory and replay ---------------------------------------------------------------------


@pytest.mark.parametrize("keep", (True, False))
@pytest.mark.parametrize("images", (1, 2))
@pytest.mark.parametrize(
    "settings",
    (
        {},
        {"steps": 3, "alg": "entropy"},
        {"alg": "topk_margin", "max_new_tokens": 3},
        {"max_new_tokens": 1, "steps": 1},
    ),
)
def test_trajectory_and_replay_have_the_bits_of_the_familys_history(keep, images, settings):
    sizes = ((84, 56), (56, 112))[:images]
    pictures = [[tiny.picture(i, s) for i, s in enumerate(sizes)]]
    forward = bound(pictures=pictures, keep=keep, **settings)
    suite.check_against_history(forward, settings)


def test_the_first_step_can_fill_nothing():
    t = bound(max_new_tokens=3, steps=4).trajectory
    assert [int((t.commit_step == s).sum()) for s in range(4)] == [0, 0, 1, 2]
    assert torch.equal(t.states[0][0], t.states[0][1])


def test_what_is_explained_is_the_shifted_row():
    """Position p is predicted by the output at p - 1: the hidden state there, put through the
    head, is the logit that the adapter gives."""
    forward = bound(keep=False)
    made, prefix = forward.adapter, forward.request.layout.prefix_length
    seen = []
    handle = made.blocks[-1].register_forward_hook(lambda _m, _a, out: seen.append(out[0]))
    with torch.no_grad():
        logits = forward.replay(torch.tensor([0]), torch.tensor([2]))
        raw = made.unembed(seen[0])
    handle.remove()
    for p in range(6):
        assert made.query_position(forward.request.layout, p) == prefix + p - 1
        assert torch.allclose(logits[0, p], raw[0, prefix + p - 1], atol=1e-6)


@pytest.mark.parametrize("settings", ({"alg": "origin"}, {"temperature": 2.0}))
def test_sampled_generations_are_reproducible(settings):
    def draw(seed):
        state = torch.random.get_rng_state()
        t = bound(generator=torch.Generator().manual_seed(seed), **settings).trajectory
        assert torch.equal(torch.random.get_rng_state(), state)
        return t

    one, again, other = draw(1), draw(1), draw(2)
    assert torch.equal(one.tokens, again.tokens) and torch.equal(one.states[0], again.states[0])
    assert not torch.equal(one.states[0], other.states[0])
    mask = one.states[0] == one.states[0][0, 0, 0]
    assert torch.equal(mask.sum(0) - 1, one.commit_step)


# -- 2. gradients ---------------------------------------------------------------------------------


@pytest.mark.parametrize("layer", range(3))
@pytest.mark.parametrize("images", (1, 2))
def test_gradients_are_finite_differences_at_every_usable_block(layer, images):
    pictures = [[tiny.picture(i, (84, 56)) for i in range(images)]]
    forward = bound(layer, torch.float64, pictures)
    if images == 1:
        for position, score in ((0, "commit"), (5, "commit"), (2, "final"), (3, "teacher")):
            fd(forward, position, score)
    else:
        (row,) = target_gradients(forward, [target(forward, 0)])
        assert len(row.gradients) == 2 and all(g.any() for g in row.gradients)


def test_the_last_block_is_refused():
    with pytest.raises(LayerError, match="deepest usable block of dream_vl is 2"):
        DenoisingForward(adapter(), 3)


def test_pixels_have_gradients_through_the_tower():
    forward = bound(1, torch.float64, keep=False)
    pixels = forward.request.pixels.clone().requires_grad_()
    args = forward.arguments((1, 7))
    (gradient,) = torch.autograd.grad(forward(pixels, *args)[0, 1, 7], pixels)
    direction = torch.randn(pixels.shape, generator=torch.Generator().manual_seed(0)).double()
    with torch.no_grad():
        up, down = (forward(pixels + s * 1e-5 * direction, *args)[0, 1, 7] for s in (1, -1))
    assert float((up - down) / 2e-5) == pytest.approx(float((gradient * direction).sum()), rel=1e-4)


def test_lens_and_grad_cam_are_the_models_own_logits_and_gradients():
    """Every example of a batch: logits of the whole sequence as the head gives them."""
    pictures = [[tiny.picture(b, (84, 56))] for b in (0, 1)]
    both = bound(1, torch.float64, pictures, ["what is this", "what is this red circle"])
    for b in (0, 1):
        forward = single(both, b)
        words = (Target("x", (1,), (7,)), Target("y", (4, 5), (11, 7)))
        task = AttributionTask(forward, words)
        lens, cam = (method(n).attribute(task) for n in ("logit_lens", "layer_grad_cam"))
        layout, made = forward.request.layout, forward.adapter
        grid, prompt = layout.grids[0].positions, made.prompt_tokens(forward.request)[0].tolist()
        places = [*prompt, *(layout.prefix_length + p - 1 for p in range(6))]
        for n, word in enumerate(words):
            image, text, maps = 0, 0, 0
            for p, token in zip(word.positions, word.token_ids, strict=True):
                logits, hidden = logits_and_leaf(forward, (p, token))
                row = layout.prefix_length + p - 1
                (gradient,) = torch.autograd.grad(logits[row, token], hidden)
                image = image + logits[grid, token].detach()
                text = text + logits[places, token].detach()
                f, g = hidden.detach()[0, grid], gradient[0, grid]
                maps = maps + (f * g.mean((0, 1))).sum(-1)
            assert tiny.relative(lens.maps[0][n], image) < 1e-5
            assert tiny.relative(lens.text[n], text) < 1e-5
            assert maps.any() and tiny.relative(cam.maps[0][n], maps) < 1e-5


# -- 3. feasible steps ----------------------------------------------------------------------------


def test_every_step_holds_the_pictures():
    forward = bound(max_new_tokens=20, steps=5)
    t, layout = forward.trajectory, forward.request.layout
    assert t.lengths == (layout.prefix_length + 20,) * 5
    assert t.feasible == tuple(range(5)) and t.valid_ratio == 1
    for step in t.feasible:
        (row,) = target_gradients(forward, [target(forward, 0)], call=step)
        assert row.gradients[0].any()


# -- 4. layout ------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", suite.SIZES)
def test_pixels_know_where_their_token_lies(size):
    suite.check_ramps(adapter(), size)


@pytest.mark.parametrize("size", suite.SIZES)
def test_a_bright_patch_comes_out_at_the_right_token_and_back_at_its_place(size):
    width, height = size
    made = adapter()
    plain = Image.new("RGB", size)
    (grid,) = made.prepare([[plain]], ["what"]).layout.grids
    h, w = grid.shape
    cell = (h - 1, w // 2)
    x0, y0, x1, y1 = grid.box(*cell)
    box = [round(v) for v in (x0, y0, max(x1, x0 + 1), max(y1, y0 + 1))]
    plain.paste((255, 255, 255), tuple(box))
    request = made.prepare([[plain]], ["what"])
    owners = made.pixel_tokens(request).expand_as(request.pixels)
    light = torch.stack([request.pixels[owners == k].mean() for k in range(h * w)])
    assert divmod(int(light.argmax()), w) == cell
    back = grid.to_pixels(light.view(h, w) - light.min())
    row, column = divmod(int(back.argmax()), width)
    assert abs(column + 0.5 - (x0 + x1) / 2) <= x1 - x0
    assert abs(row + 0.5 - (y0 + y1) / 2) <= y1 - y0
    assert back.shape == (height, width)


def test_grids_have_the_published_size():
    """480 × 640 becomes 476 × 644: 17 × 23 tokens."""

    class Large(double.ImageProcessor):
        size = staticmethod(lambda width, height: (round(width / 28) * 28, round(height / 28) * 28))

    made = DreamVLAdapter(
        double.model(max_position_embeddings=1000),
        types.SimpleNamespace(tokenizer=double.tokenizer(), image_processor=Large()),
    )
    (grid,) = made.prepare([[Image.new("RGB", (640, 480))]], ["what"]).layout.grids
    assert grid.shape == (17, 23)
    assert grid.box(2, 3) == pytest.approx(
        (84 * 640 / 644, 56 * 480 / 476, 112 * 640 / 644, 84 * 480 / 476)
    )


def test_two_pictures_in_one_run_are_split_by_their_grids():
    made = adapter()
    pictures = [tiny.picture(0, (84, 56)), tiny.picture(1, (56, 112))]
    request = made.prepare([pictures], ["what is this"])
    ids = request.extras[0][0]
    at = (ids == made.model.config.image_token_id).nonzero()[:, 0]
    assert torch.equal(at, torch.arange(int(at[0]), int(at[0]) + 6 + 8))  # one run
    one, two = request.layout.grids
    assert (one.shape, two.shape) == ((2, 3), (4, 2)) and (one.image, two.image) == (0, 1)
    assert torch.equal(torch.cat((one.positions.flatten(), two.positions.flatten())), at)
    assert one.image_size == (56, 84) and two.image_size == (112, 56)
    # each grid holds its own picture's features
    with torch.no_grad():
        memory = made.embed(request.pixels, *request.extras)
        for picture, grid in zip(pictures, (one, two), strict=True):
            alone = made.prepare([[picture]], ["what is this"])
            own = made.embed(alone.pixels, *alone.extras).embeds[0]
            expected = own[alone.layout.grids[0].positions.flatten()]
            assert tiny.relative(memory.embeds[0, grid.positions.flatten()], expected) < 1e-5


def test_a_video_has_a_grid_a_pair_of_frames():
    frames = [tiny.picture(i, (84, 56)) for i in range(3)]
    forward = bound(pictures=[[frames]])
    grids = forward.request.layout.grids
    assert [g.image for g in grids] == [0, 2] and all(g.shape == (2, 3) for g in grids)
    suite.check_against_history(forward, {})
    again = forward.adapter.prepare_again(forward.request, forward.request.images[0])
    assert torch.equal(again.pixels, forward.request.pixels)


# -- 5. batches, prompts --------------------------------------------------------------------------


def test_a_batch_is_its_examples_one_by_one():
    suite.check_batch(bound)


def test_an_answer_of_a_batch_does_not_depend_on_its_neighbours():
    """Upstream ranks the positions of all examples together: another answer."""
    pictures = [[tiny.picture(i, (84, 56))] for i in range(2)]
    forward = bound(pictures=pictures)
    counts = [(forward.trajectory.commit_step == s).sum(1).tolist() for s in range(4)]
    assert counts == [[1, 1], [1, 1], [1, 1], [3, 3]]


def test_an_empty_prompt_and_an_answer_of_one_token():
    forward = bound(prompts=[""], max_new_tokens=1, steps=1)
    (row,) = target_gradients(forward, [target(forward, 0)])
    assert row.gradients[0].any()


def test_prompts_are_in_the_familys_format():
    made = adapter()
    tokenizer = double.tokenizer()
    conversation = [
        {"role": "user", "content": "what is this"},
        {"role": "assistant", "content": "a red circle"},
        {"role": "user", "content": "left or right"},
    ]
    start = "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n"
    picture = "<|image_pad|>" * 6
    end = "<|im_end|>\n<|im_start|>assistant\n"
    for prompt, text in (
        ("what is this", f"{start}{picture}what is this{end}"),
        (
            conversation,
            f"{start}{picture}what is this{end}a red circle<|im_end|>\n<|im_start|>user\n"
            f"left or right{end}",
        ),
    ):
        expected = tokenizer(text, add_special_tokens=False)["input_ids"]
        for template in (double.TEMPLATE, None):
            parts = types.SimpleNamespace(
                tokenizer=tokenizer,
                image_processor=double.ImageProcessor(),
                chat_template=template,
            )
            made = DreamVLAdapter(made.model, parts)
            made._template = template
            request = made.prepare([[tiny.picture(size=(84, 56))]], [prompt])
            assert request.extras[0][0].tolist() == expected
    positions, ids = made.prompt_tokens(request)
    assert torch.equal(request.extras[0][0][positions], ids)
    assert "red circle" in "".join(made.token_texts(ids.tolist()))
    assert made.token_texts(made.encode("a red circle")) == ["a", " red", " circle"]
    assert made.mask_id in made.stop_ids and made.model.config.pad_token_id in made.stop_ids


# -- 6. nothing is left behind, bad input ---------------------------------------------------------


@pytest.mark.parametrize("fails", (False, True))
def test_nothing_is_left_behind(fails):
    made = adapter()
    made.model.train()
    request = made.prepare([[tiny.picture(size=(84, 56))]], ["what is this"])
    before = suite.left(made)
    forward = DenoisingForward(made, 1)
    options = {**suite.QUICK, "alg": "origin", "generator": torch.Generator().manual_seed(0)}
    if fails:
        handle = made.blocks[-1].register_forward_hook(lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            forward.generate(request, **options)
        handle.remove()
    else:
        forward.generate(request, **options)
        target_gradients(forward, [target(forward, 0)])
    assert suite.left(made) == before


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    (
        ({"use_cache": True}, ValueError, "prompt cache fails at the second step"),
        ({"block_length": 3}, TypeError, "Known: max_new_tokens"),
        ({"gen_length": 8}, ValueError, "mean the same"),
        ({"max_new_tokens": 0}, ValueError, "at least 1"),
        ({"steps": 0}, ValueError, "at least 1"),
        ({"alg": "best"}, ValueError, "expected one of"),
        ({"alg": "origin"}, ValueError, "generator"),
        ({"temperature": 1.0}, ValueError, "generator"),
        ({"temperature": -1.0}, ValueError, "0 or more"),
        ({"top_k": 0}, ValueError, "at least 1"),
        ({"top_p": 2.0}, ValueError, "share in"),
        ({"eps": 1.0}, ValueError, "between 0 and 1"),
    ),
)
def test_settings_that_cannot_work(settings, error, message):
    with pytest.raises(error, match=message):
        bound(**settings)


def test_input_that_cannot_work():
    made = adapter()
    with pytest.raises(ValueError, match="no image"):
        made.prepare([[]], ["what"])
    with pytest.raises(ValueError, match="context is 256"):
        made.prepare([[tiny.picture()]], [" what" * 300])
    with pytest.raises(ValueError, match="lie at different places"):
        made.prepare([[tiny.picture(size=(84, 56))], [tiny.picture(size=(56, 84))]], ["x", "x"])
    with pytest.raises(ValueError, match="do not fit"):
        DreamVLAdapter(double.model(image_token_id=3), double.processor())
    with pytest.raises(TypeError, match="without image_processor"):
        DreamVLAdapter(made.model, types.SimpleNamespace(tokenizer=double.tokenizer()))


def test_remote_code_is_refused_unless_it_is_allowed(tmp_path):
    double.model().save_pretrained(tmp_path)
    for load in (captum_dcam.load, DreamVLAdapter.load):
        with pytest.raises(RemoteCodeError, match="trust_remote_code=True"):
            load(str(tmp_path))
    with pytest.raises(WeightsError, match="Dream-VL-7B"):
        DreamVLAdapter.load()
    with pytest.raises(WeightsError, match="cannot be loaded"):
        DreamVLAdapter.load(str(tmp_path / "nothing"), trust_remote_code=True)


# -- repairs for new versions of transformers -----------------------------------------------------


def test_names_that_transformers_moved_are_there_inside_the_context_only():
    from transformers import image_utils
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    before = hasattr(image_utils, "VideoInput"), "default" in ROPE_INIT_FUNCTIONS
    with compat.importable():
        assert image_utils.VideoInput is not None
        config = types.SimpleNamespace(
            hidden_size=48, num_attention_heads=3, rope_theta=100.0, rope_scaling=None
        )
        if not before[1]:
            found, scaling = ROPE_INIT_FUNCTIONS["default"](config, None)
            expected = 100.0 ** (-np.arange(0, 16, 2) / 16)
            assert scaling == 1.0 and np.allclose(found.numpy(), expected)
    after = hasattr(image_utils, "VideoInput"), "default" in ROPE_INIT_FUNCTIONS
    assert after == before


def test_a_method_that_transformers_changed_is_replaced_inside_the_context_only(monkeypatch):
    from transformers.generation.utils import GenerationMixin

    name, made = "_expand_inputs_for_generation", double.model()
    for own, replaced in ((lambda self, **_: None, True), (staticmethod(lambda **_: None), False)):
        monkeypatch.setattr(GenerationMixin, name, own)
        with compat.callable_generate(made):
            assert (name in vars(made)) is replaced
            if replaced:
                assert getattr(made, name)(expand_size=1, input_ids=3, x=4) == (3, {"x": 4})
                with pytest.raises(ValueError, match="expected 1"):
                    getattr(made, name)(expand_size=2)
        assert name not in vars(made)


def test_upstreams_classes_are_repaired():
    class Upstream(double.DreamVLModel):
        _tied_weights_keys = ["lm_head.weight"]  # noqa: RUF012  as upstream has it

    compat.repair_classes(Upstream)
    config = double.DreamVLGenerationConfig
    try:
        if isinstance(Upstream._tied_weights_keys, dict):  # transformers 5
            assert config().validate(user_set_attributes=set()) is None
    finally:
        if "validate" in vars(config):
            del config.validate


# -- Dimple ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "said"),
    (
        (dict(use_cache=True), "Dimple's prompt cache keeps what the first step computed"),
        (dict(eos_penalty=1.0), "unknown setting 'eos_penalty' of Dimple"),
        (dict(alg="origin"), "sampling needs a generator"),
        (dict(decoding_pipeline="dimmer"), "decoding_pipeline is 'dimmer'"),
    ),
)
def test_settings_of_dimple(given, said):
    made = captum_dcam.wrap(double.model(dimple=True), double.processor(dimple=True))
    request = made.prepare([[tiny.picture(0, (84, 56))]], ["what is this"])
    with pytest.raises((InputError, SettingError), match=said):
        made.generate(request, **{"max_new_tokens": 4, **given})
    assert not made.takes_video and made.prepare([[tiny.picture(0, (84, 56))]], ["what"])


def test_dimple_takes_no_given_tokens():
    made = captum_dcam.wrap(double.model(dimple=True), double.processor(dimple=True))
    request = made.prepare([[tiny.picture(size=(56, 56))]], ["what is it ?"])
    tokens = torch.zeros(1, 4, dtype=torch.long)
    with pytest.raises(MethodError, match="Dimple cannot fill the holes"):
        made.generate(request, given=Given(tokens, tokens == 0), max_new_tokens=4)


@pytest.mark.parametrize("kind", ("dream-vl", "dream-vla", "dimple"))
def test_checkpoints_are_found_by_their_type(kind):
    assert family_of("some/model", {"model_type": kind}, families()) == "dream_vl"
