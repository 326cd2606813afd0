"""Tiny random-weight models of DiffusionVL's own classes (package ``llava``), from the checkout
that CAPTUM_DCAM_UPSTREAM_DIFFUSION_VL names."""

import os
import sys
import tempfile
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from doubles import block
from doubles import dream_vl as qwen
from doubles.diffusion_vl import LENGTH

import captum_dcam
from captum_dcam.adapters.common.loading import Parts

FOLDER = os.environ.get("CAPTUM_DCAM_UPSTREAM_DIFFUSION_VL")
COMMIT = "8692304"
MASK = 151671


def package():
    """Upstream's module of the model; skips where transformers lacks what it imports."""
    family = pytest.importorskip("transformers.models.qwen2_5_vl.modeling_qwen2_5_vl")
    if not hasattr(family, "apply_multimodal_rotary_pos_emb"):
        pytest.skip("upstream imports a function that transformers 5 does not have")
    folder = str(Path(FOLDER) / "train")
    if folder not in sys.path:
        sys.path.insert(0, folder)
    from llava.model.language_model import llava_diffusionvl_qwenvl

    return llava_diffusionvl_qwenvl


@contextmanager
def exact():
    """Norms compute in float32 even in a float64 model: not in here."""
    from transformers.models.qwen2_5_vl import modeling_qwen2_5_vl as family

    cls = family.Qwen2RMSNorm
    before = cls.forward

    def norm(self, x):
        return self.weight * (x * (x.pow(2).mean(-1, keepdim=True) + self.variance_epsilon).rsqrt())

    cls.forward = norm
    try:
        yield
    finally:
        cls.forward = before


def model(upstream, dtype=torch.float32):
    sizes = {**block.SIZES, "vocab_size": MASK + 1, "rope_theta": 1e4}
    sizes["rope_scaling"] = {"type": "default", "rope_type": "default", "mrope_section": [2, 3, 3]}
    vision = dict(depth=2, hidden_size=32, intermediate_size=48, num_heads=2, out_hidden_size=48)
    vision |= dict(patch_size=14, fullatt_block_indexes=[1], window_size=56)
    token = qwen.tokenizer().convert_tokens_to_ids("<|image_pad|>")
    config = upstream.DiffusionVLQwenVLConfig(
        vision_config=vision, text_config=sizes, image_token_id=token, bd3lm_block_size=LENGTH,
        enable_bd3lm=True,
    )  # fmt: skip
    config.mm_projector_type = "qwen_merger"
    with tempfile.TemporaryDirectory(suffix="qwen") as tower, torch.random.fork_rng(devices=[]):
        from transformers import Qwen2VLImageProcessor

        Qwen2VLImageProcessor().save_pretrained(tower)
        config.mm_vision_tower = tower
        torch.manual_seed(0)
        made = upstream.DiffusionVLQwenVLForCausalLM(config)
        made.get_vision_tower().load_model()
        block.draw(made, MASK, 4.0)  # 151672 logits share what is sure
        made.lm_head.weight.data[block.SIZES["vocab_size"] :] = 0  # so that words are written
    return made.to(dtype).eval()


def adapter(upstream, dtype=torch.float32):
    processor = Parts(qwen.tokenizer(), qwen.ImageProcessor(), None, qwen.TEMPLATE)
    return captum_dcam.wrap(model(upstream, dtype), processor)
