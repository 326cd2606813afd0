"""MMaDA's double, plain and guided."""

import torch
from doubles import mmada as double
from doubles import mmada_checks as checks

import captum_dcam


def make(dtype=torch.float32):
    processor = (double.tokenizer(), double.vq(dtype=dtype))
    made = captum_dcam.wrap(double.model(dtype=dtype), processor, resolution=checks.SIDE)
    made.ids, made.marks = double.IDS, double.MARKS
    return made


CASES = checks.cases(make, "double")
