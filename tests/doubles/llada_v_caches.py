"""Tiny stand-ins for the two caches that LLaDA-V is run with; they hang on a double of the model.

dLLM-Cache keeps every block's output length and reuses the prompt's attention and MLP outputs for
several steps. Fast-dLLM keeps keys and values up to the current block and runs the rest only.
"""

from types import MethodType

import torch
from doubles.llada_v import MASK, decode, rotate


class Caches:
    """State of dLLM-Cache, one for the model."""

    def __init__(self, prompt_every, answer_every):
        self.every = {"prompt": prompt_every, "answer": answer_every}
        self.reset(0)

    def reset(self, prompt):
        self.prompt, self.calls, self.kept = prompt, {}, {}

    def due(self, part):
        return (max(self.calls.values()) - 1) % self.every[part] == 0


def register_cache_LLaDA_V(model, prompt_every=3, answer_every=1):
    """Replace every block's forward, as the family's hooks do; there is no way back."""
    caches = Caches(prompt_every, answer_every)
    for index, layer in enumerate(model.model.layers):
        layer.layer_idx = index
        layer._old_forward = layer.forward
        layer.forward = MethodType(cached_layer(caches), layer)
    own = type(model).generate_with_embeds.__wrapped__

    @torch.no_grad()
    def generate_with_embeds(inputs_embeds, **options):
        caches.reset(inputs_embeds.shape[1])
        return own(model, inputs_embeds, **options)

    model.generate_with_embeds = generate_with_embeds
    return caches


def cached_layer(caches):
    def forward(self, hidden_states, positions, fast_dllm_cache=None):
        del fast_dllm_cache
        index, attn = self.layer_idx, self.self_attn
        caches.calls[index] = caches.calls.get(index, 0) + 1
        bounds = {"prompt": slice(0, caches.prompt), "answer": slice(caches.prompt, None)}
        fresh = [p for p in bounds if caches.due(p)]
        queries = {}
        for part in fresh:
            normed = self.input_layernorm(hidden_states[:, bounds[part]])
            q, k, v = (attn.split(p(normed)) for p in (attn.q_proj, attn.k_proj, attn.v_proj))
            at = positions[bounds[part]]
            queries[part] = rotate(q, at)
            caches.kept[index, part, "kv"] = rotate(k, at), v
        k, v = (
            torch.cat(t, 2)
            for t in zip(*(caches.kept[index, p, "kv"] for p in bounds), strict=True)
        )
        for part in fresh:
            caches.kept[index, part, "attention"] = attn.attend(queries[part], k, v)
        x = hidden_states + torch.cat([caches.kept[index, p, "attention"] for p in bounds], 1)
        for part in fresh:
            normed = self.post_attention_layernorm(x[:, bounds[part]])
            caches.kept[index, part, "mlp"] = self.mlp(normed)
        return (x + torch.cat([caches.kept[index, p, "mlp"] for p in bounds], 1),)

    return forward


def register_fast_dllm_hook(model):
    """Replace every attention's forward and the model's generate."""
    for index, layer in enumerate(model.model.layers):
        layer.self_attn.forward = cached_attention(layer.self_attn, index)

    @torch.no_grad()
    def generate(inputs, images=None, image_sizes=None, modalities=("image",), **options):
        embeds = model.prepare_inputs_labels_for_multimodal(
            inputs, None, None, None, None, images, list(modalities), image_sizes=image_sizes
        )[4]
        return fast_decode(model, embeds, **options)

    model.generate = generate


def cached_attention(attn, index):
    def forward(hidden_states, positions, fast_dllm_cache=None):
        q, k, v = (attn.split(p(hidden_states)) for p in (attn.q_proj, attn.k_proj, attn.v_proj))
        known = fast_dllm_cache and len(fast_dllm_cache) > index
        at = positions + (fast_dllm_cache[index][0].shape[2] if known else 0)
        q, k = rotate(q, at), rotate(k, at)
        if known:
            k, v = (torch.cat(t, 2) for t in zip(fast_dllm_cache[index], (k, v), strict=True))
        elif fast_dllm_cache is not None:
            fast_dllm_cache.append((k, v))
        return attn.attend(q, k, v)

    return forward


def fast_decode(
    model, embeds, steps=128, gen_length=128, block_length=128, temperature=0.0, cfg_scale=0.0,
    remasking="low_confidence", mask_id=MASK, tokenizer=None, stopping_criteria=None,
    generation_suffix=None, threshold=None, prefix_refresh_interval=32,
):  # fmt: skip
    """The family's schedule over a cache that is rebuilt every so many steps of a block."""
    if cfg_scale > 0:
        raise UnboundLocalError("the cache of guided decoding is never made")
    assert threshold is None
    cache = []

    def run(x, start, begin):
        nonlocal cache
        if start:
            return model.model(inputs_embeds=x, fast_dllm_cache=cache)[0]
        cache = []
        hidden = model.model(inputs_embeds=x, fast_dllm_cache=cache)[0]
        cache = [(k[:, :, :begin], v[:, :, :begin]) for k, v in cache]
        return hidden

    return decode(
        model, embeds, run, steps, gen_length, block_length, temperature, 0.0, remasking, mask_id,
        tokenizer, stopping_criteria, generation_suffix, refresh=prefix_refresh_interval,
    )  # fmt: skip
