"""InternVL's own checkpoints: a double in their format is read as the model that it is."""

import json
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

sys.path.insert(0, str(Path(__file__).parent))  # importlib mode does not

import made_ar
import tiny

import captum_dcam
from captum_dcam.errors import InputError, WeightsError

VISION = {
    "architectures": ["InternVisionModel"],
    "model_type": "intern_vit_6b",
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 32,
    "patch_size": 4,
    "qkv_bias": False,
    "qk_normalization": False,
    "norm_type": "layer_norm",
    "hidden_act": "gelu",
    "layer_norm_eps": 1e-6,
}


def written(model):
    """The weights as the authors name them."""
    own = dict(model.state_dict())
    out = {"language_model.lm_head.weight": own.pop("lm_head.weight")}
    tower, projector, language = "model.vision_tower.", "model.multi_modal_projector.", "model.lang"
    for layer in range(VISION["num_hidden_layers"]):
        place = f"{tower}encoder.layer.{layer}.attention."
        parts = [own.pop(f"{place}{which}_proj.weight") for which in "qkv"]
        out[f"vision_model.encoder.layers.{layer}.attn.qkv.weight"] = torch.cat(parts)
    for name, value in own.items():
        if name.startswith(language):
            out[f"language_model.model.{name.removeprefix('model.language_model.')}"] = value
        elif name.startswith(projector):
            where = {"layer_norm": 0, "linear_1": 1, "linear_2": 3}
            part, kind = name.removeprefix(projector).split(".")
            out[f"mlp1.{where[part]}.{kind}"] = value
        else:
            rest = name.removeprefix(tower)
            for ours, theirs in (
                ("embeddings.cls_token", "embeddings.class_embedding"),
                ("embeddings.position_embeddings", "embeddings.position_embedding"),
                ("embeddings.patch_embeddings.projection", "embeddings.patch_embedding"),
                ("encoder.layer.", "encoder.layers."),
                ("attention.projection_layer", "attn.proj"),
                ("layernorm_before", "norm1"),
                ("layernorm_after", "norm2"),
                ("lambda_", "ls"),
            ):
                rest = rest.replace(ours, theirs)
            out[f"vision_model.{rest}"] = value
    return {name: value.clone() for name, value in out.items()}  # none is tied


def save(folder, model, **changes):
    """A checkpoint as the authors publish it, with code that must not run."""
    folder.mkdir(exist_ok=True)
    text = {} if model is None else model.config.text_config.to_dict()
    config = {
        "architectures": ["InternVLChatModel"],
        "auto_map": {"AutoModel": "modeling_internvl_chat.InternVLChatModel"},
        "model_type": "internvl_chat",
        "llm_config": {**text, "architectures": ["Qwen2ForCausalLM"]},
        "vision_config": VISION,
        "downsample_ratio": 0.5,
        "dynamic_image_size": True,
        "max_dynamic_patch": 4,
        "min_dynamic_patch": 1,
        "ps_version": "v2",
        "select_layer": -1,
        "template": "internvl2_5",
        "torch_dtype": "float32",
        "use_thumbnail": True,
        **changes,
    }
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "modeling_internvl_chat.py").write_text("raise RuntimeError('this code ran')")
    if model is None:  # what is refused before it is read
        return folder
    save_file(written(model), folder / "model.safetensors")
    made_ar.internvl_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def model():
    made_ar.needs()
    return made_ar.model("internvl")


@pytest.fixture(scope="module")
def folder(model, tmp_path_factory):
    return save(tmp_path_factory.mktemp("chat"), model)


def test_the_same_weights_answer_the_same(model, folder):
    adapter = captum_dcam.load(folder, device="cpu")
    found, wanted = adapter.model.state_dict(), model.state_dict()
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)
    plain = captum_dcam.wrap(model, adapter.processor)
    requests = [
        a.prepare([[made_ar.picture(0, (96, 40))]], ["is it red ?"]) for a in (adapter, plain)
    ]
    assert len(requests[0].layout.grids) == 3  # two tiles, and the thumbnail
    one, two = (
        a.generate(r, max_new_tokens=3) for a, r in zip((adapter, plain), requests, strict=True)
    )
    assert torch.equal(one.tokens, two.tokens)
    assert tiny.relative(one.confidence, two.confidence) < 1e-5
    end = adapter.processor.tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert end in adapter.stop_ids


def test_the_question_is_written_as_the_authors_do(folder):
    """``get_conv_template('internvl2_5')`` of their ``conversation.py``."""
    from captum_dcam.adapters.autoregressive.internvl_chat import TURNS

    adapter = captum_dcam.load(folder, device="cpu")
    request = adapter.prepare([[made_ar.picture()]], ["is it red ?"])
    text = adapter.processor.tokenizer.decode(request.extras[0][0])
    shown = "<img>" + "<IMG_CONTEXT>" * 16 + "</img>"
    assert text == (
        f"<|im_start|>system\n{TURNS['internvl2_5'][0]}<|im_end|>\n"
        f"<|im_start|>user\n{shown}\nis it red ?<|im_end|>\n<|im_start|>assistant\n"
    )


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        (
            {"llm_config": {"architectures": ["InternLM2ForCausalLM"]}},
            "language model InternLM2ForCausalLM, whose code comes with.*ends with -hf",
        ),
        ({"ps_version": "v1"}, "ps_version='v1', with which.*expected 'v2'"),
        ({"use_llm_lora": 16}, "use_llm_lora=16"),
        ({"force_image_size": 448}, "force_image_size=448 and a tower of 32 px"),
        ({"template": "phi3-chat"}, "template 'phi3-chat': expected one of internvl2_5"),
    ],
)
def test_what_transformers_class_is_not(tmp_path, changes, told):
    made_ar.needs()
    with pytest.raises(WeightsError, match=told):
        captum_dcam.load(save(tmp_path, None, **changes), device="cpu")


def test_a_lost_tensor_is_named(model, tmp_path):
    save(tmp_path, model)
    weights = written(model)
    del weights["mlp1.1.bias"]
    save_file(weights, tmp_path / "model.safetensors")
    with pytest.raises(WeightsError, match=r"lacks 1 of the model's tensors .*linear_1\.bias"):
        captum_dcam.load(tmp_path, device="cpu")


def test_a_model_of_their_code_is_sent_to_load():
    class InternVLChatModel(torch.nn.Module):
        class config:
            model_type = "internvl_chat"

        weight = torch.nn.Parameter(torch.zeros(1))

    made = InternVLChatModel()
    made.register_parameter("p", torch.nn.Parameter(torch.zeros(1)))
    with pytest.raises(InputError, match=r"InternVL's own code: captum_dcam.load"):
        captum_dcam.wrap(made, made_ar.parts("internvl"))
