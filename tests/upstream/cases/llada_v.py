"""LLaDA-V's upstream code; Fast-dLLM, or ReDiff's decoder, where the checkout has it. See
``test_llada_v.py``."""

import importlib.util
import os
import sys
from pathlib import Path

import torch
from upstream import made_llada_v as real

HERE = Path(__file__).parent
FOLDER = os.environ.get("CAPTUM_DCAM_UPSTREAM_LLADA_V")


def from_file(name, path):
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def cases():
    from captum_dcam.adapters.llada_v.loading import package
    from captum_dcam.testing import AdapterCase

    sys.path.insert(0, str(Path(FOLDER) / "train"))
    upstream = package()
    tests = from_file("upstream_llada_v", HERE.parent / "test_llada_v.py")
    ours = from_file("cases_llada_v", HERE.parents[1] / "adapters" / "cases" / "llada_v.py")

    def make(dtype=torch.float32):
        return tests.adapter(upstream, dtype)

    def make_fast(dtype=torch.float32):
        from llava.hooks.fast_dllm_hook import register_fast_dllm_hook

        made = make(dtype)
        register_fast_dllm_hook(made.model)
        return made

    def float64():
        return real.exact(make().model)

    def case(name, maker, feasible, reference=ours.reference, **changes):
        return AdapterCase(
            f"llada_v, {name}",
            maker,
            reference,
            settings={**ours.SETTINGS, **changes},
            one_token={**dict(gen_length=1, block_length=1, steps=1), **changes},
            feasible=feasible,
            float64=float64,
            source=f"upstream {real.commit(FOLDER)}",
        )

    if tests.HOOK.is_file():
        return [case("Fast-dLLM", make_fast, (0, 2))]
    if make().revises:
        return [
            case("ReDiff, revising", make, range(4), ours.edited, revise=True),
            case("ReDiff, half revised", make, range(4), ours.edited, revise=True, revise_topk=0.5),
        ]
    return [case("full", make, range(4)), case("full, guided", make, range(4), cfg_scale=1.0)]


CASES = cases() if FOLDER else []
