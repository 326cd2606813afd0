"""LaViDa-O beyond the conformance cases: sizes, the padded base view, its settings and errors."""

import sys

import pytest
import tiny
import torch
from doubles import lavida as plain
from doubles import lavida_o as double
from doubles import lavida_o_package
from doubles import llada_checks as checks

import captum_dcam
from captum_dcam.adapters.lavida import LavidaAdapter
from captum_dcam.adapters.lavida_o import LavidaOAdapter
from captum_dcam.errors import InfeasibleStepError, LayerError, WeightsError
from captum_dcam.model.forward import DenoisingForward

PROMPT = "what is this ?"
QUICK = dict(gen_length=8, block_length=4)
SIZE = (150, 100)


def adapter(cache="none", dtype=torch.float32, **config):
    parts = double.processor(config.get("tile", 104))
    return captum_dcam.wrap(double.model(dtype=dtype, **config), parts, cache=cache, system=None)


def bound(cache="none", layer=1, dtype=torch.float32, made=None, **settings):
    made = adapter(cache, dtype) if made is None else made
    forward = DenoisingForward(made, layer)
    request = made.prepare([[tiny.picture(0, SIZE)]], [PROMPT])
    forward.generate(request, **{**QUICK, **settings})
    return forward


# -- which family, which block ------------------------------------------------------------------


def test_the_two_families_of_one_class_name_are_told_apart():
    made = adapter()
    assert type(made) is LavidaOAdapter and LavidaOAdapter.claims({"dual_tower": True})
    assert not LavidaOAdapter.claims({}) and not LavidaAdapter.claims({"dual_tower": True})
    other = plain.model()
    assert type(captum_dcam.wrap(other, plain.processor(), system=None)) is LavidaAdapter
    with pytest.raises(TypeError, match="with dual_tower in its configuration"):
        LavidaOAdapter(other, plain.processor())
    with pytest.raises(LayerError, match="deepest usable block of lavida_o is 2"):
        DenoisingForward(made, 3)
    assert adapter(None).cache == "prefix"


# -- decoding -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "settings",
    (
        {"steps": 4},
        {"step_ratio": 0.5},
        {"schedule": "shift", "shift": 0.33},
        {"remasking": "entropy"},
        {"use_fast_dlm": True, "factor": None, "steps": 4},
        {"use_fast_dlm": True, "threshold": 0.02},
    ),
)
def test_answers_are_the_familys_own(settings):
    forward = bound(**settings)
    t, request, made = forward.trajectory, forward.request, forward.adapter
    own = {**QUICK, **settings}
    length, steps = own.pop("gen_length"), own.pop("steps", None)
    if "shift" in own:
        own["schedule_kwargs"] = {"shift": own.pop("shift")}
    if own.get("remasking") == "entropy":
        own["remasking"] = "entrophy"
    if own.get("use_fast_dlm"):
        own["steps"] = steps or length
        own.setdefault("factor", None)
    elif steps is not None:
        own["step_per_block"] = steps // 2
    out = made.model.generate(
        request.extras[0],
        max_new_tokens=length,
        mask_id=double.MASK,
        **made._packing.arguments(request.pixels, request.extras[1]),
        **own,
    )
    out = out[0] if isinstance(out, tuple) else out
    assert torch.equal(t.tokens, out[:, -8:])
    assert (t.states[0][:, 0] == double.MASK).sum(1).diff().lt(0).all()


def test_lengths_vary_by_step():
    t = bound(use_fast_dlm=True, factor=None, steps=8).trajectory
    whole = bound().request.layout.prefix_length + 8
    assert t.lengths == (whole, 4, 4, 4) * 2 and t.feasible == (0, 4)
    assert t.final_step.tolist() == [[4] * 4 + [7] * 4]
    assert bound("prefix").trajectory.lengths == (whole - 8, *[8] * 8)
    assert bound("prefix").trajectory.feasible == (0,)
    assert bound().trajectory.lengths == (whole,) * 8


def test_a_step_without_the_image_is_explained_through_its_cache():
    forward = bound(dtype=torch.float64, use_fast_dlm=True, factor=None, steps=8)
    late = next(p for p in range(8) if int(forward.trajectory.commit_step[0, p]) % 4)
    assert checks.against_differences(forward, late) < 1e-6
    with pytest.raises(InfeasibleStepError, match="has 4 tokens"):
        captum_dcam.explain_generation(forward, [0], step=1)
    for score in ("commit", "final", "teacher"):
        assert captum_dcam.explain_generation(forward, [0, 7], score=score).maps[1].any()


def test_checkpointing_is_off_during_use_and_on_again():
    forward = bound(use_fast_dlm=True)
    captum_dcam.explain_generation(forward, [0])
    assert forward.adapter.model.model.activation_checkpointing_strategy == "whole_layer"
    assert not tiny.hooks(forward)


# -- layout at the real sizes ---------------------------------------------------------------------

TABLE = {
    (1024, 1024): 871,
    (500, 375): 416,
    (640, 480): 709,
    (1920, 1080): 547,
}


@pytest.fixture(scope="module")
def big():
    # the published canvases; a square picture of one tile's size goes on the first, 384×768
    pins = [(384, 768), (768, 384), (768, 768), (1152, 384), (384, 1152)]
    made = adapter(tile=384, layers=2, image_grid_pinpoints=pins)
    inner = made.model.model
    with torch.no_grad():
        for part in (inner.vision_tower.conv, inner.vision_tower.mlp, inner.mm_projector):
            part.weight.zero_()
            part.bias.zero_()
        inner.vision_resampler.pool.weight.zero_()
        inner.vision_resampler.pool.bias.zero_()
        for c in (0, 1):
            inner.vision_tower.conv.weight[c, c] = 1 / 196
            inner.vision_resampler.pool.weight[c, c] = 1 / 4
            inner.mm_projector.weight[c, c] = 1
    return made


@pytest.mark.parametrize("size", checks.SIZES)
def test_ramps_come_out_where_the_boxes_say(big, size):
    request = big.prepare([[checks.ramps(size)]], [PROMPT])
    with torch.no_grad():
        embeds = big.embed(request.pixels, *request.extras).embeds
    assert embeds.shape[1] == request.layout.prefix_length
    found = checks.first_channels(embeds, request.layout)
    for grid, values in zip(request.layout.grids, found, strict=True):
        red, green = ((v + 1) / 2 for v in values)
        columns = (grid.x_edges[:, 0] >= 0) & (grid.x_edges[:, 1] <= size[0])
        rows = (grid.y_edges[:, 0] >= 0) & (grid.y_edges[:, 1] <= size[1])
        x = (grid.x_edges.mean(1) / size[0]).float()[columns]
        y = (grid.y_edges.mean(1) / size[1]).float()[rows]
        assert (red[rows][:, columns] - x).abs().max() < 0.03
        assert (green[rows][:, columns] - y[:, None]).abs().max() < 0.03


@pytest.mark.parametrize("size", TABLE)
def test_numbers_of_tokens(big, size):
    request = big.prepare([[checks.ramps(size)]], [PROMPT])
    text = len(request.extras[0][0]) - 1
    assert request.layout.prefix_length - text == TABLE[size]
    assert request.layout.shapes[0] == (13, 13)


def test_the_smallest_square_goes_on_two_tiles(big):
    request = big.prepare([[checks.ramps((384, 384))]], [PROMPT])
    assert request.pixels.shape == (1, 3, 3, 384, 384) and request.layout.shapes[1] == (14, 13)
    assert request.layout.prefix_length - len(request.extras[0][0]) + 1 == 365


def test_the_base_view_is_padded_or_stretched():
    model, parts = double.model(), double.processor()
    grids = {}
    for base in ("pad", "stretch"):
        made = LavidaOAdapter(model, parts, base=base, system=None)
        grids[base] = made.prepare([[tiny.picture(0, (200, 100))]], [PROMPT]).layout.grids[0]
    assert float(grids["pad"].y_edges[0, 0]) == -50 and float(grids["stretch"].y_edges[0, 0]) == 0
    with pytest.raises(ValueError, match="base is 'crop'"):
        LavidaOAdapter(model, parts, base="crop")


# -- bad input ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "message"),
    (
        ({"factor": 1.0}, "factor: of use_fast_dlm=True"),
        ({"use_fast_dlm": True, "factor": 1.0, "threshold": 0.5}, "give one"),
        ({"use_fast_dlm": True, "schedule": "shift"}, "schedule has no effect"),
        ({"use_fast_dlm": True, "remasking": "margin"}, "knows low_confidence and random"),
        ({"use_fast_dlm": True, "gen_length": 64, "block_length": 64}, "give shorter blocks"),
        ({"block_length": 3}, "not a multiple of block_length 3"),
        ({"temperature": 1.0}, "sampling needs a generator"),
    ),
)
def test_settings_that_cannot_work(settings, message):
    with pytest.raises(ValueError, match=message):
        bound(**settings)


def test_what_upstream_cannot_do():
    with pytest.raises(ValueError, match="runs the whole sequence at every block"):
        bound("prefix", use_fast_dlm=True)
    with pytest.raises(TypeError, match="unknown setting 'cfg_scale'"):
        bound(cfg_scale=1.0)


def test_upstream_imported_without_its_variable(monkeypatch):
    monkeypatch.setattr(double, "ALWASY_DO_2DPOOL", True)
    with pytest.raises(ValueError, match="NOT_ALWASY_DO_2DPOOL=1 when its package llava"):
        adapter()


def test_loading_without_what_it_needs(monkeypatch):
    with pytest.raises(WeightsError, match="no weights of its own"):
        LavidaOAdapter.load()
    monkeypatch.delenv("NOT_ALWASY_DO_2DPOOL", raising=False)
    with pytest.raises(ValueError, match="NOT_ALWASY_DO_2DPOOL=1 in the environment"):
        LavidaOAdapter.load("somewhere")
    monkeypatch.setenv("NOT_ALWASY_DO_2DPOOL", "1")
    monkeypatch.setitem(sys.modules, "llava.model.builder", None)
    with pytest.raises(ImportError, match="licence"):
        LavidaOAdapter.load("somewhere")


def test_a_checkpoint_goes_through_the_authors_builder(monkeypatch):
    seen = lavida_o_package.installed(monkeypatch)
    monkeypatch.setenv("NOT_ALWASY_DO_2DPOOL", "1")
    made = LavidaOAdapter.load("somewhere", dtype="float32", cache="none")
    assert made.cache == "none" and made.dtype == torch.float32 and not made.model.training
    assert seen == dict(path="somewhere", device_map="auto", torch_dtype="bfloat16")
    made = LavidaOAdapter.load("somewhere", dtype=torch.float16, device_map="cpu")
    assert {p.dtype for p in made.model.parameters()} == {torch.float16}
    assert seen == dict(path="somewhere", device_map="cpu", torch_dtype="float16")
    LavidaOAdapter.load("somewhere", device_map="cpu")
    assert seen["torch_dtype"] == "bfloat16"


def test_another_projects_package_is_in_front(monkeypatch):
    lavida_o_package.installed(monkeypatch)
    monkeypatch.setenv("NOT_ALWASY_DO_2DPOOL", "1")
    del sys.modules["llava.model.language_model.llava_llada"].generate_with_dual_cache
    with pytest.raises(ImportError, match="another project's is in front"):
        LavidaOAdapter.load("somewhere")


@pytest.mark.parametrize("missing", ("model.transformer.ln_f.weight", "model.mm_projector.0.bias"))
def test_a_checkpoint_with_holes(monkeypatch, missing):
    lavida_o_package.installed(monkeypatch, [missing, "model.gen_embedding.weight"])
    monkeypatch.setenv("NOT_ALWASY_DO_2DPOOL", "1")
    with pytest.raises(WeightsError, match=rf"lacks 1 of the model's tensors \({missing}"):
        LavidaOAdapter.load("somewhere")


def test_what_makes_pictures_is_not_missed(monkeypatch):
    block = "model.transformer.blocks.0.q_proj_vision.weight"
    names = [block, "model.vqvae.decoder.bias", "model.downsample_gen.weight"]
    lavida_o_package.installed(monkeypatch, names)
    monkeypatch.setenv("NOT_ALWASY_DO_2DPOOL", "1")
    assert LavidaOAdapter.load("somewhere").family == "lavida_o"
