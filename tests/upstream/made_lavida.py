"""Tiny random-weight models of LaViDa's own classes, from the checkout that
CAPTUM_DCAM_UPSTREAM_LAVIDA names."""

import contextlib
import json
import os
import sys
import warnings

import pytest
import torch
import torch._dynamo
from doubles import lavida as double

from captum_dcam.adapters.lavida import compat
from captum_dcam.model.buffers import repair

NAME = "CAPTUM_DCAM_UPSTREAM_LAVIDA"
COMMIT = "284ef5c"  # of the checkout that the results in the docs are from
PINS = "[(384, 768), (768, 384), (768, 768), (1152, 384), (384, 1152)]"
MASK, EOS, VOCABULARY = 90, 91, 96


def package():
    """Upstream's builder; its decoder layers are not compiled, which takes minutes on a CPU."""
    torch._dynamo.config.disable = True
    sys.path.insert(0, os.environ[NAME])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return compat.package()


def tower(folder, width=16):
    """A folder with a tiny SigLIP; upstream takes it for one because of its name."""
    from llava.model.multimodal_encoder.siglip_encoder import SigLipVisionConfig, SigLipVisionModel

    config = SigLipVisionConfig(
        hidden_size=width, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2
    )
    path = str(folder / "tiny-siglip")
    SigLipVisionModel(config).save_pretrained(path)
    return path


def config(variant, **changes):
    from llava.model.language_model.llava_dream import LlavaDreamConfig
    from llava.model.language_model.llava_llada import LlavaLladaConfig

    shared = dict(
        image_aspect_ratio="anyres",
        image_grid_pinpoints=PINS,
        mm_patch_merge_type="spatial_unpad",
        mm_spatial_pool_mode="bilinear",
        tokenizer_model_max_length=8192,
        vocab_size=VOCABULARY,
        mask_token_id=MASK,
        eos_token_id=EOS,
        pad_token_id=EOS,
    )
    shared |= changes
    if variant == "dream":
        return LlavaDreamConfig(
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=4,
            num_attention_heads=2,
            num_key_value_heads=1,
            max_position_embeddings=8192,
            **shared,
        )
    return LlavaLladaConfig(
        d_model=32,
        n_heads=2,
        n_kv_heads=2,
        n_layers=4,
        mlp_hidden_size=64,
        embedding_size=VOCABULARY,
        max_sequence_length=8192,
        rope=True,
        include_bias=False,
        layer_norm_type="rms",
        block_type="llama",
        activation_type="silu",
        weight_tying=False,
        flash_attention=False,
        attention_dropout=0.0,
        residual_dropout=0.0,
        embedding_dropout=0.0,
        **shared,
    )


def model(variant, folder, seed=0, **changes):
    from llava.model.language_model.llava_dream import LlavaDreamForMaskedDiffusion
    from llava.model.language_model.llava_llada import LlavaLladaForMaskedDiffusion

    cls = {"llada": LlavaLladaForMaskedDiffusion, "dream": LlavaDreamForMaskedDiffusion}[variant]
    sight = dict(
        mm_vision_tower=tower(folder),
        mm_resampler_type=None,
        mm_projector_type="mlp2x_gelu",
        mm_hidden_size=16,
        use_mm_proj=True,
    )
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.manual_seed(seed)
        made = cls(config(variant, **changes), vision_kwargs=sight)
        spread(made)
    repair(made)
    return made.float().eval()


@torch.no_grad()
def spread(model):
    """Weights so large that attention is far from uniform and answers vary."""
    for name, weight in model.named_parameters():
        if weight.ndim == 1:
            weight.fill_(1.0) if "norm" in name or "ln" in name else weight.zero_()
        else:
            weight.normal_(std=weight[0].numel() ** -0.5)
        if "q_proj" in name or "k_proj" in name:
            weight.mul_(2)
        if "vision_tower" in name and ("out_proj" in name or "fc2" in name):
            weight.mul_(0.1)  # tokens stay where their pixels are
        if "wte" in name or "embed_tokens" in name or "image_newline" in name:
            weight.normal_()


def save_tokenizer(folder, vocabulary=VOCABULARY):
    """A tokenizer of the double's words in transformers' own format."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = {**{w: i for i, w in enumerate(double.WORDS)}, **double.MARKERS}
    words |= {f"w{i}": i for i in range(vocabulary) if i not in words.values()}
    inner = Tokenizer(models.WordLevel(words, unk_token="!"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    made_up = PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="<|eos|>")
    made_up.chat_template = (
        "{% for m in messages %}{{ m['role'] }} {{ m['content'] }} {% endfor %}assistant"
    )
    made_up.save_pretrained(folder)
    described = json.loads((folder / "tokenizer_config.json").read_text())
    described["tokenizer_class"] = "PreTrainedTokenizerFast"  # as the checkpoints say
    (folder / "tokenizer_config.json").write_text(json.dumps(described))
    config = json.loads((folder / "config.json").read_text())
    assert config["architectures"][0].startswith("Llava")


@contextlib.contextmanager
def exact():
    """Norms and rotary embeddings in the model's own type: upstream computes them in float32."""
    from llava.model.language_model.dream import modeling_dream as dream
    from llava.model.language_model.llada import modeling_llada as llada

    def llada_norm(self, x):
        return self.weight * x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps)

    def dream_norm(self, x):
        scale = torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.variance_epsilon)
        return self.weight * x * scale

    def full_precision(self, q, k):
        sin, cos = (t.type_as(q) for t in self.get_rotary_embedding(k.shape[-2], q.device))
        seen = k.shape[-2] - q.shape[-2]
        turn = self.apply_rotary_pos_emb
        return turn(sin[:, :, seen:], cos[:, :, seen:], q), turn(sin, cos, k)

    patch = pytest.MonkeyPatch()
    patch.setattr(llada.RMSLayerNorm, "forward", llada_norm)
    patch.setattr(llada.RotaryEmbedding, "forward", full_precision)
    patch.setattr(dream.DreamRMSNorm, "forward", dream_norm)
    try:
        yield
    finally:
        patch.undo()
