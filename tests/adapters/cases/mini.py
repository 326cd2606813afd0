"""The embedded model with random weights, in both caches."""

import functools

import tiny
import torch

from captum_dcam.mini import modeling as generation
from captum_dcam.model.trajectory import STORED_CACHES
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
        cached = adapter.cache == "prefix"
        made = generation.generate(
            adapter.model, request.pixels, *request.extras, prefix_cache=cached, **settings
        )
    finally:
        generation.denoise = original
    return Reference(made.tokens, seen, made.canvases)


def case(cache):
    return AdapterCase(
        f"mini, {STORED_CACHES[cache]}",
        functools.partial(make, cache),
        reference,
        settings=dict(gen_length=8, steps=4, block_length=4),
        one_token=dict(gen_length=1, steps=1, block_length=1),
        feasible=(0,) if cache == "prefix" else range(4),
        source="own",
    )


def make(cache, dtype=torch.float32):
    return tiny.adapter(cache, dtype=dtype)


CASES = [case("prefix"), case("none")]
