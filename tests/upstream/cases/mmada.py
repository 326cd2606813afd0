"""MMaDA's own classes, plain and guided; needs CAPTUM_DCAM_UPSTREAM_MMADA."""

import functools

import torch
from doubles import mmada_checks as checks
from upstream import made_mmada as real


@functools.cache
def package():
    return real.package()


def make(dtype=torch.float32):
    return real.adapter(package(), real.vq(package()).to(dtype), dtype)


def exact():
    package()
    return real.exact()


CASES = [] if real.FOLDER is None else checks.cases(make, f"upstream {real.COMMIT}", float64=exact)
