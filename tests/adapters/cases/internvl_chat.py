"""InternVL in its authors' format, as it is loaded: a checkpoint of a tiny instance."""

import functools
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))  # importlib mode does not
sys.path.insert(0, str(Path(__file__).parent))

import autoregressive
import made_ar
import test_internvl_chat as double

import captum_dcam


@functools.cache
def folder():
    """A checkpoint in the authors' format, for as long as the process lives."""
    made_ar.needs()
    held = tempfile.TemporaryDirectory()
    double.save(Path(held.name) / "chat", made_ar.model("internvl"))
    return held


def make(dtype, cache="prefix"):
    return captum_dcam.load(f"{folder().name}/chat", dtype=dtype, device="cpu", cache=cache)


def case(cache, **changes):
    plain = autoregressive.case("internvl", cache)
    name = plain.name.replace("internvl", "internvl_chat")
    return replace(
        plain, name=name, make=lambda dtype: make(dtype, cache), source="double", **changes
    )


CASES = [case("prefix"), case("none")]
