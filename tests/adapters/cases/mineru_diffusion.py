"""MinerU-Diffusion's double: a token a step, and several at once."""

import torch
from doubles import block_checks as checks
from doubles import mineru_diffusion as double

import captum_dcam


def make(dtype=torch.float32):
    model = double.model(dtype=dtype, scale=4.0)
    return captum_dcam.wrap(model, double.processor(), block_length=double.LENGTH)


CASES = checks.mineru_diffusion(make, "double")
