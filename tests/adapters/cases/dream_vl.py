"""Dream-VL's double, with two of its algorithms."""

import torch
from doubles import dream_vl as double
from doubles import dream_vl_checks as checks

import captum_dcam


def make(dtype=torch.float32):
    return captum_dcam.wrap(double.model(dtype=dtype), double.processor())


CASES = checks.cases(make, "double")
