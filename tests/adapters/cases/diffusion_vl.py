"""DiffusionVL's double: a fixed number of tokens per step, and all that are sure."""

import torch
from doubles import block_checks as checks
from doubles import diffusion_vl as double

import captum_dcam


def make(dtype=torch.float32):
    return captum_dcam.wrap(double.model(dtype=dtype), double.processor())


CASES = checks.diffusion_vl(make, "double")
