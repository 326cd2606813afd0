"""Methods on autoregressive families: the rivals' own setting, and Diffusion-CAM beside them."""

import functools
import json
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))  # importlib mode does not

import made_ar
import tiny
from test_autoregressive_input import saved
from test_autoregressive_layout import colours, ramps

from captum_dcam.methods import METHODS, AttributionTask, method, method_names
from captum_dcam.methods.msea_arc import rescaled
from captum_dcam.model.forward import single
from captum_dcam.model.words import Target

every = pytest.mark.parametrize("kind", made_ar.KINDS)
both = pytest.mark.parametrize("cache", ("prefix", "none"))
RIVALS = (
    "attention",
    "cp_lrp",
    "attn_lrp",
    "tam",
    "msea_arc",
    "llava_cam",
    "diffusion_cam",
    "integrated_gradients",
    "occlusion",
)
OTHERS = tuple(
    n for n in method_names() if n not in RIVALS and "grad-cam" not in METHODS[n].facts.needs
)
#: a mask that nothing speaks for stays whole
DARK = ("igos_pp",)
QUICK = {
    "eagle": {"regions": 4, "batch_size": 32},
    "igos_pp": {"size": 4, "points": 1, "steps": 1, "l1": 0.0},
    "llm_attribution": {"regions": 4},
    "kernel_shap": {"samples": 12, "patch": 2},
    "lime": {"samples": 12, "patch": 2},
    "llava_cam": {"samples": 2},
    "occlusion": {"patch": 2, "stride": 2},
    "shapley_value_sampling": {"permutations": 1},
    "integrated_gradients": {"steps": 2},
    "layer_integrated_gradients": {"steps": 2},
    "layer_conductance": {"steps": 2},
    "internal_influence": {"steps": 2},
    "gradient_shap": {"samples": 2},
    "layer_gradient_shap": {"samples": 2},
    "noise_tunnel": {"samples": 2},
}


def task_of(forward):
    last = forward.trajectory.tokens.shape[1] - 1
    pairs = zip((0, last // 2, last), (7, 12, 257), strict=True)
    return AttributionTask(forward, tuple(Target(str(p), (p,), (t,)) for p, t in pairs))


def state(forward):
    model = forward.adapter.model
    return (
        tiny.hooks(model),
        [p.requires_grad for p in model.parameters()],
        [p.grad is None for p in model.parameters()],
        float(forward.request.pixels.double().sum()),
        torch.random.get_rng_state().tolist(),
        getattr(model.model, "rope_deltas", None),
    )


def check(name, forward):
    task = task_of(forward)
    before = state(forward)
    chosen = method(name, **QUICK.get(name, {}))
    assert "AR" in chosen.facts.runs_on
    chosen.check(task)
    found = chosen.attribute(task)
    assert bool(found.done.all()), found.note
    for maps, shape in zip(found.maps, task.shapes, strict=True):
        assert maps.shape == (3, *shape) and bool(maps.isfinite().all())
    everything = torch.cat([m.flatten(1) for m in found.maps], 1)
    lit = [bool(m.any()) for m in everything]
    assert any(lit) if name in DARK else all(lit)
    if not chosen.facts.target_blind:
        assert not torch.equal(everything[0], everything[1])
    if chosen.facts.text:
        assert found.text is not None and bool(found.text.nan_to_num().any())
    assert state(forward) == before


@every
@both
@pytest.mark.parametrize("name", RIVALS)
def test_rivals_and_ours(kind, cache, name):
    check(name, made_ar.shared(kind, cache))


@pytest.mark.parametrize("name", OTHERS)
def test_every_other_method(name):
    for kind, cache in (("qwen3_vl", "prefix"), ("llava", "none")):
        check(name, made_ar.shared(kind, cache))


@functools.cache
def several(kind):
    pictures = {
        "qwen2_5_vl": [made_ar.video(3), made_ar.picture(2)],
        "llava": [made_ar.picture(1, (60, 40)), made_ar.picture(2, (40, 70))],
        "internvl": [made_ar.picture(1, (96, 32))],
    }
    return made_ar.bound(kind, length=3, pictures=[pictures[kind]])


@pytest.mark.parametrize("kind", ("qwen2_5_vl", "llava", "internvl"))
@pytest.mark.parametrize("name", RIVALS)
def test_videos_several_pictures_crops_and_tiles(kind, name):
    check(name, several(kind).again())


@every
@both
def test_the_relevance_of_all_tokens_is_the_logit(kind, cache):
    """CP-LRP conserves relevance where blocks have no bias; Qwen2's have."""
    forward = made_ar.bound(kind, cache, layer=2, length=3)
    for name, p in forward.adapter.model.named_parameters():
        if "language_model.layers" in name and name.endswith("bias"):
            p.data.zero_()
    forward.generate(forward.request, max_new_tokens=3)
    task = task_of(forward)
    from captum_dcam.methods.relevance import CPRules, Relevance

    relevance = Relevance(task, 2, CPRules)
    for target in task.targets:
        (position,), (token,) = target.positions, target.token_ids
        step = torch.tensor([task.step(position)])
        with torch.no_grad():
            logit = float(forward.replay(torch.tensor([0]), step)[0, position, token])
        assert float(relevance.of(position, token).sum()) == pytest.approx(logit, rel=1e-3)


@every
@both
def test_attention_is_the_familys_own(kind, cache):
    forward = made_ar.bound(kind, cache, length=3)
    model, request = forward.adapter.model, forward.request
    task = task_of(forward)
    found = method("attention").attribute(task)
    tokens = forward.trajectory.tokens
    inputs = forward.adapter._inputs(
        request.pixels,
        (
            torch.cat((request.extras[0], tokens), 1),
            torch.ones(1, request.layout.prefix_length + 3, dtype=torch.long),
            *request.extras[2:],
        ),
    )
    model.set_attn_implementation("eager")
    with torch.no_grad():
        weights = model(**inputs, use_cache=False, output_attentions=True).attentions
    model.set_attn_implementation("sdpa")
    mean = torch.stack([w[0].mean(0) for w in weights]).mean(0)
    grid = request.layout.grids[0].positions
    for n, position in enumerate((0, 1, 2)):
        row = mean[request.layout.prefix_length + position - 1]
        assert tiny.relative(found.maps[0][n], row[grid]) < 1e-4


@every
def test_a_word_out_of_a_batch(kind):
    forward = made_ar.bound(kind, prompts=("what is red ?", "a"), length=3)
    alone = single(forward, 1)
    assert alone.request.prompts == ("a",)
    check("msea_arc", alone)


@pytest.mark.parametrize(
    ("kind", "size"),
    (
        ("llava", (60, 40)),
        ("llava", (40, 90)),
        ("internvl", (40, 40)),
        ("internvl", (96, 32)),
        ("internvl", (200, 200)),
        ("qwen2_vl", (48, 32)),
    ),
)
@pytest.mark.parametrize("scale", (0.5, 0.8))
def test_maps_of_another_scale_come_back_to_their_places(kind, size, scale):
    """What tokens saw of a coordinate ramp, before and after."""
    forward = made_ar.bound(kind, pictures=[[ramps(size)]], length=2)
    other, back = rescaled(forward, scale)
    own = colours(forward.adapter, forward.request)
    new = colours(forward.adapter, other.request)
    inner = torch.cat(
        [torch.nn.functional.pad(torch.ones(h - 2, w - 2), (1, 1, 1, 1)).flatten() > 0
         for h, w in forward.request.layout.shapes]
    )  # fmt: skip
    for channel in range(2):
        found = back.of(new[:, channel])
        # half a cell of the smallest grid at the smallest scale
        assert float((found - own[:, channel]).abs()[inner].max()) < 0.5 / (4 * scale)


# -- command line ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "cache"), (*((k, "prefix") for k in made_ar.KINDS), ("qwen2_5_vl", "none"))
)
def test_explain_and_compare_on_a_folder(kind, cache, tmp_path):
    """``compare`` on a kind for each cache: it loads as ``explain`` does."""
    from typer.testing import CliRunner

    from captum_dcam.cli.app import app

    folder = saved(kind, tmp_path / "model")
    picture = tmp_path / "picture.png"
    made_ar.picture(0, (48, 36)).save(picture)
    common = [str(picture), "--prompt", "what is red ?", "--model", str(folder)]
    common += ["--cache", cache, "--gen-length", "2", "--json", "--words", "all"]
    ran = CliRunner().invoke(app, ["explain", *common, "-o", str(tmp_path / "a")])
    assert ran.exit_code == 0, ran.output
    assert json.loads(ran.stdout)
    if (kind, cache) in (("llava", "prefix"), ("qwen2_5_vl", "none")):
        names = "diffusion_cam,tam,attention,llava_cam"
        out = ["-o", str(tmp_path / "b"), "--methods", names]
        ran = CliRunner().invoke(app, ["compare", *common, *out])
        assert ran.exit_code == 0, ran.output
        assert json.loads(ran.stdout)


def test_explain_asks_a_sampled_answer_of_its_seed(tmp_path):
    from typer.testing import CliRunner

    from captum_dcam.cli.app import app

    folder = saved("llava", tmp_path / "model")
    picture = tmp_path / "picture.png"
    made_ar.picture(0).save(picture)
    answers = []
    for seed in ("1", "1", "2"):
        out = tmp_path / "out"
        ran = CliRunner().invoke(
            app,
            ["explain", str(picture), "--prompt", "a", "--model", str(folder), "--gen-length", "3",
             "--temperature", "2", "--seed", seed, "--json", "-o", str(out), "--words", "all"],
        )  # fmt: skip
        assert ran.exit_code == 0, ran.output
        answers.append(json.loads(ran.stdout)["answer"])
    assert answers[0] == answers[1] != answers[2]
