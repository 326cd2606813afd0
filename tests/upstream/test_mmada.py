"""MMaDA's adapter on tiny random instances of the upstream code.

``CAPTUM_DCAM_UPSTREAM_MMADA=/folder/MMaDA pytest tests/upstream/test_mmada.py`` (with what
upstream imports installed: the error names it); skipped without the variable.
"""

import os
import sys

import pytest
import tiny
import torch
from doubles import mmada as double
from doubles import mmada_checks as suite
from doubles.gradients import fd
from PIL import Image

import captum_dcam
from captum_dcam.adapters import _compat
from captum_dcam.denoising import DenoisingForward
from captum_dcam.errors import LayerError, MethodError
from captum_dcam.methods import Problem, method, single
from captum_dcam.targets import Target
from captum_dcam.vjp import rows

FOLDER = os.environ.get("CAPTUM_DCAM_UPSTREAM_MMADA")
pytestmark = pytest.mark.skipif(
    FOLDER is None, reason="CAPTUM_DCAM_UPSTREAM_MMADA names no checkout of Gen-Verse/MMaDA"
)
QUICK = dict(max_new_tokens=8, block_length=4, steps=4)


@pytest.fixture(scope="module")
def upstream():
    sys.path.insert(0, FOLDER)
    yield _compat.mmada_package()
    sys.path.remove(FOLDER)


def config(upstream, **changes):
    shape = dict(
        d_model=32,
        n_heads=4,
        n_layers=4,
        mlp_hidden_size=64,
        max_sequence_length=256,
        vocab_size=double.TEXT,
        embedding_size=double.TEXT + double.CODES,
        codebook_size=double.CODES,
        weight_tying=False,
        rope=True,
        block_type="llama",
        activation_type="silu",
        layer_norm_type="rms",
        attention_dropout=0.0,
        residual_dropout=0.0,
        embedding_dropout=0.0,
        include_bias=False,
        use_cache=False,
        eos_token_id=126081,
        pad_token_id=126081,
        mask_token_id=double.MASK,
    )
    from models.configuration_llada import LLaDAConfig

    filled = LLaDAConfig(**{**shape, **changes}).to_dict()
    made = upstream.MMadaConfig(**{k: v for k, v in filled.items() if k != "model_type"})
    made.codebook_size = double.CODES
    return made


def model(upstream, dtype=torch.float32):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        made = upstream.MMadaModelLM(config(upstream))
        for name, p in made.named_parameters():
            if p.ndim > 1:
                torch.nn.init.normal_(p, std=1.0 if "wte" in name else p.shape[-1] ** -0.5)
            else:
                torch.nn.init.ones_(p)
            if "k_proj" in name:
                p.data.mul_(3)
    return made.to(dtype).eval()


@pytest.fixture(scope="module")
def vq(upstream):
    """The real encoder's architecture, the real code, narrow: 4 channels would not do for its
    groups of 32."""
    made = upstream.MAGVITv2.__new__(upstream.MAGVITv2)
    torch.nn.Module.__init__(made)
    from models.modeling_magvitv2 import LFQuantizer, VQGANEncoder

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        made.encoder = VQGANEncoder(ch=32, ch_mult=[1, 1, 1, 1, 1], num_res_blocks=[1] * 5)
        made.quantize = LFQuantizer()
    return made.eval()


def adapter(upstream, vq, dtype=torch.float32):
    return captum_dcam.wrap(model(upstream, dtype), (double.tokenizer(), vq), resolution=suite.SIDE)


def bound(upstream, vq, layer=1, dtype=torch.float32, batch=1, prompts=None, **settings):
    made = adapter(upstream, vq, dtype)
    forward = DenoisingForward(made, layer)
    pictures = [[tiny.picture(b)] for b in range(batch)]
    request = made.prepare(pictures, prompts or ["what is this ?"] * batch)
    forward.generate(request, **{**QUICK, **settings})
    return forward


def reference(forward, **settings):
    """Upstream's own ``mmu_generate`` on ids put together by hand; its forward is spied on."""
    made, ids = forward.adapter.model, suite.own_ids(forward)
    start = ids.shape[1]
    canvases, logits = [], []
    original = made.model.forward

    def spy(input_ids=None, **kwargs):
        out = original(input_ids=input_ids, **kwargs)
        canvases.append(input_ids[: len(ids), start:].clone())
        found = out.logits[:, start:]
        if len(found) > len(ids):
            seeing, blind = found.chunk(2)
            found = blind + (settings["cfg_scale"] + 1) * (seeing - blind)
        logits.append(found.clone())
        return out

    made.model.forward = spy
    try:
        result = made.mmu_generate(ids, **{**QUICK, **settings})
    finally:
        del made.model.forward
    return result[:, start:], canvases, logits


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


@pytest.fixture
def exact(upstream, monkeypatch):
    """Upstream's norms and positions compute in float32 even in a float64 model."""
    from models import modeling_llada

    def norm(self, x):
        return self.weight * x * (x.pow(2).mean(-1, keepdim=True) + self.eps).rsqrt()

    monkeypatch.setattr(modeling_llada.RMSLayerNorm, "forward", norm)
    original = modeling_llada.RotaryEmbedding.forward

    def rotary(self, q, k):
        self.config.rope_full_precision = False
        return original(self, q, k)

    monkeypatch.setattr(modeling_llada.RotaryEmbedding, "forward", rotary)


@pytest.mark.parametrize("settings", ({}, {"cfg_scale": 1.5}))
@pytest.mark.parametrize("layer", range(3))
def test_gradients_are_finite_differences(upstream, vq, exact, layer, settings):
    forward = bound(upstream, vq, layer, torch.float64, **settings)
    fd(forward, 0, "commit")
    fd(forward, 7, "final")


def test_the_last_block_is_refused_and_pixels_have_no_gradient(upstream, vq):
    with pytest.raises(LayerError, match="deepest usable block of mmada is 2"):
        DenoisingForward(adapter(upstream, vq), 3)
    problem = Problem(single(bound(upstream, vq)), (Target("x", (1,), (7,)),))
    with pytest.raises(MethodError, match="VQ encoder"):
        method("saliency").attribute(problem)
    for name in ("diffusion_cam", "attention", "occlusion"):
        maps = method(name).attribute(problem).maps[0]
        assert maps.shape == (1, 4, 4) and maps.any()


@pytest.mark.parametrize("size", suite.SIZES)
@pytest.mark.parametrize("fit", ("crop", "squash"))
def test_pixels_are_those_of_upstreams_transforms(size, fit):
    """Bit for bit, where torchvision is there."""
    pytest.importorskip("torchvision")
    sys.path.insert(0, FOLDER)
    try:
        from training import utils
    except ImportError as error:
        pytest.skip(f"upstream's training package: {error}")
    finally:
        sys.path.remove(FOLDER)
    from captum_dcam.adapters._mmada import fitted

    picture = tiny.picture(size=size)
    own = utils.image_transform if fit == "crop" else utils.image_transform_squash
    assert torch.equal(fitted(picture, 64, fit)[0], own(picture, resolution=64))


def test_a_bright_patch_changes_codes_around_its_token(upstream, vq):
    made = adapter(upstream, vq)
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
    made = adapter(upstream, vq)
    made.model.train()
    request = made.prepare([[tiny.picture()]], [""])
    before = suite.left(made)
    forward = DenoisingForward(made, 1)
    generator = torch.Generator().manual_seed(0)
    forward.generate(request, generator=generator, **QUICK, temperature=0.5)
    rows(forward, [Target("x", (0,), (5,))])
    assert suite.left(made) == before


def test_a_saved_checkpoint_is_loaded(upstream, vq, tmp_path, monkeypatch):
    plain = model(upstream)
    plain.save_pretrained(tmp_path)
    double.tokenizer().save_pretrained(tmp_path)
    monkeypatch.setattr(upstream.MAGVITv2, "from_pretrained", lambda _name: vq)
    made = captum_dcam.load(tmp_path, resolution=suite.SIDE)
    ids = torch.arange(70)[None]
    with torch.no_grad():
        assert torch.equal(made.model(ids).logits, plain(ids).logits)
