"""MinerU-Diffusion's own classes; needs CAPTUM_DCAM_UPSTREAM_MINERU_DIFFUSION."""

import torch
from doubles import block_checks as checks
from upstream import made_mineru_diffusion as real


def make(dtype=torch.float32):
    return real.adapter(real.package(), dtype)


SOURCE = f"upstream {real.COMMIT}"
CASES = [] if real.FOLDER is None else checks.mineru_diffusion(make, SOURCE, float64=real.exact)
