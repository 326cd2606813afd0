"""A stand-in for LaViDa-O's package, as far as loading goes: its modules, and a builder that gives
the double.

Of our own writing, after the family's behaviour: what its builder asks for and does to the tower,
and what transformers 5 breaks in its classes.
"""

import sys
from types import ModuleType, SimpleNamespace

import torch
from doubles import lavida_o as double
from transformers import PreTrainedModel

from captum_dcam.model.versions import transformers_major

NEW = transformers_major() >= 5
TYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16}


def installed(monkeypatch, missing=()):
    """Put the package in place; returns what its builder is called with. ``missing``: names of
    parameters that its checkpoint does not hold."""
    seen, siglip, llada = {}, _siglip(), _llada()

    def from_pretrained(cls, _path, torch_dtype, output_loading_info=False):
        siglip.SigLipVisionModel.from_pretrained("siglip", device_map=None)  # in its constructor
        assert llada.LlavaLladaConfig(d_model=32).d_model == 32
        if NEW:
            cls().tie_weights(recompute_mapping=False)
            assert not cls._tied_weights_keys.keys()
        made = double.model(dtype=torch_dtype)
        return (made, {"missing_keys": list(missing)}) if output_loading_info else made

    def load_pretrained_model(path, base, name, device_map="auto", torch_dtype="float16"):
        assert base is None and name == "llava_llada"
        assert torch_dtype in TYPES, "upstream stops in a debugger"
        seen.update(path=path, device_map=device_map, torch_dtype=torch_dtype)
        load = PreTrainedModel.from_pretrained.__func__
        made = load(llada.LlavaLladaForMaskedDiffusion, path, torch_dtype=TYPES[torch_dtype])
        tokenizer, image_processor = double.processor()
        if device_map != "auto":
            made.get_vision_tower().half()  # upstream moves it to CUDA, too
        return tokenizer, made, image_processor, 8192

    monkeypatch.setattr(PreTrainedModel, "from_pretrained", classmethod(from_pretrained))
    contents = {
        "llava.model.builder": {"load_pretrained_model": load_pretrained_model},
        "llava.model.language_model.llava_llada": vars(llada),
        "llava.model.multimodal_encoder.siglip_encoder": vars(siglip),
    }
    for name, values in contents.items():
        module = ModuleType(name)
        vars(module).update(values)
        monkeypatch.setitem(sys.modules, name, module)
    return seen


def _siglip():
    class SigLipVisionConfig:
        @classmethod
        def from_pretrained(cls, _name):
            cls._set_token_in_kwargs({})
            return cls()

    if not NEW:  # what it inherits
        SigLipVisionConfig._set_token_in_kwargs = staticmethod(lambda kwargs: None)

    class Pretrained:
        @classmethod
        def from_pretrained(cls, name, **_options):
            assert not NEW, "transformers 5 refuses to load inside a constructor"
            return cls(cls.config_class.from_pretrained(name))

    class SigLipVisionModel(Pretrained):
        config_class = SigLipVisionConfig

        def __init__(self, config):
            self.config = config

    return SimpleNamespace(
        SigLipVisionConfig=SigLipVisionConfig, SigLipVisionModel=SigLipVisionModel
    )


def _llada():
    class LLaDAConfig:
        def __init__(self, d_model):
            self.d_model = d_model

    class LlavaLladaConfig(LLaDAConfig):
        if NEW:  # transformers 5 gives every configuration a constructor of its own

            def __init__(self):
                raise AssertionError("knows no d_model")

    class LlavaLladaForMaskedDiffusion:
        _tied_weights_keys = ("head",)

        def tie_weights(self):
            pass

    return SimpleNamespace(
        LLaDAConfig=LLaDAConfig,
        LlavaLladaConfig=LlavaLladaConfig,
        LlavaLladaForMaskedDiffusion=LlavaLladaForMaskedDiffusion,
        generate_with_dual_cache=None,
    )
