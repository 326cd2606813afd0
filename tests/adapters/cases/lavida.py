"""LaViDa's double: both language models, cached and full, with tiles and without."""

import functools

from doubles import lavida_bound as made

from captum_dcam.model.trajectory import STORED_CACHES
from captum_dcam.testing import AdapterCase

#: a model of low resolution: one padded view, as a tensor or (pooled, with a newline) as a list
LOW = {"image_aspect_ratio": "pad"}


def make(variant, cache, changes, dtype):
    return made.adapter(variant, cache, dtype=dtype, **changes)


def case(variant, cache, name="", **changes):
    dream = variant == "dream"
    return AdapterCase(
        f"lavida-{variant}, {STORED_CACHES[cache]}{name}",
        functools.partial(make, variant, cache, changes),
        made.reference,
        settings=dict(gen_length=8, steps=4) | ({} if dream else {"block_length": 4}),
        one_token=dict(gen_length=1, steps=1) | ({} if dream else {"block_length": 1}),
        feasible=(0,) if cache == "prefix" else range(4),
        prompt=made.PROMPT,
    )


CASES = [
    *(case(v, r) for v in made.VARIANTS for r in ("prefix", "none")),
    case("llada", "prefix", ", low resolution", single="tensor", **LOW),
    case("llada", "none", ", low resolution, pooled", single="list", **LOW),
]
