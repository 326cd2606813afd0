"""LaViDa's own classes, tiny and random: both language models, cached and full.

No case unless CAPTUM_DCAM_UPSTREAM_LAVIDA names a checkout.
"""

import functools
import os
import tempfile
from pathlib import Path

from doubles import lavida as double
from doubles import lavida_bound as bound
from upstream import made_lavida as made

from captum_dcam.adapters.lavida import LavidaAdapter
from captum_dcam.model.trajectory import STORED_CACHES
from captum_dcam.testing import AdapterCase

LOW = {"image_aspect_ratio": "pad"}


@functools.cache
def package():
    return made.package()


def make(variant, cache, single, changes, dtype):
    package()
    with tempfile.TemporaryDirectory() as folder:
        model = made.model(variant, Path(folder), **changes)
    model = model.to(dtype)
    processor = double.Tokenizer(), model.get_vision_tower().image_processor
    return LavidaAdapter(model, processor, cache, system=None, single=single)


def case(variant, cache, name="", single="tensor", **changes):
    dream = variant == "dream"
    return AdapterCase(
        f"lavida-{variant}, {STORED_CACHES[cache]}{name}",
        functools.partial(make, variant, cache, single, changes),
        bound.reference,
        settings=dict(gen_length=8, steps=4) | ({} if dream else {"block_length": 4}),
        one_token=dict(gen_length=1, steps=1) | ({} if dream else {"block_length": 1}),
        feasible=(0,) if cache == "prefix" else range(4),
        float64=made.exact,
        prompt=bound.PROMPT,
        source=f"upstream {made.COMMIT}",
    )


CASES = (
    [
        *(case(v, r) for v in bound.VARIANTS for r in ("prefix", "none")),
        case("llada", "prefix", ", low resolution", **LOW),
        case("llada", "none", ", low resolution, pooled", single="list", **LOW),
    ]
    if made.NAME in os.environ
    else []
)
