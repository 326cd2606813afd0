"""MMaDA's double, plain and guided."""

import torch
from doubles import mmada as double
from doubles import mmada_checks as checks

import captum_dcam


def make(dtype=torch.float32):
    processor = (double.tokenizer(), double.vq(dtype=dtype))
    return captum_dcam.wrap(double.model(dtype=dtype), processor, resolution=checks.SIDE)


CASES = checks.cases(make, "double")
