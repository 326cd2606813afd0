"""LLaDA-V's double: plain, guided, with Fast-dLLM's cache, and with ReDiff's editing decoder."""

import torch
from doubles import llada_checks as checks
from doubles import llada_v as double
from doubles import llada_v_caches as caches

import captum_dcam
from captum_dcam.testing import AdapterCase, Reference

SETTINGS = dict(gen_length=8, block_length=4, steps=4)


def make(dtype=torch.float32, fast=False, edits=False):
    model = double.model(dtype=dtype, edits=edits)
    if fast:
        caches.register_fast_dllm_hook(model)
    made = captum_dcam.wrap(model, double.processor(), system="describe the image")
    made.ids = double.IDS
    return made


def make_fast(dtype=torch.float32):
    return make(dtype, fast=True)


def make_editing(dtype=torch.float32):
    return make(dtype, edits=True)


def edited(adapter, request, settings):
    """As :func:`reference`, with canvases that are read off the embeddings: a token's commit is the
    last step behind which another id stands."""
    words, seen = adapter.model.model.embed_tokens.weight, []

    def note(_module, _args, kwargs):
        part = kwargs["inputs_embeds"][0, -settings["gen_length"] :]
        apart = torch.cdist(
            part.float(), words.float()
        )  # of a tiny width: exact enough to tell ids
        seen.append(apart.argmin(-1)[None])

    with adapter.model.model.register_forward_pre_hook(note, with_kwargs=True):
        found = reference(adapter, request, settings)
    canvases = torch.stack(seen)
    moved = torch.cat((canvases[1:], found.tokens[None])) != canvases
    steps = torch.arange(len(moved))[:, None, None]
    return Reference(found.tokens, found.logits, canvases, torch.where(moved, steps, -1).amax(0))


def reference(adapter, request, settings):
    """The double's own ``generate``; logits as its head returns them, NaN where it ran no row."""
    views = adapter._packing.arguments(request.pixels, request.extras[1])
    model, width = adapter.model, settings["gen_length"]
    inner = model.model
    with (
        checks.masks_seen(inner, inner.embed_tokens, width, double.MASK) as masked,
        checks.heard(model.lm_head) as seen,
    ):
        tokens = model.generate(request.extras[0], tokenizer=adapter.tokenizer, **views, **settings)
    scale = settings.get("cfg_scale", 0.0)
    logits = []
    for one in seen:
        if len(one) == 2:
            one = one[1:] + (scale + 1) * (one[:1] - one[1:])
        rows = one[:, -min(width, one.shape[1]) :]
        full = torch.full((1, width, rows.shape[-1]), torch.nan, dtype=rows.dtype)
        full[:, -rows.shape[1] :] = rows
        logits.append(full)
    return Reference(tokens, logits, checks.canvases(masked, tokens, double.MASK))


def case(name, maker=make, feasible=range(4), reference=reference, **changes):
    return AdapterCase(
        f"llada_v, {name}",
        maker,
        reference,
        settings={**SETTINGS, **changes},
        one_token={**dict(gen_length=1, block_length=1, steps=1), **changes},
        feasible=feasible,
        source="double",
    )


CASES = [
    case("full"),
    case("full, guided", cfg_scale=1.0),
    case("Fast-dLLM", make_fast, feasible=(0, 2)),
    case("ReDiff, revising", make_editing, reference=edited, revise=True),
]
