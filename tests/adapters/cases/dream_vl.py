"""Doubles of Dream-VL, with two of its algorithms, and of Dimple."""

import torch
from doubles import dream_vl as double
from doubles import dream_vl_checks as checks

import captum_dcam


def make(dtype=torch.float32):
    return captum_dcam.wrap(double.model(dtype=dtype), double.processor())


def make_dimple(dtype=torch.float32):
    return captum_dcam.wrap(double.model(dtype=dtype, dimple=True), double.processor(dimple=True))


CASES = checks.cases(make, "double") + checks.cases(make_dimple, "double", dimple=True)
