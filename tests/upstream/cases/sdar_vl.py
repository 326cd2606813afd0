"""SDAR-VL's own decoding loop on the double; needs CAPTUM_DCAM_UPSTREAM_SDAR_VL."""

from doubles import block_checks as checks
from upstream import made_sdar_vl as real

SOURCE = f"script {real.COMMIT}, double"
CASES = [] if real.FOLDER is None else checks.sdar_vl(real.adapter, real.greedy, SOURCE)
