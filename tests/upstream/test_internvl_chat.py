"""InternVL's own code on tiny random weights, and what these weights become.

``CAPTUM_DCAM_UPSTREAM_INTERNVL_CHAT=/folder/InternVL pytest tests/upstream/test_internvl_chat.py``;
skipped without the variable. The authors' pin, transformers 4.37.2, has no class of InternVL to
compare with: their code runs under the version that ours needs.
"""

import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import tiny
import torch
from torch import nn
from upstream import made_internvl_chat as real

sys.path.insert(0, str(Path(__file__).parents[1] / "adapters"))  # importlib mode does not

import made_ar
import test_internvl_chat as double

from captum_dcam.adapters.autoregressive import internvl_chat

pytestmark = pytest.mark.skipif(
    real.FOLDER is None, reason="CAPTUM_DCAM_UPSTREAM_INTERNVL_CHAT names no checkout of InternVL"
)


@pytest.mark.parametrize(
    ("norm", "normed", "bias"), [("layer_norm", False, True), ("rms_norm", True, False)]
)
def test_what_the_tower_shows_is_the_same(norm, normed, bias):
    from transformers import InternVLForConditionalGeneration

    settings, towers, _, whole, _ = real.package()
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


@pytest.mark.parametrize("template", internvl_chat.TURNS)
def test_questions_are_written_as_the_authors_do(template):
    system, end = internvl_chat.TURNS[template]
    theirs = real.package()[-1].get_conv_template(template)
    assert theirs.system_message == system and theirs.sep == end
    for role, text in zip(theirs.roles, ("<image>\nis it ?", "a"), strict=True):
        theirs.append_message(role, text)
    theirs.append_message(theirs.roles[0], "red ?")
    theirs.append_message(theirs.roles[1], None)
    image = {"type": "image"}
    said = ("user", [image, "is it ?"]), ("assistant", ["a"]), ("user", ["red ?"])
    messages = [
        {"role": r, "content": [c if c is image else {"type": "text", "text": c} for c in parts]}
        for r, parts in said
    ]
    tokenizer = made_ar.internvl_tokenizer()
    written = tokenizer.apply_chat_template(
        messages, chat_template=internvl_chat._template(system, end), tokenize=False,
        add_generation_prompt=True,
    )  # fmt: skip
    assert written.replace("<IMG_CONTEXT>", "<image>") == theirs.get_prompt()
