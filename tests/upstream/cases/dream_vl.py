"""Dream-VL's own classes, with two of their algorithms; needs CAPTUM_DCAM_UPSTREAM_DREAM_VL."""

import torch
from doubles import dream_vl_checks as checks
from upstream import made_dream_vl as real


def make(dtype=torch.float32):
    return real.adapter(real.package(), dtype)


SOURCE = f"upstream {real.COMMIT}"
CASES = [] if real.FOLDER is None else checks.cases(make, SOURCE, float64=real.exact)
