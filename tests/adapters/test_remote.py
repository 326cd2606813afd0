"""Checkpoints that bring their own code: loaded where it is allowed, with what needs repair."""

import json

import pytest
import tiny
import torch
from doubles import diffusion_vl, fast_dvlm, mineru_diffusion, nemotron_diffusion_vlm, sdar_vl

import captum_dcam
from captum_dcam.adapters.common.remote import remote_model
from captum_dcam.errors import InputTypeError, RemoteCodeError, WeightsError

#: what lies in a checkpoint; its models are such as transformers 5 cannot load as they are
CODE = """
from doubles import {double} as double

{config} = double.{config}


class {model}(double.{model}):
{body}


class SDARForCausalLM:
    _tied_weights_keys = ["lm_head.weight"]


class Processor:
    @classmethod
    def register_for_auto_class(cls):
        pass

    @staticmethod
    def from_pretrained(*_, **__):
        return double.processor()
"""
TYING = """
    _tied_weights_keys = ["lm_head.weight"]

    def tie_weights(self):
        pass
"""
FAMILIES = {
    "diffusion_vl": diffusion_vl,
    "fast_dvlm": fast_dvlm,
    "mineru_diffusion": mineru_diffusion,
    "nemotron_diffusion_vlm": nemotron_diffusion_vlm,
    "sdar_vl": sdar_vl,
}
PICTURE = tiny.picture(size=(84, 56))


@pytest.fixture(params=FAMILIES)
def checkpoint(request, tmp_path, monkeypatch):
    """A family, its double's model, and the folder that it was saved to."""
    for place in ("transformers.dynamic_module_utils", "transformers.utils.hub"):
        monkeypatch.setattr(f"{place}.HF_MODULES_CACHE", str(tmp_path / "modules"), raising=False)
    monkeypatch.syspath_prepend(str(tmp_path / "modules"))
    double, folder = FAMILIES[request.param], tmp_path / "checkpoint"
    model = double.model()
    model.save_pretrained(folder)
    if double is nemotron_diffusion_vlm:  # it has no processor
        double.tokenizer().save_pretrained(folder)
    names = {"config": type(model.config).__name__, "model": type(model).__name__}
    body = TYING if request.param == "diffusion_vl" else "    pass"
    code = CODE.format(double=request.param, body=body, **names)
    (folder / "double_code.py").write_text(code)
    config = json.loads((folder / "config.json").read_text())
    config["auto_map"] = {
        "AutoConfig": f"double_code.{names['config']}",
        "AutoModelForCausalLM": f"double_code.{names['model']}",
        "AutoProcessor": "double_code.Processor",
    }
    (folder / "config.json").write_text(json.dumps(config))
    return request.param, model, folder


def test_a_checkpoint_with_its_code(checkpoint):
    family, model, folder = checkpoint
    with pytest.raises(RemoteCodeError, match=r"brings its own .*trust_remote_code=True"):
        captum_dcam.load(folder)
    with pytest.raises(RemoteCodeError, match=f"{family} is in no version of transformers"):
        remote_model(family, str(folder), "a/b")
    for no_flag in ("false", "True", 1, None):
        with pytest.raises(InputTypeError, match=r"trust_remote_code is .*expected True or False"):
            remote_model(family, str(folder), "a/b", trust_remote_code=no_flag)
    made = captum_dcam.load(folder, trust_remote_code=True)
    assert made.family == family
    own = dict(model.named_parameters())
    assert all(torch.equal(p, own[name]) for name, p in made.model.named_parameters())
    draws = torch.Generator().manual_seed(0)
    explained = captum_dcam.explain(made, PICTURE, "what is this", gen_length=4, generator=draws)
    assert explained.words and all(bool(m.any()) for m in explained.maps)


def test_a_folder_of_another_kind(checkpoint):
    family, _, folder = checkpoint
    with pytest.raises(WeightsError, match="name a checkpoint or a folder, such as a/b"):
        remote_model(family, None, "a/b")
    with pytest.raises(WeightsError, match="expected other, with its code"):
        remote_model(family, str(folder), "a/b", ("other",), trust_remote_code=True)
