"""Tiny random-weight models of Lumina-DiMOO's own classes and its own loop, from the checkout that
CAPTUM_DCAM_UPSTREAM_LUMINA_DIMOO names."""

import os
import sys
from contextlib import contextmanager

import torch
from doubles import mmada as double
from doubles import mmada_checks as suite

from captum_dcam.adapters.mmada import compat
from captum_dcam.adapters.mmada.facts import LUMINA

FOLDER = os.environ.get("CAPTUM_DCAM_UPSTREAM_LUMINA_DIMOO")
COMMIT = "81344e6"
#: the double's ids below the vocabulary; the classes know none by number
SHAPE = dict(
    d_model=32, n_heads=4, n_layers=4, mlp_hidden_size=64, max_sequence_length=512,
    vocab_size=double.TEXT, embedding_size=double.TEXT + double.CODES, weight_tying=False,
    rope=True, block_type="llama", activation_type="silu", layer_norm_type="rms",
    attention_dropout=0.0, residual_dropout=0.0, embedding_dropout=0.0, include_bias=False,
    use_cache=False, eos_token_id=double.IDS.eos, pad_token_id=double.IDS.eos,
    mask_token_id=double.MASK,
)  # fmt: skip


@contextmanager
def importing():
    """The checkout's modules, whose names (model, utils, config) are anybody's."""
    sys.path.insert(0, FOLDER)
    try:
        yield
    finally:
        sys.path.remove(FOLDER)


def package():
    """Upstream's package, repaired, and its function that writes an answer."""
    with importing():
        from generators.text_understanding_generator import generate_text_understanding

        return compat.rows_package(), generate_text_understanding


@contextmanager
def exact():
    """Upstream's norms and positions compute in float32 even in a float64 model: not in here."""
    with importing():
        from model import modeling_llada

    norms, turns = modeling_llada.RMSLayerNorm, modeling_llada.RotaryEmbedding
    before = norms.forward, turns.forward

    def norm(self, x):
        return self.weight * x * (x.pow(2).mean(-1, keepdim=True) + self.eps).rsqrt()

    def rotary(self, q, k, q_mask=None):
        self.config.rope_full_precision = False
        return before[1](self, q, k, q_mask)

    norms.forward, turns.forward = norm, rotary
    try:
        yield
    finally:
        norms.forward, turns.forward = before


def model(dtype=torch.float32):
    found, _ = package()
    cls = getattr(found, LUMINA)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        made = cls(cls.config_class(**SHAPE))
        for name, p in made.named_parameters():
            if p.ndim > 1:
                torch.nn.init.normal_(p, std=1.0 if "wte" in name else p.shape[-1] ** -0.5)
            else:
                torch.nn.init.ones_(p)
            if "k_proj" in name:
                p.data.mul_(3)
    return made.to(dtype).eval()


def adapter(dtype=torch.float32):
    parts = double.tokenizer(tags=double.TAGS), double.vq(dtype=dtype, rows=True)
    return suite.RowsAdapter(model(dtype), parts, resolution=suite.SIDE)


def loop(model, ids, code_start, **settings):
    """The script's function; it writes into what it is given."""
    return package()[1](model, ids.clone(), code_start=code_start, mask_id=double.MASK, **settings)
