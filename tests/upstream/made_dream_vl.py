"""Tiny random-weight models of Dream-VL's own classes, from the checkout that
CAPTUM_DCAM_UPSTREAM_DREAM_VL names."""

import importlib
import os
import sys
from contextlib import contextmanager
from pathlib import Path

import torch
from doubles import dream_vl as double

import captum_dcam
from captum_dcam.adapters.common.loading import Parts
from captum_dcam.adapters.dream_vl import compat

FOLDER = os.environ.get("CAPTUM_DCAM_UPSTREAM_DREAM_VL")
COMMIT = "a72fa41"


def package():
    """Upstream's modules of models and of pictures, repaired."""
    return _modules("vl/train", "dreamvl", "DreamVLModel")


def actions():
    """Upstream's modules of Dream-VLA, repaired: a package of their own."""
    return _modules("vla", "dreamvla", "DreamVLAForActionPrediction")


def _modules(place, name, cls):
    folder = str(Path(FOLDER) / place)
    sys.path.insert(0, folder)
    try:
        with compat.importable():
            models = importlib.import_module(f"{name}.modeling_dreamvl")
            pictures = importlib.import_module(f"{name}.image_processing_dreamvl")
    finally:
        sys.path.remove(folder)
    compat.repair_classes(getattr(models, cls))
    return models, pictures


@contextmanager
def exact():
    """Upstream's norms compute in float32 even in a float64 model: not in here."""
    cls = package()[0].DreamVLRMSNorm
    before = cls.forward

    def norm(self, x):
        return self.weight * (x * (x.pow(2).mean(-1, keepdim=True) + self.variance_epsilon).rsqrt())

    cls.forward = norm
    try:
        yield
    finally:
        cls.forward = before


def model(
    upstream,
    dtype=torch.float32,
    implementation="sdpa",
    cls="DreamVLModel",
    config="DreamVLConfig",
):
    module = upstream[0]
    config = getattr(module, config)(**double.shape())
    config.n_action_bins = 4  # of Dream-VLA alone
    config._attn_implementation = config.vision_config._attn_implementation = implementation
    with torch.random.fork_rng(devices=[]), compat.importable():
        torch.manual_seed(0)
        made = getattr(module, cls)(config)
        double.draw(made)
    return made.to(dtype).eval()


def adapter(upstream, dtype=torch.float32, implementation="sdpa", made=None):
    images = upstream[1].DreamVLImageProcessor(min_pixels=double.LEAST, max_pixels=double.MOST)
    made = model(upstream, dtype, implementation) if made is None else made
    return captum_dcam.wrap(made, Parts(double.tokenizer(), images, None, double.TEMPLATE))
