"""SDAR-VL's own decoding loop, of the checkout that CAPTUM_DCAM_UPSTREAM_SDAR_VL names, on the
double: the model's code lies in its checkpoints and is not public elsewhere."""

import importlib.util
import os
from pathlib import Path

from doubles import sdar_vl as double

import captum_dcam

FOLDER = os.environ.get("CAPTUM_DCAM_UPSTREAM_SDAR_VL")
COMMIT = "46e4603"


def loop():
    """``block_diffusion_generate`` of the authors' script."""
    spec = importlib.util.spec_from_file_location("sdar_vl_script", Path(FOLDER) / "generate.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.block_diffusion_generate


def greedy(model, **given):
    """The loop without draws: of one token each."""
    return loop()(model, temperature=1.0, top_k=1, **given)


def adapter(dtype=None):
    model = double.model(scale=3.0) if dtype is None else double.model(dtype=dtype, scale=3.0)
    return captum_dcam.wrap(model, double.processor(), block_length=double.LENGTH)
