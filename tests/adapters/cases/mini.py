"""The embedded model with random weights, in both regimes."""

import functools

import tiny
import torch

from captum_dcam.mini import modeling as generation
from captum_dcam.testing import AdapterCase, Reference


def reference(adapter, request, settings):
    """The model's own ``generate``, its logits caught on the way."""
    seen = []
    original = generation.denoise

    def spy(*args):
        out = original(*args)
        seen.append(out.clone())
        return out

    generation.denoise = spy
    try:
        cached = adapter.regime == "prefix"
        made = generation.generate(
            adapter.model, request.pixels, *request.extras, prefix_cache=cached, **settings
        )
    finally:
        generation.denoise = original
    return Reference(made.tokens, seen, made.canvases)


def case(regime):
    return AdapterCase(
        f"mini, {regime}",
        functools.partial(make, regime),
        reference,
        settings=dict(gen_length=8, steps=4, block_length=4),
        one_token=dict(gen_length=1, steps=1, block_length=1),
        feasible=(0,) if regime == "prefix" else range(4),
        source="own",
    )


def make(regime, dtype=torch.float32):
    return tiny.adapter(regime, dtype=dtype)


CASES = [case("prefix"), case("full")]
