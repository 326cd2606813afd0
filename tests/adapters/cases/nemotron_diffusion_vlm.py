"""Nemotron-Labs-Diffusion-VLM's double: so many tokens per step, and all that are sure."""

import torch
from doubles import block_checks as checks
from doubles import nemotron_diffusion_vlm as double

import captum_dcam


def make(dtype=torch.float32):
    model = double.model(dtype=dtype, scale=3.0)
    return captum_dcam.wrap(model, double.processor(), block_length=double.LENGTH)


CASES = checks.nemotron_diffusion_vlm(make)
