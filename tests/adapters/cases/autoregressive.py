"""Autoregressive families: tiny random instances of transformers' own classes, both caches."""

import sys
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from captum_dcam.model.trajectory import STORED_CACHES
from captum_dcam.testing import AdapterCase, Reference

sys.path.insert(0, str(Path(__file__).parents[1]))  # importlib mode does not

import made_ar

LENGTH = 4


def reference(adapter, request, settings):
    """The family's own ``generate``; step s is its call that predicts token s."""
    out = adapter.model.generate(
        **adapter._inputs(request.pixels, request.extras),
        max_new_tokens=settings["gen_length"],
        do_sample=False,
        use_cache=adapter.cache == "prefix",
        output_logits=True,
        return_dict_in_generate=True,
    )
    tokens = out.sequences[:, request.extras[0].shape[1] :]
    logits = []
    for step, row in enumerate(out.logits):
        logits.append(torch.full((*tokens.shape, row.shape[-1]), torch.nan))
        logits[-1][:, step] = row  # the other positions are predicted by other calls
    steps = torch.arange(tokens.shape[1])
    return Reference(tokens, logits, commit_step=steps.expand_as(tokens))


@contextmanager
def float64():
    """Norms and linear attention in float64: the families compute them in float32."""
    with pytest.MonkeyPatch.context() as patch:
        made_ar.exact(patch)
        yield


def case(kind, cache):
    return AdapterCase(
        f"{kind}, {STORED_CACHES[cache]}",
        lambda dtype: made_ar.adapter(kind, cache, dtype=dtype),
        reference,
        settings=dict(gen_length=LENGTH),
        one_token=dict(gen_length=1),
        prompt="what is red ?",
        # in a batch some need prompts of one length
        other_prompt="what is blue ?" if kind in made_ar.LATER else "what is the image ?",
        tolerance=1e-5,  # the answer is replayed in one run, and generated token by token
        feasible=(0,) if cache == "prefix" else range(LENGTH),
        float64=float64,
        source="transformers",
    )


CASES = [
    case(kind, cache) for kind in (*made_ar.KINDS, *made_ar.LATER) for cache in ("prefix", "none")
]
