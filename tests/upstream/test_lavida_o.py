"""LaViDa-O's upstream code under the library's calls: its conformance cases explained and compared,
and a saved checkpoint loaded by its builder.

``CAPTUM_DCAM_UPSTREAM_LAVIDA_O`` names a checkout. Of the packages for training and for making
pictures that it imports, empty stand-ins take the place where they are not installed; the
checkpoint holds the parts that understand, none that make pictures.
"""

import os
import shutil

import pytest
import tiny
import torch
from upstream import made_lavida
from upstream.commands import METHODS

import captum_dcam
from captum_dcam.adapters.lavida_o import LavidaOAdapter
from captum_dcam.comparing import compare_generation
from captum_dcam.errors import WeightsError
from captum_dcam.model.buffers import repair

NAME = "CAPTUM_DCAM_UPSTREAM_LAVIDA_O"
pytestmark = pytest.mark.skipif(NAME not in os.environ, reason=f"{NAME} names no checkout")
WIDTH = 1152  # of the tower: upstream's pooling takes that of SigLIP's defaults
VOCABULARY = 126464  # upstream's mask is token 126336


@pytest.mark.parametrize("number", range(3))
def test_explained_and_compared(number):
    from upstream.cases.lavida_o import CASES

    case = CASES[number]
    adapter = case.make(torch.float32)
    found = captum_dcam.explain(adapter, case.picture(), case.prompt, layer=1, **case.settings)
    assert found.words and all(m.any() for m in found.maps)
    rows = compare_generation(case.bound(adapter, 1), "all", METHODS.split(",")).rows
    # behind use_fast_dlm's cache a step runs its own block alone: no pass over everything
    refused = [r.name for r in rows if r.status != "done"]
    partial = ["tam", "logit_lens", "attention"] if "fast_dlm" in case.name else []
    assert refused == partial, [(r.name, r.note) for r in rows]
    assert all("without that cache" in r.note for r in rows if r.name in refused)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """The folder of a checkpoint with a tiny SigLIP of its own, and its model."""
    from upstream.cases.lavida_o import config, package

    upstream, folder = package(), tmp_path_factory.mktemp("lavida_o")
    sight = dict(
        image_grid_pinpoints=made_lavida.PINS,
        mm_vision_tower=made_lavida.tower(folder, WIDTH),
        mm_resampler_type="spatial_pool",
        mm_spatial_pool_out_channels=WIDTH,
        mm_projector_type="mlp2x_gelu",
        mm_hidden_size=WIDTH,
        mm_use_im_patch_token=False,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = upstream.LlavaLladaForMaskedDiffusion(config(upstream, **sight))
        made_lavida.spread(model)
    repair(model)
    model.save_pretrained(folder / "checkpoint")
    made_lavida.save_tokenizer(folder / "checkpoint", VOCABULARY)
    return str(folder / "checkpoint"), model


def test_loaded_as_its_authors_do(saved):
    from upstream.cases.lavida_o import stand_ins

    with stand_ins(), captum_dcam.repair("lavida_o"):
        from llava.model.builder import load_pretrained_model

        tokenizer, model, images, _ = load_pretrained_model(
            saved[0], None, "llava_llada", device_map="auto", torch_dtype="bfloat16"
        )
    found = captum_dcam.wrap(model.eval(), (tokenizer, images))
    explained = captum_dcam.explain(
        found, tiny.picture(0, (84, 56)), "a dog", words="all", gen_length=8, block_length=8
    )
    assert explained.words and all(bool(m.any()) for m in explained.maps)


def test_a_saved_checkpoint_is_loaded_whole(saved):
    from upstream.cases.lavida_o import stand_ins

    with stand_ins():
        found = LavidaOAdapter.load(saved[0], dtype=torch.float32)
    assert not repair(found.model)
    held = found.model.state_dict()
    for name, value in saved[1].state_dict().items():
        assert torch.equal(held[name], value.bfloat16().float()), name  # as the builder loads


@pytest.mark.parametrize("lost", ("vision_tower", "ln_f", "q_proj_vision"))
def test_what_a_checkpoint_does_not_hold(saved, tmp_path, lost):
    """The tower comes from its own folder then, what makes pictures is not missed; anything else
    would be random."""
    from safetensors.torch import load_file, save_file
    from upstream.cases.lavida_o import stand_ins

    folder = shutil.copytree(saved[0], tmp_path / "checkpoint")
    held = load_file(folder / "model.safetensors")
    kept = {k: v for k, v in held.items() if lost not in k}
    assert len(kept) < len(held)
    save_file(kept, folder / "model.safetensors", {"format": "pt"})
    with stand_ins():
        if lost == "ln_f":
            with pytest.raises(WeightsError, match=r"lacks 1 of the model's tensors .*ln_f"):
                LavidaOAdapter.load(str(folder))
            return
        found = LavidaOAdapter.load(str(folder), dtype=torch.float32)
    expected = saved[1].get_vision_tower().vision_tower
    if lost == "vision_tower":
        expected = type(expected).from_pretrained(saved[1].config.mm_vision_tower)
    expected = expected.state_dict()
    for name, value in found.model.get_vision_tower().vision_tower.state_dict().items():
        assert torch.equal(value, expected[name].bfloat16().float()), name
