"""Tiny random-weight models of Dimple's own classes, from the checkout that
CAPTUM_DCAM_UPSTREAM_DIMPLE names."""

import os
import sys
from contextlib import contextmanager
from pathlib import Path

import torch
from doubles import dream_vl as double

import captum_dcam
from captum_dcam.adapters.common.loading import Parts
from captum_dcam.adapters.dream_vl import compat

FOLDER = os.environ.get("CAPTUM_DCAM_UPSTREAM_DIMPLE")
COMMIT = "848f132"


def package():
    """Upstream's modules of models and of pictures, repaired."""
    folder = str(Path(FOLDER) / "lmms-eval" / "lmms_eval" / "models")
    sys.path.insert(0, folder)
    try:
        with compat.importable():
            from dimple_model import image_processing_dimple, modeling_dimple
    finally:
        sys.path.remove(folder)
    compat.repair_classes(modeling_dimple.DimpleModel)
    return modeling_dimple, image_processing_dimple


@contextmanager
def exact():
    """Upstream's norms compute in float32 even in a float64 model: not in here."""
    cls = package()[0].DimpleRMSNorm
    before = cls.forward

    def norm(self, x):
        return self.weight * (x * (x.pow(2).mean(-1, keepdim=True) + self.variance_epsilon).rsqrt())

    cls.forward = norm
    try:
        yield
    finally:
        cls.forward = before


def model(dtype=torch.float32):
    module = package()[0]
    vision = dict(
        depth=2, hidden_size=32, intermediate_size=32, num_heads=2, out_hidden_size=32,
        fullatt_block_indexes=[1], window_size=56, initializer_range=0.02,
    )  # fmt: skip
    shape = {**double.shape(vision_config=vision), "hidden_act": "gelu"}
    del shape["projector_hidden_act"]
    config = module.DimpleConfig(**shape)
    config._attn_implementation = config.vision_config._attn_implementation = "sdpa"
    with torch.random.fork_rng(devices=[]), compat.importable():
        torch.manual_seed(0)
        made = module.DimpleModel(config)
        double.draw(made)
    return made.to(dtype).eval()


def adapter(dtype=torch.float32):
    images = package()[1].DimpleImageProcessor(min_pixels=double.LEAST, max_pixels=double.MOST)
    return captum_dcam.wrap(model(dtype), Parts(double.tokenizer(), images, None, double.MARKED))
