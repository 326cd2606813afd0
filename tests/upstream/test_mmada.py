"""MMaDA's adapter on tiny random instances of the upstream code.

``CAPTUM_DCAM_UPSTREAM_MMADA=/folder/MMaDA pytest tests/upstream/test_mmada.py`` (with what
upstream imports installed: the error names it); skipped without the variable.
"""

import sys

import pytest
import tiny
import torch
from doubles import mmada as double
from doubles import mmada_checks as suite
from doubles.gradients import fd
from PIL import Image
from upstream import made_mmada as real
from upstream.commands import explained_and_compared

import captum_dcam
from captum_dcam.errors import LayerError, MethodError
from captum_dcam.methods import AttributionTask, method
from captum_dcam.model.forward import DenoisingForward, single
from captum_dcam.model.gradients import target_gradients
from captum_dcam.model.words import Target

pytestmark = pytest.mark.skipif(
    real.FOLDER is None, reason="CAPTUM_DCAM_UPSTREAM_MMADA names no checkout of Gen-Verse/MMaDA"
)
QUICK = suite.QUICK


@pytest.fixture(scope="module")
def upstream():
    return real.package()


@pytest.fixture(scope="module")
def vq(upstream):
    return real.vq(upstream)


def bound(upstream, vq, layer=1, dtype=torch.float32, batch=1, prompts=None, **settings):
    made = real.adapter(upstream, vq, dtype)
    forward = DenoisingForward(made, layer)
    pictures = [[tiny.picture(b)] for b in range(batch)]
    request = made.prepare(pictures, prompts or ["what is this ?"] * batch)
    forward.generate(request, **{**QUICK, **settings})
    return forward


def reference(forward, **settings):
    found = suite.reference(forward.adapter, forward.request, {**QUICK, **settings})
    return found.tokens, list(found.canvases), found.logits


@pytest.mark.parametrize(
    "settings",
    (
        {},
        {"max_new_tokens": 16, "block_length": 8, "steps": 6},
        {"cfg_scale": 1.5},
        {"max_new_tokens": 1, "block_length": 1, "steps": 1},
    ),
)
def test_trajectory_and_replay_have_upstreams_bits(upstream, vq, settings):
    forward = bound(upstream, vq, **settings)
    t = forward.trajectory
    answer, canvases, logits = reference(forward, **settings)
    assert torch.equal(t.tokens, answer)
    assert torch.equal(t.states[0], torch.stack(canvases))
    for step, expected in enumerate(logits):
        with torch.no_grad():
            got = forward.replay(torch.tensor([0]), torch.tensor([step]))
        assert torch.equal(got, expected)
    with torch.enable_grad():
        got = forward.replay(torch.tensor([0]), torch.tensor([0]))
    assert torch.equal(got.detach(), logits[0])
    assert t.feasible == tuple(range(t.steps))
    if "steps" in settings and settings["steps"] == 6:
        counts = [int((t.commit_step == s).sum()) for s in range(6)]
        assert counts == [3, 3, 2, 3, 3, 2]


@pytest.mark.parametrize("settings", ({}, {"cfg_scale": 1.5}))
@pytest.mark.parametrize("layer", range(3))
def test_gradients_are_finite_differences(upstream, vq, layer, settings):
    with real.exact():
        forward = bound(upstream, vq, layer, torch.float64, **settings)
        fd(forward, 0, "commit")
        fd(forward, 7, "final")


def test_the_last_block_is_refused_and_pixels_have_no_gradient(upstream, vq):
    with pytest.raises(LayerError, match="deepest usable block of mmada is 2"):
        DenoisingForward(real.adapter(upstream, vq), 3)
    task = AttributionTask(single(bound(upstream, vq)), (Target("x", (1,), (7,)),))
    with pytest.raises(MethodError, match="VQ encoder"):
        method("saliency").attribute(task)
    for name in ("diffusion_cam", "attention", "occlusion"):
        maps = method(name).attribute(task).maps[0]
        assert maps.shape == (1, 4, 4) and maps.any()


@pytest.mark.parametrize("size", suite.SIZES)
@pytest.mark.parametrize("fit", ("crop", "squash"))
def test_pixels_are_those_of_upstreams_transforms(size, fit):
    """Bit for bit, where torchvision is there."""
    pytest.importorskip("torchvision")
    sys.path.insert(0, real.FOLDER)
    try:
        from training import utils
    except ImportError as error:
        pytest.skip(f"upstream's training package: {error}")
    finally:
        sys.path.remove(real.FOLDER)
    from captum_dcam.adapters.mmada.packing import fitted

    picture = tiny.picture(size=size)
    own = utils.image_transform if fit == "crop" else utils.image_transform_squash
    assert torch.equal(fitted(picture, 64, fit)[0], own(picture, resolution=64))


def test_a_bright_patch_changes_codes_around_its_token(upstream, vq):
    made = real.adapter(upstream, vq)
    for size in suite.SIZES[:5]:
        plain = Image.new("RGB", size)
        request = made.prepare([[plain]], ["what"])
        (grid,) = request.layout.grids
        dark = vq.get_code(request.pixels)[0]
        x0, y0, x1, y1 = (round(v) for v in grid.box(2, 1))
        plain.paste((255, 255, 255), (x0, y0, max(x1, x0 + 1), max(y1, y0 + 1)))
        lit = vq.get_code(made.prepare([[plain]], ["what"]).pixels)[0]
        assert (lit != dark).view(4, 4)[2, 1]


def test_batches_have_upstreams_bits(upstream, vq):
    forward = bound(upstream, vq, batch=2, prompts=["what is this ?", "is this a circle"])
    answer, _, logits = reference(forward)
    assert torch.equal(forward.trajectory.tokens, answer)
    for step, expected in enumerate(logits):
        state = forward.trajectory.state_at(torch.arange(2), torch.full((2,), step))
        with torch.no_grad():
            got = forward(forward.request.pixels, *forward.request.extras, *state)
        assert torch.equal(got, expected)


def test_nothing_is_left_behind(upstream, vq):
    made = real.adapter(upstream, vq)
    made.model.train()
    request = made.prepare([[tiny.picture()]], [""])
    before = suite.left(made)
    forward = DenoisingForward(made, 1)
    generator = torch.Generator().manual_seed(0)
    forward.generate(request, generator=generator, **QUICK, temperature=0.5)
    target_gradients(forward, [Target("x", (0,), (5,))])
    assert suite.left(made) == before


def test_loaded_as_its_authors_do(upstream, vq, tmp_path):
    real.model(upstream).save_pretrained(tmp_path)
    with captum_dcam.repair("mmada"):
        from models import MMadaModelLM

        model = MMadaModelLM.from_pretrained(tmp_path, torch_dtype=torch.float32).eval()
    found = captum_dcam.wrap(model, (double.tokenizer(), vq), resolution=suite.SIDE)
    shown = dict(gen_length=4, steps=2, block_length=4)
    explained = captum_dcam.explain(found, tiny.picture(), "what is this", words="all", **shown)
    assert explained.words and all(bool(m.any()) for m in explained.maps)


def test_a_saved_checkpoint_is_loaded(upstream, vq, tmp_path, monkeypatch):
    plain = real.model(upstream)
    plain.save_pretrained(tmp_path)
    double.tokenizer().save_pretrained(tmp_path)
    monkeypatch.setattr(upstream.MAGVITv2, "from_pretrained", lambda _name: vq)
    made = captum_dcam.load(tmp_path, resolution=suite.SIDE)
    ids = torch.arange(70)[None]
    with torch.no_grad():
        assert torch.equal(made.model(ids).logits, plain(ids).logits)
    options = ["--load", f"resolution={suite.SIDE}", "--gen-length", 4, "--steps", 2]
    found = explained_and_compared(
        tmp_path, tmp_path / "out", "what is this", *options, "--block-length", 4, size=(64, 48)
    )
    assert found["feasible_calls"] == found["calls"] == 2
