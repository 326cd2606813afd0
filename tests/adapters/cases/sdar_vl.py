"""SDAR-VL's double: all that are sure, and left to right."""

import torch
from doubles import block_checks as checks
from doubles import sdar_vl as double

import captum_dcam


def make(dtype=torch.float32):
    model = double.model(dtype=dtype, scale=3.0)
    return captum_dcam.wrap(model, double.processor(), block_length=double.LENGTH)


CASES = checks.sdar_vl(make, double.generate, "double")
