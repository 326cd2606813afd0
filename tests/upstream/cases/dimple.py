"""Dimple's own classes; needs CAPTUM_DCAM_UPSTREAM_DIMPLE."""

from doubles import dream_vl_checks as checks
from upstream import made_dimple as real

CASES = (
    []
    if real.FOLDER is None
    else checks.cases(real.adapter, f"upstream {real.COMMIT}", dimple=True, float64=real.exact)
)
