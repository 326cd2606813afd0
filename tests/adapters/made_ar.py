"""Tiny random instances of the real autoregressive classes, with real processors, made offline."""

from __future__ import annotations

import contextlib
import functools

import numpy as np
import pytest
import torch
from copying import copied
from PIL import Image

import captum_dcam
from captum_dcam.adapters.common.loading import Parts
from captum_dcam.model.forward import DenoisingForward

with contextlib.suppress(ImportError):  # `needs` says so where one is made
    from transformers import (
        AddedToken,
        CLIPVisionConfig,
        Gemma4Config,
        Gemma4ForConditionalGeneration,
        Gemma4TextConfig,
        InternVLConfig,
        InternVLForConditionalGeneration,
        InternVLVisionConfig,
        LlamaConfig,
        LlamaTokenizer,
        LlavaConfig,
        LlavaForConditionalGeneration,
        LlavaOnevisionConfig,
        LlavaOnevisionForConditionalGeneration,
        Qwen2_5_VLConfig,
        Qwen2_5_VLForConditionalGeneration,
        Qwen2Config,
        Qwen2Tokenizer,
        Qwen2VLConfig,
        Qwen2VLForConditionalGeneration,
        Qwen3_5Config,
        Qwen3_5ForConditionalGeneration,
        Qwen3VLConfig,
        Qwen3VLForConditionalGeneration,
        SiglipVisionConfig,
    )
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
    from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import GotOcr2ImageProcessorPil
    from transformers.models.llava_onevision.image_processing_pil_llava_onevision import (
        LlavaOnevisionImageProcessorPil,
    )
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

KINDS = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl", "llava", "internvl")
QWEN = KINDS[:3]
#: in the conformance suite alone: `gemma4_e` is small, with embeddings for every layer and layers
#: without keys and values, `gemma4` has images whose tokens see each other
LATER = ("qwen3_5", "llava_onevision", "gemma4", "gemma4_e")
PROMPT = "what is red ?"
WORDS = ("a", "red", "blue", "circle", "square", "is", "what", "the", "image")
LAYERS = 4

TEXT = dict(
    hidden_size=32,
    num_hidden_layers=LAYERS,
    num_attention_heads=4,
    num_key_value_heads=2,
    intermediate_size=48,
    max_position_embeddings=512,
    tie_word_embeddings=False,
    attention_dropout=0.0,
)
ROPE = {"rope_type": "default", "rope_theta": 10000.0}
MROPE = {**ROPE, "mrope_section": [1, 1, 2]}


SIGN = "<|vision_start|><|image_pad|><|vision_end|>"


def needs():
    """Skip where transformers does not have these families yet."""
    pytest.importorskip("transformers", minversion="5.23")


def chat_template(sign=SIGN):
    """One that writes of images and text what Qwen2-VL's own does."""
    return (
        "{% for m in messages %}{% if loop.first and m['role'] != 'system' %}<|im_start|>system\n"
        "You are a helpful assistant.<|im_end|>\n{% endif %}<|im_start|>{{ m['role'] }}\n"
        "{% for c in m['content'] %}{% if c['type'] == 'image' %}" + sign + "{% else %}"
        "{{ c['text'] }}{% endif %}{% endfor %}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )


# -- tokenizers ------------------------------------------------------------------------------------


def _merges(first):
    """Merges that make every word one token, ``first`` being the sign of a leading blank."""
    found = []
    for word in WORDS:
        parts = [first, *word]
        while len(parts) > 1:
            pair = (parts[0], parts[1])
            parts = ["".join(pair), *parts[2:]]
            if pair not in found:
                found.append(pair)
    return found


def _alphabet():
    from tokenizers.pre_tokenizers import ByteLevel

    return sorted(ByteLevel.alphabet())


@functools.cache
def byte_level(special, named=()):
    """A byte-level BPE tokenizer, as Qwen's and InternVL's; ``named``: (attribute, token) pairs."""
    needs()
    merges = _merges("Ġ")
    vocab = {t: i for i, t in enumerate([*_alphabet(), *("".join(m) for m in merges)])}
    tokenizer = Qwen2Tokenizer(
        vocab=vocab, merges=merges, pad_token="<|endoftext|>", extra_special_tokens=dict(named)
    )
    tokenizer.add_tokens([AddedToken(t, special=True) for t in special])
    return tokenizer


@functools.cache
def sentencepiece():
    """A BPE tokenizer with sentencepiece's signs and byte fallback, as LLaVA-1.5's."""
    needs()
    merges = _merges("▁")
    single = sorted({c for w in WORDS for c in w} | set("▁?:.,\nUSERAITN"))
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{b:02X}>" for b in range(256)), *single]
    tokens += ["".join(m) for m in merges]
    vocab = {t: i for i, t in enumerate(dict.fromkeys(tokens))}
    tokenizer = LlamaTokenizer(vocab=vocab, merges=merges, add_bos_token=True, pad_token="</s>")
    tokenizer.add_tokens([AddedToken("<image>", special=True, normalized=False)])
    return tokenizer


def qwen_tokenizer():
    vision = ("<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>")
    return byte_level(("<|im_start|>", "<|im_end|>", *vision))


def internvl_tokenizer():
    named = (
        ("start_image_token", "<img>"),
        ("end_image_token", "</img>"),
        ("context_image_token", "<IMG_CONTEXT>"),
        ("video_token", "<video>"),
    )
    return byte_level(("<|im_start|>", "<|im_end|>"), named)


def onevision_tokenizer():
    return byte_level(("<|im_start|>", "<|im_end|>", "<image>", "<video>"))


def gemma_tokenizer():
    import made_diffusion_gemma

    return made_diffusion_gemma.tokenizer()


TOKENIZERS = {
    **dict.fromkeys((*QWEN, "qwen3_5"), qwen_tokenizer),
    **dict.fromkeys(("gemma4", "gemma4_e"), gemma_tokenizer),
    "llava_onevision": onevision_tokenizer,
    "llava": sentencepiece,
    "internvl": internvl_tokenizer,
}


# -- processors ------------------------------------------------------------------------------------

QWEN_PIXELS = dict(
    patch_size=4,
    merge_size=2,
    temporal_patch_size=2,
    size={"shortest_edge": 16 * 16, "longest_edge": 64 * 64},
)


def image_processor(kind):
    needs()
    if kind in (*QWEN, "qwen3_5"):
        return Qwen2VLImageProcessorPil(**QWEN_PIXELS)
    if kind.startswith("gemma4"):
        import made_diffusion_gemma

        return made_diffusion_gemma.image_processor()
    if kind == "llava_onevision":
        tile = {"height": TILE, "width": TILE}
        return LlavaOnevisionImageProcessorPil(size=tile, image_grid_pinpoints=PINPOINTS)
    if kind == "llava":
        return CLIPImageProcessorPil(
            size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}
        )
    return GotOcr2ImageProcessorPil(size={"height": 32, "width": 32}, max_patches=4)


#: LLaVA-OneVision's views, of which patches of 4 px see 32, and (H, W) of its canvases
TILE = 34
PINPOINTS = [[TILE * h, TILE * w] for h, w in ((1, 1), (1, 2), (2, 1), (2, 2), (1, 3), (3, 1))]


class VideoSize:
    """Stands for a video processor where torchvision is missing: only its sizes are used."""

    def __init__(self):
        self.size = {"shortest_edge": 8 * 8, "longest_edge": 32 * 32 * 4}


def parts(kind):
    video = VideoSize() if kind in (*QWEN, "qwen3_5") else None
    return Parts(TOKENIZERS[kind](), image_processor(kind), video)


# -- models ----------------------------------------------------------------------------------------


def _ids(tokenizer, **tokens):
    return {name: tokenizer.convert_tokens_to_ids(token) for name, token in tokens.items()}


def _qwen2(cls, config, tokenizer, **vision):
    return cls(
        config(
            text_config=dict(
                **TEXT, vocab_size=len(tokenizer), rope_parameters=MROPE, eos_token_id=None
            ),
            vision_config=dict(
                depth=2,
                num_heads=2,
                in_channels=3,
                patch_size=4,
                spatial_merge_size=2,
                temporal_patch_size=2,
                **vision,
            ),
            **_ids(
                tokenizer,
                image_token_id="<|image_pad|>",
                video_token_id="<|video_pad|>",
                vision_start_token_id="<|vision_start|>",
                vision_end_token_id="<|vision_end|>",
            ),
        )
    )


def _model(kind):
    tokenizer = TOKENIZERS[kind]()
    count = len(tokenizer)
    if kind == "qwen2_vl":
        return _qwen2(
            Qwen2VLForConditionalGeneration, Qwen2VLConfig, tokenizer, embed_dim=16, hidden_size=32
        )
    if kind == "qwen2_5_vl":
        return _qwen2(
            Qwen2_5_VLForConditionalGeneration,
            Qwen2_5_VLConfig,
            tokenizer,
            hidden_size=16,
            out_hidden_size=32,
            intermediate_size=24,
            window_size=16,
            fullatt_block_indexes=[1],
        )
    if kind == "qwen3_vl":
        config = Qwen3VLConfig(
            text_config=dict(**TEXT, head_dim=8, vocab_size=count, rope_parameters=MROPE),
            vision_config=dict(
                depth=2,
                num_heads=2,
                in_channels=3,
                patch_size=4,
                spatial_merge_size=2,
                temporal_patch_size=2,
                hidden_size=16,
                out_hidden_size=32,
                intermediate_size=24,
                deepstack_visual_indexes=[0],
                num_position_embeddings=64,
            ),
            **_ids(
                tokenizer,
                image_token_id="<|image_pad|>",
                video_token_id="<|video_pad|>",
                vision_start_token_id="<|vision_start|>",
                vision_end_token_id="<|vision_end|>",
            ),
        )
        return Qwen3VLForConditionalGeneration(config)
    if kind in LATER:
        return {"qwen3_5": _qwen3_5, "llava_onevision": _onevision}.get(kind, _gemma4)(kind)
    if kind == "llava":
        config = LlavaConfig(
            text_config=LlamaConfig(**TEXT, vocab_size=count, rope_parameters=ROPE),
            vision_config=CLIPVisionConfig(
                hidden_size=16,
                intermediate_size=24,
                num_hidden_layers=2,
                num_attention_heads=2,
                image_size=32,
                patch_size=4,
            ),
            **_ids(tokenizer, image_token_id="<image>"),
        )
        return LlavaForConditionalGeneration(config)
    config = InternVLConfig(
        text_config=Qwen2Config(**TEXT, vocab_size=count, rope_parameters=ROPE),
        vision_config=InternVLVisionConfig(
            hidden_size=16,
            intermediate_size=24,
            num_hidden_layers=2,
            num_attention_heads=2,
            image_size=(32, 32),
            patch_size=(4, 4),
        ),
        image_seq_length=16,
        **_ids(tokenizer, image_token_id="<IMG_CONTEXT>"),
    )
    return InternVLForConditionalGeneration(config)


def _qwen3_5(kind):
    """Three blocks of linear attention to one of attention, as the published models have."""
    tokenizer = qwen_tokenizer()
    text = {**TEXT, "head_dim": 8, "vocab_size": len(tokenizer)}
    del text["attention_dropout"]
    config = Qwen3_5Config(
        text_config=dict(
            **text,
            rope_parameters={**MROPE, "partial_rotary_factor": 1.0, "mrope_interleaved": True},
            linear_key_head_dim=8,
            linear_value_head_dim=8,
            linear_num_key_heads=2,
            linear_num_value_heads=4,
        ),
        vision_config=dict(
            depth=2,
            num_heads=2,
            in_channels=3,
            patch_size=4,
            spatial_merge_size=2,
            temporal_patch_size=2,
            hidden_size=16,
            out_hidden_size=32,
            intermediate_size=24,
            num_position_embeddings=64,
        ),
        **_ids(
            tokenizer,
            image_token_id="<|image_pad|>",
            video_token_id="<|video_pad|>",
            vision_start_token_id="<|vision_start|>",
            vision_end_token_id="<|vision_end|>",
        ),
    )
    return Qwen3_5ForConditionalGeneration(config)


def _onevision(kind):
    tokenizer = onevision_tokenizer()
    config = LlavaOnevisionConfig(
        text_config=Qwen2Config(**TEXT, vocab_size=len(tokenizer), rope_parameters=ROPE),
        vision_config=SiglipVisionConfig(
            hidden_size=16,
            intermediate_size=24,
            num_hidden_layers=2,
            num_attention_heads=2,
            image_size=TILE,
            patch_size=4,
            vision_use_head=False,
        ),
        image_grid_pinpoints=PINPOINTS,
        vision_aspect_ratio="anyres_max_2",
        **_ids(tokenizer, image_token_index="<image>", video_token_index="<video>"),
    )
    return LlavaOnevisionForConditionalGeneration(config)


def _gemma4(kind):
    import made_diffusion_gemma

    tokenizer, small = gemma_tokenizer(), kind == "gemma4_e"
    own = made_diffusion_gemma.config()
    text = dict(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=6 if small else LAYERS,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        global_head_dim=16,
        sliding_window=48,
        layer_types=["sliding_attention", "full_attention"] * (3 if small else 2),
        max_position_embeddings=512,
        final_logit_softcapping=30.0,
        tie_word_embeddings=True,
        hidden_size_per_layer_input=8 if small else 0,
        vocab_size_per_layer_input=len(tokenizer),
    )
    if small:
        text.update(num_kv_shared_layers=2, use_double_wide_mlp=True)
    else:
        text.update(use_bidirectional_attention="vision", attention_k_eq_v=True)
    config = Gemma4Config(
        text_config=Gemma4TextConfig(**text),
        vision_config=own.vision_config,
        audio_config=None,
        video_token_id=tokenizer.convert_tokens_to_ids("<|video|>"),
        image_token_id=own.image_token_id,
        boi_token_id=own.boi_token_id,
        eoi_token_id=own.eoi_token_id,
        audio_token_id=tokenizer.convert_tokens_to_ids("<|audio|>"),
    )
    return Gemma4ForConditionalGeneration(config)


@copied
def model(kind, seed=0, dtype=torch.float32):
    """Random weights, enlarged so that attention and answers are far from uniform; a copy of its
    own for every caller."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        made = _model(kind)
        with torch.no_grad():
            for name, p in made.named_parameters():
                if p.ndim > 1 and "visual" not in name and "vision_tower" not in name:
                    # linear attention bends more than a finite difference sees
                    scale = 0.5 if "linear_attn" in name else 1.5
                    p.normal_(0, scale * p.shape[1] ** -0.5)
                elif kind == "llava_onevision" and "self_attn.out_proj" in name:
                    p.mul_(0.1)  # SigLIP's first weights blur
                elif "A_log" in name:
                    p.fill_(-2.0)  # what was read is remembered for a dozen tokens
            tokenizer = TOKENIZERS[kind]()
            spoken = [tokenizer(f"a {w}", add_special_tokens=False)["input_ids"][-1] for w in WORDS]
            made.lm_head.weight[spoken] *= 3  # so that answers are made of words
    made.generation_config.pad_token_id = tokenizer.pad_token_id
    end = {"llava": "</s>", "gemma4": "<turn|>", "gemma4_e": "<turn|>"}.get(kind, "<|im_end|>")
    made.generation_config.eos_token_id = tokenizer.convert_tokens_to_ids(end)
    made.generation_config.bos_token_id = None
    return made.eval().to(dtype)


def adapter(kind, cache="prefix", seed=0, dtype=torch.float32):
    return captum_dcam.wrap(model(kind, seed, dtype), parts(kind), cache=cache)


def picture(seed=0, size=(40, 40)):
    g = np.random.default_rng(seed)
    coarse = Image.fromarray(g.integers(0, 256, (5, 5, 3), dtype=np.uint8))
    return coarse.resize(size, Image.Resampling.BICUBIC)


def video(frames=5, size=(24, 16)):
    return [picture(100 + i, size) for i in range(frames)]


def bound(
    kind,
    cache="prefix",
    *,
    layer=1,
    pictures=None,
    prompts=(PROMPT,),
    seed=0,
    dtype=torch.float32,
    length=5,
    **settings,
):
    """A forward with a bound generation; by default one picture and one prompt."""
    made = adapter(kind, cache, seed, dtype)
    forward = DenoisingForward(made, layer)
    given = [[picture(b)] for b in range(len(prompts))] if pictures is None else pictures
    request = made.prepare(given, list(prompts))
    forward.generate(request, max_new_tokens=length, **settings)
    return forward


@functools.cache
def shared_adapter(kind):
    """An adapter that is made once: read, and change nothing."""
    return adapter(kind)


@functools.cache
def _shared(kind, cache):
    return bound(kind, cache, length=4)


def shared(kind, cache="prefix"):
    """A forward on a model and a generation that are made once: read, and change nothing."""
    return _shared(kind, cache).again()


class Doubled:
    """torch, where float32 is float64."""

    def __getattr__(self, name):
        return torch.float64 if name == "float32" else getattr(torch, name)


def exact(monkeypatch):
    """What families compute in float32 whatever they get (norms, linear attention) in float64."""
    needs()
    from transformers.models.gemma4 import modeling_gemma4
    from transformers.models.llama import modeling_llama
    from transformers.models.qwen2 import modeling_qwen2
    from transformers.models.qwen2_5_vl import modeling_qwen2_5_vl
    from transformers.models.qwen2_vl import modeling_qwen2_vl
    from transformers.models.qwen3_5 import modeling_qwen3_5
    from transformers.models.qwen3_vl import modeling_qwen3_vl

    modules = (
        modeling_gemma4,
        modeling_llama,
        modeling_qwen2,
        modeling_qwen2_5_vl,
        modeling_qwen2_vl,
        modeling_qwen3_5,
        modeling_qwen3_vl,
    )
    for module in modules:
        monkeypatch.setattr(module, "torch", Doubled())
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)
