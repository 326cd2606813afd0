"""Tiny random instances of the real DiffusionGemma classes, with real processors, made offline."""

from __future__ import annotations

import contextlib
import functools

import numpy as np
import pytest
import torch
from copying import copied
from PIL import Image
from transformers.utils import is_torchvision_available

import captum_dcam
from captum_dcam.adapters.common.loading import Parts
from captum_dcam.model.forward import DenoisingForward

with contextlib.suppress(ImportError):  # `tokenizer` says so where one is made
    from transformers import (
        AddedToken,
        DiffusionGemmaConfig,
        DiffusionGemmaForBlockDiffusion,
        DiffusionGemmaTextConfig,
        GemmaTokenizer,
    )
    from transformers.models.gemma4.configuration_gemma4 import Gemma4VisionConfig
    from transformers.models.gemma4.image_processing_pil_gemma4 import Gemma4ImageProcessorPil

# transformers marks the steps of CUDA graphs; elsewhere that imports torch's compiler for nothing
torch.compiler.cudagraph_mark_step_begin = lambda: None

TORCHVISION = is_torchvision_available()
PROMPT = "what is red ?"
WORDS = ("a", "red", "blue", "circle", "square", "is", "what", "the", "image")
LAYERS = 4
CANVAS = 6
PATCH, KERNEL = 4, 3
MARKERS = {
    "image_token": "<|image|>",
    "boi_token": "<|image>",
    "eoi_token": "<image|>",
    "audio_token": "<|audio|>",
    "boa_token": "<|audio>",
    "eoa_token": "<audio|>",
}
TURNS = ("<|turn>", "<turn|>", "<|video|>")


@functools.cache
def tokenizer():
    """Gemma's, with a vocabulary of words, letters and bytes."""
    pytest.importorskip("transformers.models.diffusion_gemma")
    start = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>", *MARKERS.values(), *TURNS]
    letters = sorted({c for w in WORDS for c in w} | set("▁?.,\nuser model"))
    merges, whole = [], []
    for word in WORDS:
        parts = ["▁", *word]
        while len(parts) > 1:
            merges.append((parts[0], parts[1]))
            parts = ["".join(parts[:2]), *parts[2:]]
            whole.append(parts[0])
    tokens = [*start, *(f"<0x{b:02X}>" for b in range(256)), *letters, *whole]
    vocab = {t: i for i, t in enumerate(dict.fromkeys(tokens))}
    made = GemmaTokenizer(
        vocab=vocab, merges=list(dict.fromkeys(merges)), extra_special_tokens=MARKERS
    )
    made.add_tokens([AddedToken(t, special=True) for t in TURNS])
    return made


def image_processor():
    return Gemma4ImageProcessorPil(patch_size=PATCH, pooling_kernel_size=KERNEL, max_soft_tokens=70)


def parts():
    return Parts(tokenizer(), image_processor())


def whole_processor():
    """The checkpoint's class, which holds a video processor and so needs torchvision."""
    import transformers as t

    image = t.Gemma4ImageProcessor(patch_size=PATCH, pooling_kernel_size=KERNEL, max_soft_tokens=70)
    audio, video = t.Gemma4AudioFeatureExtractor(), t.Gemma4VideoProcessor()
    return t.Gemma4Processor(audio, image, tokenizer(), video)


def save(model, folder):
    """Model and processor as a checkpoint has them; without torchvision the processor's parts."""
    model.save_pretrained(folder)
    token_texts = [whole_processor()] if TORCHVISION else [tokenizer(), image_processor()]
    for piece in token_texts:
        piece.save_pretrained(folder)


def config(**text):
    words = tokenizer()
    return DiffusionGemmaConfig(
        text_config=DiffusionGemmaTextConfig(
            **{
                "vocab_size": len(words),
                "hidden_size": 32,
                "intermediate_size": 48,
                "num_hidden_layers": LAYERS,
                "num_attention_heads": 4,
                "num_key_value_heads": 2,
                "head_dim": 8,
                "global_head_dim": 16,
                "num_global_key_value_heads": 1,
                "sliding_window": 48,
                "layer_types": [
                    "sliding_attention",
                    "full_attention",
                    "sliding_attention",
                    "full_attention",
                ],
                "use_bidirectional_attention": "vision",
                "num_experts": 4,
                "top_k_experts": 2,
                "moe_intermediate_size": 16,
                "max_position_embeddings": 512,
                **text,
            }
        ),
        vision_config=Gemma4VisionConfig(
            hidden_size=16,
            intermediate_size=24,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=2,
            head_dim=8,
            patch_size=PATCH,
            pooling_kernel_size=KERNEL,
            position_embedding_size=256,
        ),
        canvas_length=CANVAS,
        image_token_id=words.image_token_id,
        boi_token_id=words.boi_token_id,
        eoi_token_id=words.eoi_token_id,
    )


@copied
def model(seed=0, dtype=torch.float32, **text):
    """Random weights, enlarged so that attention and answers are far from uniform; a copy of its
    own for every caller."""
    made = config(**text)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        made = DiffusionGemmaForBlockDiffusion(made)
        made.set_experts_implementation("eager")  # others have no float64
        with torch.no_grad():
            for name, p in made.named_parameters():
                if p.ndim > 1 and "vision_tower" not in name and "embed_tokens" not in name:
                    p.normal_(0, 1.5 * p.shape[-1] ** -0.5)
                elif "position_embedding_table" in name:
                    p.normal_(0, 1)
            words = made.lm_head.weight.normal_(0, 0.6)  # tied to both embeddings
            spoken = [tokenizer().convert_tokens_to_ids(f"▁{w}") for w in WORDS]
            words[spoken] *= 2  # so that answers are made of words
    made.generation_config.pad_token_id = tokenizer().pad_token_id
    return made.eval().to(dtype)


def adapter(seed=0, dtype=torch.float32, **text):
    return captum_dcam.wrap(model(seed, dtype, **text), parts())


def picture(seed=0, size=(40, 40)):
    g = np.random.default_rng(seed)
    coarse = Image.fromarray(g.integers(0, 256, (5, 5, 3), dtype=np.uint8))
    return coarse.resize(size, Image.Resampling.BICUBIC)


def bound(
    *,
    layer=1,
    pictures=None,
    prompts=(PROMPT,),
    weights=0,
    dtype=torch.float32,
    canvases=1,
    steps=5,
    text=None,
    **settings,
):
    """A forward with a bound generation; by default one picture and one prompt."""
    made = adapter(weights, dtype, **(text or {}))
    forward = DenoisingForward(made, layer)
    given = [[picture(b)] for b in range(len(prompts))] if pictures is None else pictures
    request = made.prepare(given, list(prompts))
    forward.generate(request, gen_length=canvases * CANVAS, steps=steps, **{"seed": 0, **settings})
    return forward


@functools.cache
def _shared(canvases):
    return bound(canvases=canvases)


def shared(canvases=1):
    """A forward on a model and a generation that are made once: read, and change nothing."""
    return _shared(canvases).again()
