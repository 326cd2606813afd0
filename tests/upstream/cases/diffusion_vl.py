"""DiffusionVL's own classes; needs CAPTUM_DCAM_UPSTREAM_DIFFUSION_VL."""

import torch
from doubles import block_checks as checks
from upstream import made_diffusion_vl as real


def make(dtype=torch.float32):
    return real.adapter(real.package(), dtype)


SOURCE = f"upstream {real.COMMIT}"
CASES = [] if real.FOLDER is None else checks.diffusion_vl(make, SOURCE, float64=real.exact)
