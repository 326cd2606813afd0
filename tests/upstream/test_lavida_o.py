"""LaViDa-O's upstream code under the library's calls: its conformance cases explained and compared.

``CAPTUM_DCAM_UPSTREAM_LAVIDA_O`` names a checkout. Its own loading needs packages for training and
for making pictures, so the model is wrapped here, not loaded.
"""

import os

import pytest
import torch
from upstream.commands import METHODS

import captum_dcam
from captum_dcam.comparing import compare_generation

NAME = "CAPTUM_DCAM_UPSTREAM_LAVIDA_O"
pytestmark = pytest.mark.skipif(NAME not in os.environ, reason=f"{NAME} names no checkout")


@pytest.mark.parametrize("number", range(3))
def test_explained_and_compared(number):
    from upstream.cases.lavida_o import CASES

    case = CASES[number]
    adapter = case.make(torch.float32)
    found = captum_dcam.explain(adapter, case.picture(), case.prompt, layer=1, **case.settings)
    assert found.words and all(m.any() for m in found.maps)
    rows = compare_generation(case.bound(adapter, 1), "all", METHODS.split(",")).rows
    # behind use_fast_dlm's cache a step runs its own block alone: no pass over everything
    refused = [r.name for r in rows if r.status != "done"]
    partial = ["tam", "logit_lens", "attention"] if "fast_dlm" in case.name else []
    assert refused == partial, [(r.name, r.note) for r in rows]
    assert all("without that cache" in r.note for r in rows if r.name in refused)
