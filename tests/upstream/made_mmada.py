"""Tiny random-weight models of MMaDA's own classes, from the checkout that
CAPTUM_DCAM_UPSTREAM_MMADA names."""

import os
import sys
from contextlib import contextmanager

import torch
from doubles import mmada as double
from doubles import mmada_checks as suite

import captum_dcam
from captum_dcam.adapters.mmada import compat

FOLDER = os.environ.get("CAPTUM_DCAM_UPSTREAM_MMADA")
COMMIT = "3cdb870"


def package():
    """Upstream's package, repaired."""
    sys.path.insert(0, FOLDER)
    try:
        return compat.package()
    finally:
        sys.path.remove(FOLDER)


@contextmanager
def exact():
    """Upstream's norms and positions compute in float32 even in a float64 model: not in here."""
    from models import modeling_llada

    norms, turns = modeling_llada.RMSLayerNorm, modeling_llada.RotaryEmbedding
    before = norms.forward, turns.forward

    def norm(self, x):
        return self.weight * x * (x.pow(2).mean(-1, keepdim=True) + self.eps).rsqrt()

    def rotary(self, q, k):
        self.config.rope_full_precision = False
        return before[1](self, q, k)

    norms.forward, turns.forward = norm, rotary
    try:
        yield
    finally:
        norms.forward, turns.forward = before


def config(upstream, **changes):
    shape = dict(
        d_model=32,
        n_heads=4,
        n_layers=4,
        mlp_hidden_size=64,
        max_sequence_length=256,
        vocab_size=double.TEXT,
        embedding_size=double.TEXT + double.CODES,
        codebook_size=double.CODES,
        weight_tying=False,
        rope=True,
        block_type="llama",
        activation_type="silu",
        layer_norm_type="rms",
        attention_dropout=0.0,
        residual_dropout=0.0,
        embedding_dropout=0.0,
        include_bias=False,
        use_cache=False,
        eos_token_id=126081,
        pad_token_id=126081,
        mask_token_id=double.MASK,
    )
    from models.configuration_llada import LLaDAConfig

    filled = LLaDAConfig(**{**shape, **changes}).to_dict()
    made = upstream.MMadaConfig(**{k: v for k, v in filled.items() if k != "model_type"})
    made.codebook_size = double.CODES
    return made


def model(upstream, dtype=torch.float32):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        made = upstream.MMadaModelLM(config(upstream))
        for name, p in made.named_parameters():
            if p.ndim > 1:
                torch.nn.init.normal_(p, std=1.0 if "wte" in name else p.shape[-1] ** -0.5)
            else:
                torch.nn.init.ones_(p)
            if "k_proj" in name:
                p.data.mul_(3)
    return made.to(dtype).eval()


def vq(upstream):
    """The real encoder's code, narrow (its norms want 32 channels), with weights that keep things
    in their place as a trained encoder does: at random ones a patch changes far tokens most."""
    made = upstream.MAGVITv2.__new__(upstream.MAGVITv2)
    torch.nn.Module.__init__(made)
    from models.modeling_magvitv2 import LFQuantizer, VQGANEncoder

    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        made.encoder = VQGANEncoder(ch=32, ch_mult=[1, 1, 1, 1, 1], num_res_blocks=[1] * 5)
        made.quantize = LFQuantizer()
        mean = torch.tensor([[1.0, 1.0, 0.0], [1.0, 1.0, 0.0], [0.0, 0.0, 0.0]]) / 4
        middle = torch.zeros(3, 3)
        middle[1, 1] = 3
        for name, p in made.encoder.named_parameters():
            if "downsample" in name and p.ndim == 4:
                p.copy_(torch.eye(32)[..., None, None] * mean)
            elif name in ("conv_in.weight", "conv_out.weight"):
                p.mul_(middle)
            elif "conv2.weight" in name or "proj_out.weight" in name:
                p.mul_(0.05)
    return made.eval()


def adapter(upstream, vq, dtype=torch.float32):
    return captum_dcam.wrap(model(upstream, dtype), (double.tokenizer(), vq), resolution=suite.SIDE)
