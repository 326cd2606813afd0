"""InternVL's own tower, projector and ``generate``; needs CAPTUM_DCAM_UPSTREAM_INTERNVL_CHAT."""

import importlib.util
from pathlib import Path

from upstream import made_internvl_chat as real


def cases():
    ours = Path(__file__).parents[2] / "adapters" / "cases" / "internvl_chat.py"
    spec = importlib.util.spec_from_file_location("cases_internvl_chat", ours)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    case = module.case("prefix", reference=real.reference)
    return [module.replace(case, source=f"upstream {real.COMMIT}")]


CASES = cases() if real.FOLDER else []
