"""Lumina-DiMOO on tiny random instances of the upstream code.

``CAPTUM_DCAM_UPSTREAM_LUMINA_DIMOO=CHECKOUT pytest tests/upstream/test_lumina_dimoo.py``, skipped
without the variable; two tests need diffusers. The model, its loop and the
packing are upstream's, the VQ model a tiny one with the interface of diffusers'.
"""

import json
from types import SimpleNamespace

import pytest
import tiny
import torch
from doubles import mmada as double
from doubles import mmada_checks as suite
from upstream import made_lumina_dimoo as real

import captum_dcam
from captum_dcam.adapters.mmada import packing
from captum_dcam.adapters.mmada.adapter import LUMINA_SYSTEM
from captum_dcam.model.forward import DenoisingForward
from captum_dcam.model.hub import families, family_of

pytestmark = pytest.mark.skipif(
    real.FOLDER is None,
    reason="CAPTUM_DCAM_UPSTREAM_LUMINA_DIMOO names no checkout of Alpha-VLLM/Lumina-DiMOO",
)
QUICK = dict(gen_length=8, block_length=4, steps=4)


def bound(**settings):
    forward = DenoisingForward(real.adapter(), 1)
    request = forward.adapter.prepare([[tiny.picture(0, (80, 60))]], ["what is this ?"])
    forward.generate(request, **{**QUICK, **settings})
    return forward


@pytest.mark.parametrize(
    "settings",
    (
        {},
        {"gen_length": 16, "block_length": 8, "steps": 6},
        {"cfg_scale": 1.5},
        {"temperature": 0.7},
        {"remasking": "random"},
    ),
)
def test_recorded_and_replayed_as_decoded(settings):
    random = settings.keys() & {"temperature", "remasking"}
    drawn = {"generator": torch.Generator().manual_seed(3)} if random else {}
    forward = bound(**settings, **drawn)
    t, made = forward.trajectory, {**QUICK, **settings}
    with torch.random.fork_rng(devices=[]):
        seed = torch.randint(2**31, (), generator=torch.Generator().manual_seed(3))
        torch.manual_seed(int(seed))
        own = suite.rows_reference(real.loop)(forward.adapter, forward.request, made)
    assert torch.equal(t.tokens, own.tokens) and torch.equal(t.states[0], own.canvases)
    masked = own.canvases[..., :-1] == double.MASK
    steps = torch.arange(t.steps)[:, None, None].where(masked, -1).amax(0)
    left = own.tokens[:, :-1] == double.MASK  # the model wrote the mask itself
    assert torch.equal(t.commit_step[:, :-1][~left], steps[~left])
    for step, wanted in enumerate(own.logits):
        with torch.no_grad():
            assert torch.equal(forward.replay(torch.tensor([0]), torch.tensor([step])), wanted)
        for p in (t.commit_step[0, :-1] == step).nonzero()[:, 0].tolist():
            odds = float(wanted[0, p].double().softmax(-1)[t.tokens[0, p]])
            assert left[0, p] or float(t.confidence[0, p]) == pytest.approx(odds, rel=1e-5)


class Ending(torch.nn.Module):
    """Writes EOS everywhere."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))

    def forward(self, ids, infer):
        logits = torch.zeros(*ids.shape, 126464)
        logits[..., 126081] = 1
        return SimpleNamespace(logits=logits)


def test_upstreams_loop_fails_behind_the_end_of_an_answer():
    _, generate = real.package()
    ids = torch.tensor([[5, *[126336] * 8, 6]])
    with pytest.raises(NameError, match="input_p_len"):
        generate(Ending(), ids, code_start=1, **QUICK)


@pytest.mark.parametrize("size", suite.SIZES)
@pytest.mark.parametrize("resolution", (64, 256))
def test_images_are_cut_and_packed_as_upstream_does(size, resolution, monkeypatch):
    pytest.importorskip("diffusers")
    with real.importing():
        from utils import image_utils
        from utils.prompt_utils import generate_multimodal_understanding_prompt

    # the middle in place of a draw
    monkeypatch.setattr(image_utils.random, "randint", lambda low, high: round((low + high) / 2))
    picture = tiny.picture(0, size)
    known = image_utils.generate_crop_size_list((resolution // 32) ** 2, 32)
    middle = image_utils.var_center_crop(picture, crop_size_list=known)
    made = real.adapter()
    made.resolution = resolution
    request = made.prepare([[picture]], ["what is this ?"])
    theirs = image_utils.VaeImageProcessor(vae_scale_factor=16, do_normalize=False)
    assert torch.equal(request.pixels, theirs.preprocess(middle))
    high, wide = request.layout.shapes[0]
    assert (wide * 16, high * 16) == middle.size

    class Real(type(made.processor[1])):
        """With the device that upstream asks for."""

        device = torch.device("cpu")

    vq = made.processor[1]
    vq.__class__ = Real
    tokens = image_utils.encode_img_with_breaks(middle, vq)  # upstream's numbers
    text = made._tokenizer(generate_multimodal_understanding_prompt("what is this ?"))["input_ids"]
    wanted = torch.tensor([*text[:-1], *tokens, *text[-1:], 126354])
    start, newline, _, answer, _ = packing.ROW_MARKS
    assert wanted[len(text) - 1] == start and wanted[-1] == answer and newline in wanted
    ours = packing.Rows(vq, resolution, "crop", packing.FIRST_CODE, packing.ROW_MARKS)
    assert torch.equal(ours.ids(request.pixels, request.extras[0])[0], wanted)
    places, words, length = ours.placed((high, wide), len(text))
    assert length == len(wanted) == request.layout.prefix_length
    assert (wanted[places] >= packing.FIRST_CODE).all() and wanted[words].tolist() == text


def test_the_system_prompt_is_upstreams():
    with real.importing():
        from utils.prompt_utils import generate_multimodal_understanding_prompt

    assert LUMINA_SYSTEM in generate_multimodal_understanding_prompt("")


def test_a_saved_checkpoint_is_loaded(tmp_path, monkeypatch):
    diffusers = pytest.importorskip("diffusers")
    model = real.model()
    model.config.architectures = [type(model).__name__]
    model.save_pretrained(tmp_path)
    double.tokenizer(tags=double.TAGS).save_pretrained(tmp_path)
    narrow = dict(block_out_channels=(32,) * 5, num_vq_embeddings=double.CODES, vq_embed_dim=4)
    kinds = dict(
        down_block_types=("DownEncoderBlock2D",) * 5, up_block_types=("UpDecoderBlock2D",) * 5
    )
    diffusers.VQModel(**narrow, **kinds, latent_channels=4).save_pretrained(tmp_path / "vqvae")
    monkeypatch.syspath_prepend(real.FOLDER)
    config = json.loads((tmp_path / "config.json").read_text())
    assert family_of(str(tmp_path), config, families()) == "mmada"
    found = suite.RowsAdapter.load(str(tmp_path), resolution=suite.SIDE)
    theirs = found.model.state_dict()
    assert all(torch.equal(v, theirs[k]) for k, v in model.state_dict().items())
    said = captum_dcam.explain(found, tiny.picture(0, (80, 60)), "what is this ?", "all", **QUICK)
    assert said.words and all(bool(m.any()) for m in said.maps)
