"""The embedded model's autoregressive twin with random weights, in both caches."""

import functools

import tiny
import torch

from captum_dcam.mini.modeling import MiniForMaskedDiffusion
from captum_dcam.model.trajectory import STORED_CACHES
from captum_dcam.testing import AdapterCase, Reference

LENGTH = 4


def reference(adapter, request, settings):
    """Greedy, one call per token, with the mask written out for the embedded model's own forward:
    the whole sequence every time, or the new token behind the keys and values of the others."""
    model, (ids, valid) = adapter.model, request.extras
    new, seen, past = model.embed(ids, request.pixels), valid.bool(), None
    tokens, logits = [], []
    for step in range(settings["gen_length"]):
        length, count = new.shape[1], seen.shape[1]
        causal = torch.ones(count, count, dtype=torch.bool).tril()[count - length :]
        where = (seen.long().cumsum(1) - 1).clamp_min(0)
        out = MiniForMaskedDiffusion.forward(
            model,
            inputs_embeds=new,
            segment_masks=(causal & seen[:, None, None],),
            position_ids=where[:, count - length :],
            past_key_values=past,
            use_cache=True,
        )
        rows = out.logits[:, -1]
        tokens.append(rows.argmax(-1))
        logits.append(rows.new_full((len(rows), settings["gen_length"], rows.shape[-1]), torch.nan))
        logits[-1][:, step] = rows
        word = model.embed_words(tokens[-1][:, None])
        cached = adapter.cache == "prefix"
        past, new = (out.cache, word) if cached else (None, torch.cat((new, word), 1))
        seen = torch.cat((seen, torch.ones_like(seen[:, :1])), 1)
    steps = torch.arange(len(tokens))
    tokens = torch.stack(tokens, 1)
    assert not torch.isin(tokens, torch.tensor([*adapter.stop_ids])).any()  # none of them ends
    return Reference(tokens, logits, commit_step=steps.expand_as(tokens))


def case(cache):
    return AdapterCase(
        f"mini_ar, {STORED_CACHES[cache]}",
        functools.partial(tiny.twin, cache),
        reference,
        settings=dict(gen_length=LENGTH),
        one_token=dict(gen_length=1),
        tolerance=1e-5,  # the answer is replayed in one run, and generated token by token
        feasible=(0,) if cache == "prefix" else range(LENGTH),
        source="own",
    )


CASES = [case("prefix"), case("none")]
