"""LaViDa-O's upstream code, its language model and packing behind the double's small tower.

``CAPTUM_DCAM_UPSTREAM_LAVIDA_O=/folder/LaVida-O``: a checkout under its own licence. Of what it
imports for training and for making pictures (flash-attn, deepspeed, diffusers, torchvision, …),
empty stand-ins take the place where it is not installed; the understanding path calls none of it.
"""

import importlib.machinery
import importlib.util
import logging
import os
import subprocess
import sys
import types
from contextlib import contextmanager
from pathlib import Path

import torch
from doubles import lavida_o as double
from torch import nn

import captum_dcam
from captum_dcam.adapters.common.compat import deepspeed, moved_names
from captum_dcam.adapters.lavida_o.loading import repair_classes
from captum_dcam.testing import AdapterCase

HERE = Path(__file__).parent
FOLDER = os.environ.get("CAPTUM_DCAM_UPSTREAM_LAVIDA_O")
UNUSED = frozenset(
    "flash_attn diffusers torchvision timm omegaconf einops pytz cv2 tensorboard peft "
    "decord kornia lpips imageio pandas sklearn open_clip ftfy datasets xformers webdataset tap "
    "transformer_engine requests".split()
)


class Empty(types.ModuleType):
    """Whatever is asked for: a class, a decorator that does nothing, a constant."""

    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        if name == "logging":
            made = types.SimpleNamespace(get_logger=logging.getLogger)
        elif name.isupper():
            made = (0.5, 0.5, 0.5)
        elif name[0].islower():
            made = decorator
        else:
            made = type(name, (nn.Module,), {})
        setattr(self, name, made)
        return made


def decorator(*args, **options):
    bare = len(args) == 1 and callable(args[0]) and not options
    return args[0] if bare else decorator


class Finder:
    """Finds empty modules in place of packages that are not installed; asked last."""

    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in UNUSED:
            return importlib.machinery.ModuleSpec(name, self, is_package=True)
        return None

    def create_module(self, spec):
        return Empty(spec.name)

    def exec_module(self, module):
        module.__path__ = []


@contextmanager
def stand_ins():
    finder, before = Finder(), set(sys.modules)
    sys.meta_path.append(finder)
    try:
        yield
    finally:
        sys.meta_path.remove(finder)
        for name in set(sys.modules) - before:
            if name.partition(".")[0] in UNUSED and isinstance(sys.modules[name], Empty):
                del sys.modules[name]


def package():
    os.environ.update(NOT_ALWASY_DO_2DPOOL="1", DEBUG_FIX_PADDING="1", HF_HUB_OFFLINE="1")
    sys.path.insert(0, FOLDER)
    moved_names()
    with deepspeed(), stand_ins():
        found = importlib.import_module("llava.model.language_model.llava_llada")
    repair_classes(found)
    return found


def config(upstream, **changes):
    made = upstream.LlavaLladaConfig(
        d_model=32, n_heads=2, n_kv_heads=2, n_layers=4, mlp_hidden_size=64,
        embedding_size=126464, vocab_size=126464, max_sequence_length=8192,
        rope=True, include_bias=False, layer_norm_type="rms", block_type="llama",
        activation_type="silu", weight_tying=False, flash_attention=False, attention_dropout=0.0,
        residual_dropout=0.0, embedding_dropout=0.0, mask_token_id=double.MASK, eos_token_id=91,
        pad_token_id=91,
    )  # fmt: skip
    own = vars(double.config())
    names = ("image_aspect_ratio", "image_grid_pinpoints", "mm_patch_merge_type")
    shape = {n: own[n] for n in names} | {
        "tokenizer_model_max_length": 8192, "use_cache": False, "dual_tower": True,
        "dual_tower_layers": 9999, "d_model_gen": 32, "mlp_hidden_size_gen": 64,
        "mm_spatial_pool_stride": 2, "mm_spatial_pool_mode": "conv",
    }  # fmt: skip
    for name, value in {**shape, **changes}.items():
        setattr(made, name, value)
    return made


def model(upstream, dtype=torch.float32, tile=104, seed=0, **changes):
    from llava.model.multimodal_resampler.spatial_pool import SpatialPool

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        made = upstream.LlavaLladaForMaskedDiffusion(config(upstream, **changes))
        inner = made.model
        inner.vision_tower = double.base.Tower(8, tile)
        inner.vision_tower.hidden_size = 8
        inner.vision_resampler = SpatialPool(made.config, inner.vision_tower)
        inner.mm_projector = nn.Linear(8, 32)
        inner.image_newline = nn.Parameter(torch.empty(32))
        with torch.no_grad():
            for name, weight in made.named_parameters():
                if weight.ndim == 1:
                    norm = "norm" in name or "ln_f" in name
                    weight.fill_(1.0) if norm else weight.zero_()
                elif "vision" not in name:
                    weight.normal_(std=(2.0 if "_proj" in name else 1.0) * weight.shape[-1] ** -0.5)
            inner.transformer.wte.weight.normal_()
            inner.image_newline.normal_()
    return made.to(dtype).eval()


@contextmanager
def float64():
    """Norms and rotary embeddings in the type of their input: upstream computes in float32."""
    llada = importlib.import_module("llava.model.language_model.llada.modeling_llada")
    norm, turn, kept = llada.RMSLayerNorm, llada.RotaryEmbedding, torch.Tensor.float
    before = norm.forward, turn.forward

    def exact(self, x):
        return self.weight * x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps)

    def turned(self, *args, **options):
        torch.Tensor.float = lambda x: x if x.is_floating_point() else kept(x)
        try:
            return before[1](self, *args, **options)
        finally:
            torch.Tensor.float = kept

    norm.forward, turn.forward = exact, turned
    try:
        yield
    finally:
        norm.forward, turn.forward = before


def cases():
    spec = importlib.util.spec_from_file_location(
        "cases_lavida_o", HERE.parents[1] / "adapters" / "cases" / "lavida_o.py"
    )
    ours = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(ours)
    upstream = package()
    commit = subprocess.run(
        ["git", "-C", FOLDER, "rev-parse", "--short=7", "HEAD"],
        capture_output=True, text=True, check=True,
    ).stdout.strip()  # fmt: skip

    def case(name, cache, feasible, **changes):
        def make(dtype=torch.float32):
            made = model(upstream, dtype)
            return captum_dcam.wrap(made, double.processor(), cache=cache, system=None)

        return AdapterCase(
            f"lavida_o, {name}",
            make,
            ours.reference,
            settings=dict(gen_length=8, block_length=4, **changes),
            one_token=dict(gen_length=1, block_length=1),
            feasible=feasible,
            float64=float64,
            source=f"upstream {commit}",
        )

    return [
        case("prefix", "prefix", (0,)),
        case("full", "none", range(8)),
        case("use_fast_dlm", "none", None, use_fast_dlm=True),
    ]


CASES = cases() if FOLDER else []
