"""Dream-VL's adapter on tiny random instances of the upstream code.

``CAPTUM_DCAM_UPSTREAM_DREAM_VL=/folder/Dream-VLX pytest tests/upstream/test_dream_vl.py``; skipped
without the variable.
"""

import json
import shutil
from pathlib import Path

import pytest
import tiny
import torch
from doubles import dream_vl as double
from doubles import dream_vl_checks as suite
from doubles.gradients import fd
from upstream import made_dream_vl as real
from upstream.commands import explained_and_compared

import captum_dcam
from captum_dcam.adapters.dream_vl import DreamVLAdapter
from captum_dcam.errors import LayerError
from captum_dcam.methods import AttributionTask, method
from captum_dcam.model.forward import DenoisingForward, single
from captum_dcam.model.gradients import target_gradients
from captum_dcam.model.words import Target

pytestmark = pytest.mark.skipif(
    real.FOLDER is None,
    reason="CAPTUM_DCAM_UPSTREAM_DREAM_VL names no checkout of DreamLM/Dream-VLX",
)


@pytest.fixture(scope="module")
def upstream():
    return real.package()


def bound(
    upstream, layer=1, dtype=torch.float32, pictures=None, prompts=None, made=None, **settings
):
    made = real.adapter(upstream, dtype, made=made)
    forward = DenoisingForward(made, layer)
    pictures = pictures or [[tiny.picture(size=(84, 56))]]
    request = made.prepare(pictures, prompts or ["what is this"] * len(pictures))
    forward.generate(request, **{**suite.QUICK, **settings})
    return forward


@pytest.mark.parametrize("images", (1, 2))
@pytest.mark.parametrize(
    "settings",
    (
        {},
        {"steps": 3, "alg": "entropy"},
        {"alg": "topk_margin"},
        {"max_new_tokens": 1, "steps": 1},
    ),
)
def test_trajectory_and_replay_have_upstreams_bits(upstream, images, settings):
    sizes = ((84, 56), (56, 112))[:images]
    forward = bound(
        upstream, pictures=[[tiny.picture(i, s) for i, s in enumerate(sizes)]], **settings
    )
    suite.check_against_history(forward, settings)


def test_words_of_dream_vla_have_upstreams_bits():
    """Its class of actions, whose ``diffusion_generate`` is Dream-VL's; positions are counted by
    code of its own."""
    upstream = real.actions()
    made = real.model(upstream, cls="DreamVLAForActionPrediction", config="DreamVLAConfig")
    assert made.config.model_type in DreamVLAdapter.model_types
    forward = bound(upstream, made=made)
    suite.check_against_history(forward, {})


@pytest.mark.parametrize("layer", range(3))
def test_gradients_are_finite_differences(upstream, layer):
    with real.exact():
        forward = bound(upstream, layer, torch.float64)
        for score in ("commit", "final"):
            fd(forward, 0, score)
            fd(forward, 5, score)


def test_the_last_block_is_refused_and_methods_run(upstream):
    with pytest.raises(LayerError, match="deepest usable block of dream_vl is 2"):
        DenoisingForward(real.adapter(upstream), 3)
    task = AttributionTask(single(bound(upstream)), (Target("x", (1,), (7,)),))
    for name in ("diffusion_cam", "saliency", "attention"):
        maps = method(name).attribute(task).maps[0]
        assert maps.shape == (1, 2, 3) and maps.any()


@pytest.mark.parametrize("size", suite.SIZES)
def test_the_doubles_pictures_are_upstreams(upstream, size):
    """Grid and pixels, so that what the double's tests say of layout holds upstream."""
    theirs = upstream[1].DreamVLImageProcessor(min_pixels=double.LEAST, max_pixels=double.MOST)
    picture = tiny.picture(size=size)
    own = double.ImageProcessor()(images=[picture])
    out = theirs(images=[picture], return_tensors="pt")
    assert torch.equal(torch.as_tensor(out["image_grid_thw"]), own["image_grid_thw"])
    assert tiny.relative(own["pixel_values"], torch.as_tensor(out["pixel_values"])) < 1e-5


@pytest.mark.parametrize("size", suite.SIZES)
def test_layout(upstream, size):
    suite.check_ramps(real.adapter(upstream), size)


def test_written_out_attention_gets_an_additive_mask(upstream):
    outs = []
    for kind in ("sdpa", "eager"):
        made = real.adapter(upstream, implementation=kind)
        forward = DenoisingForward(made, 1)
        prompts = ["what is this", "what is this red circle on the left"]
        request = made.prepare([[tiny.picture(size=(84, 56))]] * 2, prompts)
        forward.generate(request, **suite.QUICK)
        with torch.no_grad():
            outs.append(forward.replay(torch.tensor([0]), torch.tensor([0])))
    assert tiny.relative(*outs) < 1e-4


def test_a_batch_is_its_examples_one_by_one(upstream):
    suite.check_batch(lambda **k: bound(upstream, **k))


def test_nothing_is_left_behind(upstream):
    made = real.adapter(upstream)
    made.model.train()
    request = made.prepare([[tiny.picture(size=(84, 56))]], [""])
    before = suite.left(made)
    forward = DenoisingForward(made, 1)
    forward.generate(
        request, generator=torch.Generator().manual_seed(0), **suite.QUICK, alg="origin"
    )
    target_gradients(forward, [Target("x", (0,), (5,))])
    assert suite.left(made) == before


def test_wrap_finds_the_tables_that_loading_left_unmade(upstream):
    """``from_pretrained`` of transformers 5 leaves all six as memory was."""
    plain, made = (real.adapter(upstream).model for _ in range(2))
    tables = [p for p in made.modules() if hasattr(p, "inv_freq")]
    for part in tables:
        part.inv_freq = torch.full_like(part.inv_freq, -6.7e8)
    with pytest.warns(UserWarning, match=rf": {len(tables)} rotary tables\. "):
        real.adapter(upstream, made=made)
    right = dict(plain.named_buffers())
    assert len(tables) == 6
    assert all(torch.allclose(b, right[n]) for n, b in made.named_buffers())


def test_a_saved_checkpoint_is_loaded_with_its_code(upstream, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "m"))
    plain, folder = real.model(upstream), tmp_path / "checkpoint"
    plain.save_pretrained(folder)
    for file in (Path(real.FOLDER) / "vl" / "train" / "dreamvl").glob("*.py"):
        shutil.copy(file, folder)
    config = json.loads((folder / "config.json").read_text())
    config["auto_map"] = {
        "AutoConfig": "configuration_dreamvl.DreamVLConfig",
        "AutoModel": "modeling_dreamvl.DreamVLModel",
    }
    (folder / "config.json").write_text(json.dumps(config))
    double.tokenizer().save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text(
        json.dumps(
            {
                "min_pixels": double.LEAST,
                "max_pixels": double.MOST,
                "processor_class": "DreamVLProcessor",
                "auto_map": {
                    "AutoProcessor": "processing_dreamvl.DreamVLProcessor",
                    "AutoImageProcessor": "image_processing_dreamvl.DreamVLImageProcessor",
                },
            }
        )
    )
    (folder / "chat_template.jinja").write_text(double.TEMPLATE)
    with captum_dcam.repair("dream_vl"):  # as its authors load it
        from transformers import AutoModel, AutoProcessor

        own = dict(trust_remote_code=True)
        model = AutoModel.from_pretrained(folder, torch_dtype=torch.float32, **own).eval()
        processor = AutoProcessor.from_pretrained(folder, **own)
    wrapped, shown = captum_dcam.wrap(model, processor), dict(gen_length=6, steps=3)
    explained = captum_dcam.explain(
        wrapped, tiny.picture(size=(84, 56)), "what is this", words="all", **shown
    )
    assert explained.words and all(bool(m.any()) for m in explained.maps)
    with pytest.raises(PermissionError, match="trust_remote_code=True"):
        captum_dcam.load(folder)
    made = captum_dcam.load(folder, trust_remote_code=True)
    request = made.prepare([[tiny.picture(size=(84, 56))]], ["what is this"])
    forward = DenoisingForward(made, 1)
    forward.generate(request, **suite.QUICK)
    assert torch.equal(forward.trajectory.tokens, bound(upstream).trajectory.tokens)
    options = ["--load", "trust_remote_code=true", "--gen-length", 6, "--steps", 3]
    found = explained_and_compared(
        folder, tmp_path / "out", "what is this", *options, size=(84, 56)
    )
    assert found["feasible_calls"] == found["calls"] == 3
