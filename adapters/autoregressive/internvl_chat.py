r"""InternVL's own checkpoints (type ``internvl_chat``), read into transformers' class.

InternVL2, 2.5, 3 and 3.5 are published twice: with ``-hf`` in their names for transformers, and for
their authors' code, which comes with the checkpoint. Both hold the same weights under other names,
the tower's queries, keys and values in one matrix. Here the second kind becomes the first; no code
of a checkpoint runs. Where the language model or its tokenizer is such code itself (InternLM, Phi),
or the configuration asks for what transformers' class does not do, the checkpoint is refused.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

from captum_dcam.adapters.common.loading import Parts, check_complete, given, placed, reading
from captum_dcam.errors import WeightsError
from captum_dcam.files import read_json

MODEL_TYPE = "internvl_chat"
#: language models that transformers has, with the same names of weights
LANGUAGE = {"LlamaForCausalLM": "llama", "Qwen2ForCausalLM": "qwen2", "Qwen3ForCausalLM": "qwen3"}
#: what must stand in the configuration, where it stands there
FIXED: dict[str, Any] = {
    "ps_version": "v2",
    "pad2square": False,
    "use_backbone_lora": 0,
    "use_llm_lora": 0,
    "use_thumbnail": True,
}
#: templates of ``conversation.py``: the system's message, and what ends a turn
TURNS = {
    "internvl2_5": (
        "你是书生·万象，英文名是InternVL，是由上海人工智能实验室、清华大学及多家合作单位联合开发的"
        "多模态大语言模型。",
        "<|im_end|>\n",
    ),
    "Hermes-2": (
        "你是由上海人工智能实验室联合商汤科技开发的书生多模态大模型，英文名叫InternVL, "
        "是一个有用无害的人工智能助手。",
        "<|im_end|>",
    ),
}
#: colours that the authors normalise with, ImageNet's
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
#: names of the authors', and transformers'
NAMES = (
    (r"^vision_model\.embeddings\.class_embedding", "model.vision_tower.embeddings.cls_token"),
    (
        r"^vision_model\.embeddings\.patch_embedding",
        "model.vision_tower.embeddings.patch_embeddings.projection",
    ),
    (
        r"^vision_model\.embeddings\.position_embedding",
        "model.vision_tower.embeddings.position_embeddings",
    ),
    (r"^vision_model\.encoder\.layers\.", "model.vision_tower.encoder.layer."),
    (r"\.attn\.proj\.", ".attention.projection_layer."),
    (r"\.attn\.([qk]_norm)\.", r".attention.\1."),
    (r"\.norm1\.", ".layernorm_before."),
    (r"\.norm2\.", ".layernorm_after."),
    (r"\.ls([12])$", r".lambda_\1"),
    (r"^mlp1\.0\.", "model.multi_modal_projector.layer_norm."),
    (r"^mlp1\.1\.", "model.multi_modal_projector.linear_1."),
    (r"^mlp1\.3\.", "model.multi_modal_projector.linear_2."),
    (r"^language_model\.model\.", "model.language_model."),
    (r"^language_model\.lm_head\.", "lm_head."),
)
FUSED = re.compile(r"^vision_model\.encoder\.layers\.(\d+)\.attn\.qkv\.(weight|bias)$")


def loaded(
    source: str,
    *,
    device: torch.device | str | None = None,
    dtype: torch.dtype | str = "auto",
    device_map: Any = None,
    revision: str | None = None,
    trust_remote_code: bool = False,
    attn_implementation: str | None = None,
) -> tuple[nn.Module, Parts]:
    r"""Model and processor of a checkpoint; arguments and errors as
    :func:`~captum_dcam.adapters.common.loading.image_text_model`. No remote code is needed, and
    none runs, allowed or not."""
    from transformers import InternVLForConditionalGeneration

    folder = _folder(source, revision)
    own = read_json(folder / "config.json", WeightsError, "fetch the checkpoint again")
    check(source, own)
    with reading(source):
        tokenizer = _tokenizer(folder, own)
        config = configuration(own, tokenizer)
        if dtype == "auto":
            dtype = own.get("torch_dtype") or own.get("dtype") or "bfloat16"
        model, info = InternVLForConditionalGeneration.from_pretrained(
            None,
            config=config,
            state_dict=dict(converted(_weights(folder))),
            dtype=getattr(torch, dtype) if isinstance(dtype, str) else dtype,
            output_loading_info=True,
            **given(device_map=device_map, attn_implementation=attn_implementation),
        )
        check_complete(source, info["missing_keys"], "InternVL checkpoint")
        if left := sorted(info["unexpected_keys"]):
            raise WeightsError(
                f"{source} holds {len(left)} tensors that transformers' InternVL has no place for "
                f"({', '.join(left[:3])}, …): use the checkpoint whose name ends with -hf"
            )
    generation = model.generation_config
    generation.eos_token_id = tokenizer.convert_tokens_to_ids("<|im_end|>")
    generation.pad_token_id = tokenizer.pad_token_id
    return placed(model, device, device_map), _parts(own, tokenizer)


def _folder(source: str, revision: str | None) -> Path:
    if Path(source).is_dir():
        return Path(source)
    from huggingface_hub import snapshot_download

    files = ["*.json", "*.safetensors", "*.txt"]  # not its code
    return Path(snapshot_download(source, revision=revision, allow_patterns=files))


def check(source: str, own: Mapping[str, Any]) -> None:
    """WeightsError for a checkpoint that transformers' class cannot be."""
    hint = "; use the checkpoint of the same model whose name ends with -hf"
    language, vision = own.get("llm_config") or {}, own.get("vision_config") or {}
    (kind, *_) = language.get("architectures") or [None]
    if kind not in LANGUAGE:
        raise WeightsError(
            f"{source} has the language model {kind}, whose code comes with the checkpoint: "
            f"expected one of {', '.join(LANGUAGE)}{hint}"
        )
    for name, wanted in FIXED.items():
        if own.get(name, wanted) != wanted:
            raise WeightsError(
                f"{source} has {name}={own[name]!r}, with which transformers' InternVL is another "
                f"model: expected {wanted!r}{hint}"
            )
    side, forced = vision.get("image_size"), own.get("force_image_size")
    if forced not in (None, side):
        raise WeightsError(
            f"{source} has force_image_size={forced} and a tower of {side} px, whose positions "
            f"would have to be stretched: expected the same{hint}"
        )
    if own.get("template") not in TURNS:
        raise WeightsError(
            f"{source} writes questions by the template {own.get('template')!r}: expected one of "
            f"{', '.join(TURNS)}{hint}"
        )


def configuration(own: Mapping[str, Any], tokenizer: Any) -> Any:
    """transformers' configuration of a checkpoint of the authors'."""
    from transformers import AutoConfig, InternVLConfig, InternVLVisionConfig

    vision, language = own["vision_config"], dict(own["llm_config"])
    language["model_type"] = LANGUAGE[language["architectures"][0]]
    language["tie_word_embeddings"] = False  # as the authors' code has it, whatever the file says
    same = (
        *("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size"),
        *("hidden_act", "norm_type", "layer_norm_eps", "image_size", "patch_size"),
    )
    side = vision["image_size"] // vision["patch_size"] * own["downsample_ratio"]
    return InternVLConfig(
        text_config=AutoConfig.for_model(**language),
        vision_config=InternVLVisionConfig(
            **{name: vision[name] for name in same if name in vision},
            attention_bias=vision.get("qkv_bias", False),
            use_qk_norm=vision.get("qk_normalization", True),
        ),
        image_token_id=tokenizer.convert_tokens_to_ids("<IMG_CONTEXT>"),
        image_seq_length=int(side) ** 2,
        downsample_ratio=own["downsample_ratio"],
        vision_feature_layer=own.get("select_layer", -1),
        tie_word_embeddings=False,
    )


def _tokenizer(folder: Path, own: Mapping[str, Any]) -> Any:
    from transformers import AutoConfig, AutoTokenizer

    kind = LANGUAGE[own["llm_config"]["architectures"][0]]
    return AutoTokenizer.from_pretrained(folder, config=AutoConfig.for_model(kind))


def _weights(folder: Path) -> Iterator[tuple[str, Tensor]]:
    """Names and tensors of all files."""
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise WeightsError(f"{folder} holds no *.safetensors: fetch the checkpoint again")
    for path in files:
        with safe_open(path, "pt") as held:
            for name in held.keys():
                yield name, held.get_tensor(name)


def converted(weights: Iterator[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
    """The authors' weights as transformers' names and shapes them."""
    for name, value in weights:
        fused = FUSED.match(name)
        if fused is not None:
            layer, kind = fused.groups()
            for which, part in zip("qkv", value.chunk(3), strict=True):
                place = f"model.vision_tower.encoder.layer.{layer}.attention.{which}_proj.{kind}"
                yield place, part.contiguous()
            continue
        for theirs, ours in NAMES:
            name = re.sub(theirs, ours, name)
        yield name, value


def _parts(own: Mapping[str, Any], tokenizer: Any) -> Parts:
    """The processor of the authors' demo: as many tiles as the configuration says, its template."""
    from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import GotOcr2ImageProcessorPil

    side, tiles = own["vision_config"]["image_size"], bool(own.get("dynamic_image_size", False))
    images = GotOcr2ImageProcessorPil(
        size={"height": side, "width": side},
        min_patches=own.get("min_dynamic_patch", 1) if tiles else 1,
        max_patches=own.get("max_dynamic_patch", 6) if tiles else 1,
        image_mean=list(MEAN),
        image_std=list(STD),
        crop_to_patches=True,
    )
    system, end = TURNS[own["template"]]
    system = own.get("system_message") or system
    return Parts(tokenizer, images, None, _template(system, end))


def _template(system: str, end: str) -> str:
    """A chat template that writes what the authors' conversation does."""
    told, turn = (repr(text) for text in (f"<|im_start|>system\n{system}{end}", end))
    return (
        f"{{% if messages[0]['role'] != 'system' %}}{{{{ {told} }}}}{{% endif %}}"
        "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}"
        "{% for c in m['content'] %}{% if c['type'] == 'image' %}{{ '<IMG_CONTEXT>\n' }}"
        "{% elif c['type'] == 'video' %}{{ '<video>\n' }}{% else %}{{ c['text'] }}{% endif %}"
        f"{{% endfor %}}{{{{ {turn} }}}}{{% endfor %}}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    )
