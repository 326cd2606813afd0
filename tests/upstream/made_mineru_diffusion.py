"""Tiny random-weight models of MinerU-Diffusion's own classes, from the checkout that
CAPTUM_DCAM_UPSTREAM_MINERU_DIFFUSION names."""

import importlib
import os
import sys
from contextlib import contextmanager

import pytest
import torch
from doubles import block
from doubles import dream_vl as qwen
from doubles.mineru_diffusion import LENGTH, TEMPLATE
from transformers.cache_utils import DynamicCache

import captum_dcam
from captum_dcam.adapters.common.loading import Parts

FOLDER = os.environ.get("CAPTUM_DCAM_UPSTREAM_MINERU_DIFFUSION")
COMMIT = "8d456f1"


def package():
    """Upstream's modules of model and configuration; skips where transformers' caches are such as
    its code cannot read."""
    cache = DynamicCache()
    cache.update(*torch.zeros(2, 1, 1, 1, 1), 0)
    if hasattr(cache, "layers") and not hasattr(cache.layers[0], "is_initialized"):
        pytest.skip("upstream cannot read the caches of transformers 4.54 to 4.56")
    if FOLDER not in sys.path:
        sys.path.insert(0, FOLDER)
    names = ("modeling_mineru_diffusion", "configuration_mineru_diffusion")
    return [importlib.import_module(f"mineru_diffusion.{name}") for name in names]


@contextmanager
def exact():
    """Upstream's norms compute in float32 even in a float64 model: not in here."""
    cls = package()[0].SDARRMSNorm
    before = cls.forward

    def norm(self, x):
        return self.weight * (x * (x.pow(2).mean(-1, keepdim=True) + self.variance_epsilon).rsqrt())

    cls.forward = norm
    try:
        yield
    finally:
        cls.forward = before


def model(upstream, dtype=torch.float32):
    modeling, configuration = upstream
    ids = dict(zip(qwen.MARKERS, qwen.tokenizer().convert_tokens_to_ids(qwen.MARKERS), strict=True))
    vision = dict(model_type="qwen2_vl", depth=2, embed_dim=32, hidden_size=48, num_heads=2)
    config = configuration.MinerUDiffusionConfig(
        text_config={**block.SIZES, "head_dim": 16, "rope_theta": 1e4, "pad_token_id": 0},
        vision_config={**vision, "patch_size": 14},
        image_token_id=ids["<|image_pad|>"],
        mask_token_id=ids["<|mask|>"],
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        made = modeling.MinerUDiffusionForConditionalGeneration(config)
        block.draw(made, config.mask_token_id, 4.0)
    return made.to(dtype).eval()


def adapter(upstream, dtype=torch.float32):
    processor = Parts(qwen.tokenizer(), qwen.ImageProcessor(), None, TEMPLATE)
    return captum_dcam.wrap(model(upstream, dtype), processor, block_length=LENGTH)
