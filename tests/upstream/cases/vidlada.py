"""VidLaDA's upstream code. See ``test_vidlada.py``."""

import importlib.util
import os
import sys
from pathlib import Path

import torch
from upstream import made_llada_v as real

HERE = Path(__file__).parent
FOLDER = os.environ.get("CAPTUM_DCAM_UPSTREAM_VIDLADA")


def from_file(name, path):
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def cases():
    from captum_dcam.adapters.llada_v.loading import video_module

    sys.path.insert(0, str(Path(FOLDER) / "train"))
    upstream = video_module()
    tests = from_file("upstream_vidlada", HERE.parent / "test_vidlada.py")
    ours = from_file("cases_vidlada", HERE.parents[1] / "adapters" / "cases" / "vidlada.py")

    def make(dtype=torch.float32):
        return tests.adapter(upstream, dtype)

    def float64():
        return real.exact(make().model)

    return [
        ours.case(name, make, f"upstream {real.commit(FOLDER)}", float64, **changes)
        for name, changes in (("VidLaDA", {}), ("VidLaDA, guided", {"cfg_scale": 1.0}))
    ]


CASES = cases() if FOLDER else []
