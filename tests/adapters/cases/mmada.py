"""Doubles of MMaDA and of Lumina-DiMOO, plain and guided."""

import torch
from doubles import mmada as double
from doubles import mmada_checks as checks

import captum_dcam


def make(dtype=torch.float32):
    processor = (double.tokenizer(), double.vq(dtype=dtype))
    made = captum_dcam.wrap(double.model(dtype=dtype), processor, resolution=checks.SIDE)
    made.ids, made.marks = double.IDS, double.MARKS
    return made


def make_rows(dtype=torch.float32):
    processor = (double.tokenizer(tags=double.TAGS), double.vq(dtype=dtype, rows=True))
    model = double.model(dtype=dtype, rows=True)
    return checks.RowsAdapter(model, processor, resolution=checks.SIDE)


CASES = checks.cases(make, "double") + checks.rows_cases(make_rows, double.understood, "double")
