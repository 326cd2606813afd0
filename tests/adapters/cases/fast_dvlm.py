"""Fast-dVLM's double: all that are sure."""

import torch
from doubles import block_checks as checks
from doubles import fast_dvlm as double

import captum_dcam


def make(dtype=torch.float32):
    model = double.model(dtype=dtype, scale=3.0)
    return captum_dcam.wrap(model, double.processor(), block_length=double.LENGTH)


CASES = checks.fast_dvlm(make)
