"""VidLaDA's double: videos in LLaDA-V, a head that runs on the current block; plain and guided."""

import torch
from doubles import llada_checks as checks
from doubles import llada_v
from doubles import vidlada as double

import captum_dcam
from captum_dcam.testing import AdapterCase, Reference

SETTINGS = dict(gen_length=8, block_length=4, steps=4)


def make(dtype=torch.float32):
    model = double.model(dtype=dtype)
    made = captum_dcam.wrap(model, llada_v.processor(), system="describe the image")
    made.ids = llada_v.IDS
    return made


def reference(adapter, request, settings):
    """The model's own ``generate``; logits as its head returns them, NaN outside of the block."""
    views = adapter._packing.arguments(request.pixels, request.extras[1])
    model, width, inner = adapter.model, settings["gen_length"], adapter.model.model
    with (
        checks.masks_seen(inner, inner.embed_tokens, width, adapter.ids.mask) as masked,
        checks.heard(model.lm_head) as seen,
    ):
        tokens = model.generate(request.extras[0], tokenizer=adapter.tokenizer, **views, **settings)
    scale, logits = settings.get("cfg_scale", 0.0), []
    for one, open_ in zip(seen, masked, strict=True):
        if len(one) == 2:
            one = one[1:] + (scale + 1) * (one[:1] - one[1:])
        block = one.shape[1]
        begin = int(open_[0].nonzero()[0, 0]) // block * block
        full = torch.full((1, width, one.shape[-1]), torch.nan, dtype=one.dtype)
        full[:, begin : begin + block] = one
        logits.append(full)
    return Reference(tokens, logits, checks.canvases(masked, tokens, adapter.ids.mask))


def case(name, maker=make, source="double", float64=None, **changes):
    own = {} if float64 is None else {"float64": float64}
    return AdapterCase(
        f"llada_v, {name}",
        maker,
        reference,
        settings={**SETTINGS, **changes},
        one_token={**dict(gen_length=1, block_length=1, steps=1), **changes},
        feasible=range(4),
        source=source,
        **own,
    )


CASES = [case("VidLaDA"), case("VidLaDA, guided", cfg_scale=1.0)]
