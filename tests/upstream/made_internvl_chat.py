"""Tiny random-weight models of InternVL's own classes, from the checkout that
CAPTUM_DCAM_UPSTREAM_INTERNVL_CHAT names. The authors' language models of transformers have its
names already."""

import functools
import importlib
import os
import sys
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import nn

from captum_dcam.testing import Reference

sys.path.insert(0, str(Path(__file__).parents[1] / "adapters"))  # importlib mode does not

import test_internvl_chat as double

FOLDER = os.environ.get("CAPTUM_DCAM_UPSTREAM_INTERNVL_CHAT")
COMMIT = "2410d1d"
#: what the authors' modules import and these models do not call
UNUSED = {
    "einops": ("rearrange",),
    "internvl.model.internlm2.configuration_internlm2": ("InternLM2Config",),
    "internvl.model.internlm2.modeling_internlm2": ("InternLM2ForCausalLM",),
    "internvl.model.phi3.configuration_phi3": ("Phi3Config",),
    "internvl.model.phi3.modeling_phi3": ("Phi3ForCausalLM",),
    "peft": ("LoraConfig", "get_peft_model"),
    "timm.models.layers": ("DropPath",),
}
NAMES = (
    *("model.internvl_chat.configuration_intern_vit", "model.internvl_chat.modeling_intern_vit"),
    *("model.internvl_chat.configuration_internvl_chat",),
    *("model.internvl_chat.modeling_internvl_chat", "conversation"),
)


@functools.cache
def package():
    """Upstream's modules of :data:`NAMES`, in order."""
    home = Path(FOLDER) / "internvl_chat/internvl"
    before = set(sys.modules)
    with pytest.MonkeyPatch.context() as patch:
        for full, names in UNUSED.items():
            parts = full.split(".")
            for end in range(1, len(parts) + 1):
                place = ".".join(parts[:end])
                made = ModuleType(place)
                made.__path__, made.__spec__ = [], ModuleSpec(place, None)
                if end == len(parts):
                    vars(made).update(dict.fromkeys(names, nn.Identity))
                if end == len(parts) or place not in sys.modules:
                    patch.setitem(sys.modules, place, made)
        for name in ("", ".model", ".model.internvl_chat"):  # none runs its own __init__
            made = ModuleType(f"internvl{name}")
            made.__path__ = [str(home.joinpath(*name.split(".")))]
            patch.setitem(sys.modules, made.__name__, made)
        found = tuple(importlib.import_module(f"internvl.{name}") for name in NAMES)
        for name in set(sys.modules) - before:
            if name.startswith("internvl"):
                del sys.modules[name]
    return found


def model(adapter):
    """Upstream's whole model with the weights of ours; they share the language model, which is
    transformers' in both."""
    configuration, whole = package()[2:4]
    text = {**adapter.model.config.text_config.to_dict(), "architectures": ["Qwen2ForCausalLM"]}
    own = dict(vision_config=double.VISION, llm_config=text, downsample_ratio=0.5)
    config = configuration.InternVLChatConfig(
        **own, ps_version="v2", template="internvl2_5", use_thumbnail=True, max_dynamic_patch=4
    )
    made = whole.InternVLChatModel(config, use_flash_attn=False)
    made.load_state_dict(double.written(adapter.model))
    made.language_model.model = adapter.model.model.language_model
    made.language_model.lm_head = adapter.model.lm_head
    made.img_context_token_id = adapter.model.config.image_token_id
    return made.eval()


def reference(adapter, request, settings):
    """Upstream's own ``generate``, with keys and values cached, on the model of our weights."""
    adapter.model.get_image_features(request.pixels.flatten(0, 1))  # transformers hangs up hooks
    ends = adapter.model.generation_config
    out = model(adapter).generate(
        **adapter._inputs(request.pixels, request.extras),
        max_new_tokens=settings["gen_length"],
        do_sample=False,
        output_logits=True,
        return_dict_in_generate=True,
        eos_token_id=ends.eos_token_id,
        pad_token_id=ends.pad_token_id,
    )
    tokens, logits = out.sequences, []
    for step, row in enumerate(out.logits):
        logits.append(torch.full((*tokens.shape, row.shape[-1]), torch.nan))
        logits[-1][:, step] = row
    steps = torch.arange(tokens.shape[1])
    return Reference(tokens, logits, commit_step=steps.expand_as(tokens))
