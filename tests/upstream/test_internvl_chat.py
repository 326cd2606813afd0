"""InternVL's tower and projector: the authors' code, and what their weights become.

``CAPTUM_DCAM_UPSTREAM_INTERNVL=/folder/InternVL pytest tests/upstream/test_internvl_chat.py``;
skipped without the variable. The authors' language models of transformers have its names already.
"""

import importlib
import os
import sys
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import tiny
import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).parents[1] / "adapters"))  # importlib mode does not

import made_ar
import test_internvl_chat as double

from captum_dcam.adapters.autoregressive import internvl_chat

NAME = "CAPTUM_DCAM_UPSTREAM_INTERNVL"
pytestmark = pytest.mark.skipif(
    NAME not in os.environ, reason=f"{NAME} names no checkout of InternVL"
)
#: what the authors' modules import and these tests do not call
UNUSED = {
    "einops": ("rearrange",),
    "internvl.conversation": ("get_conv_template",),
    "internvl.model.internlm2.configuration_internlm2": ("InternLM2Config",),
    "internvl.model.internlm2.modeling_internlm2": ("InternLM2ForCausalLM",),
    "internvl.model.phi3.configuration_phi3": ("Phi3Config",),
    "internvl.model.phi3.modeling_phi3": ("Phi3ForCausalLM",),
    "peft": ("LoraConfig", "get_peft_model"),
    "timm.models.layers": ("DropPath",),
}


@pytest.fixture(scope="module")
def authors():
    """Their modules of configuration, tower and whole model."""
    home = Path(os.environ.get(NAME, "")) / "internvl_chat/internvl/model/internvl_chat"
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
        package = ModuleType("internvl.model.internvl_chat")
        package.__path__ = [str(home)]
        patch.setitem(sys.modules, package.__name__, package)
        yield tuple(
            importlib.import_module(f"{package.__name__}.{name}")
            for name in (
                "configuration_intern_vit",
                "modeling_intern_vit",
                "modeling_internvl_chat",
            )
        )
        for name in set(sys.modules) - before:
            if name.startswith("internvl"):
                del sys.modules[name]


@pytest.mark.parametrize(
    ("norm", "normed", "bias"), [("layer_norm", False, True), ("rms_norm", True, False)]
)
def test_what_the_tower_shows_is_the_same(authors, norm, normed, bias):
    from transformers import InternVLForConditionalGeneration

    settings, towers, whole = authors
    vision = {**double.VISION, "norm_type": norm, "qk_normalization": normed, "qkv_bias": bias}
    tower = towers.InternVisionModel(
        settings.InternVisionConfig(**vision, use_flash_attn=False)
    ).eval()
    projector = nn.Sequential(nn.LayerNorm(64), nn.Linear(64, 32), nn.GELU(), nn.Linear(32, 32))
    for part in (tower, projector):
        for parameter in part.parameters():
            parameter.data.normal_(0, 0.3)
    theirs = SimpleNamespace(
        vision_model=tower, mlp1=projector, select_layer=-1, downsample_ratio=0.5, ps_version="v2"
    )
    cls = whole.InternVLChatModel
    theirs.pixel_shuffle = lambda x, scale_factor: cls.pixel_shuffle(theirs, x, scale_factor)
    base = made_ar.model("internvl")
    text = {**base.config.text_config.to_dict(), "architectures": ["Qwen2ForCausalLM"]}
    own = {"llm_config": text, "vision_config": vision, "downsample_ratio": 0.5}
    weights = {n: v for n, v in double.written(base).items() if n.startswith("language_model")}
    weights |= {f"vision_model.{n}": v for n, v in tower.state_dict().items()}
    weights |= {f"mlp1.{n}": v for n, v in projector.state_dict().items()}
    model, info = InternVLForConditionalGeneration.from_pretrained(
        None,
        config=internvl_chat.configuration(own, made_ar.internvl_tokenizer()),
        state_dict=dict(internvl_chat.converted(iter(weights.items()))),
        dtype=torch.float32,
        output_loading_info=True,
    )
    assert not info["missing_keys"] and not info["unexpected_keys"]
    pixels = torch.randn(3, 3, 32, 32)
    with torch.no_grad():
        wanted = cls.extract_feature(theirs, pixels)
        found = model.model.get_image_features(pixels).pooler_output
    assert tiny.relative(torch.as_tensor(found).view(wanted.shape), wanted) < 1e-5
