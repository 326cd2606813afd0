"""Lumina-DiMOO's own model and loop; needs CAPTUM_DCAM_UPSTREAM_LUMINA_DIMOO."""

from doubles import mmada_checks as checks
from upstream import made_lumina_dimoo as real

CASES = (
    []
    if real.FOLDER is None
    else checks.rows_cases(real.adapter, real.loop, f"upstream {real.COMMIT}", float64=real.exact)
)
