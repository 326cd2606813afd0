"""VidLaDA's upstream code. See ``test_vidlada.py``."""

import importlib.util
import os
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import torch

HERE = Path(__file__).parent
FOLDER = os.environ.get("CAPTUM_DCAM_UPSTREAM_VIDLADA")


def from_file(name, path):
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def exact_norm(self, x):
    return self.weight * x * (x.pow(2).mean(-1, keepdim=True) + self.variance_epsilon).rsqrt()


def cases():
    from captum_dcam.adapters.llada_v.loading import video_module

    sys.path.insert(0, str(Path(FOLDER) / "train"))
    upstream = video_module()
    tests = from_file("upstream_vidlada", HERE.parent / "test_vidlada.py")
    ours = from_file("cases_vidlada", HERE.parents[1] / "adapters" / "cases" / "vidlada.py")
    commit = subprocess.run(
        ["git", "-C", FOLDER, "rev-parse", "--short=7", "HEAD"],
        capture_output=True,
        text=True,
        check=True,
    ).stdout.strip()

    def make(dtype=torch.float32):
        return tests.adapter(upstream, dtype)

    @contextmanager
    def float64():
        norm = type(make().model.model.norm)
        before, norm.forward = norm.forward, exact_norm
        try:
            yield
        finally:
            norm.forward = before

    return [
        ours.case(name, make, f"upstream {commit}", float64, **changes)
        for name, changes in (("VidLaDA", {}), ("VidLaDA, guided", {"cfg_scale": 1.0}))
    ]


CASES = cases() if FOLDER else []
