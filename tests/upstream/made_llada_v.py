"""Tiny random-weight models of the classes of LLaDA-V, ReDiff and VidLaDA, behind the double's
small tower."""

import subprocess
from contextlib import contextmanager

import torch
from doubles import llada_v as double

from captum_dcam.adapters.llada_v.loading import plain_rope


def config(kind, vocabulary=double.VOCABULARY, **changes):
    """Of a class of configurations."""
    made = kind(
        vocab_size=vocabulary,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=8192,
        use_cache=False,
    )
    plain_rope(made)
    made._attn_implementation = "sdpa"
    options = {
        "image_aspect_ratio": "anyres_max_4",
        "mm_patch_merge_type": "spatial_unpad",
        "image_grid_pinpoints": [[48 * w, 48 * h] for w in range(1, 7) for h in range(1, 7)],
        "tokenizer_model_max_length": 8192,
        "mm_use_im_start_end": False,
        **changes,
    }
    for name, value in options.items():
        setattr(made, name, value)
    return made


def model(cls, configuration, dtype=torch.float32, tile=48, seed=0):
    """The upstream language model and packing, behind the double's small tower."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        made = cls(configuration)
        made.model.vision_tower = double.Tower(16, tile)
        made.model.mm_projector = torch.nn.Linear(16, 16)
        made.model.image_newline = torch.nn.Parameter(torch.randn(16))
        with torch.no_grad():
            for name, parameter in made.named_parameters():
                if parameter.ndim == 2 and "tower" not in name:
                    parameter.normal_(std=0.5)
    return made.to(dtype).eval()


@contextmanager
def exact(made):
    """Upstream's norms compute in float32 even in a float64 model: not in here."""
    cls = type(made.model.norm)
    before = cls.forward

    def norm(self, x):
        return self.weight * x * (x.pow(2).mean(-1, keepdim=True) + self.variance_epsilon).rsqrt()

    cls.forward = norm
    try:
        yield
    finally:
        cls.forward = before


def commit(folder):
    """Of a checkout, seven digits."""
    told = ["git", "-C", folder, "rev-parse", "--short=7", "HEAD"]
    return subprocess.run(told, capture_output=True, text=True, check=True).stdout.strip()
