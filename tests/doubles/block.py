"""What doubles of block-diffusion models share: a transformer whose calls may store keys and values
or only read them, and the steps of their decoders. Our own writing; random weights."""

import torch
from doubles.dream_vl import RMSNorm, turned
from torch import nn
from transformers import PretrainedConfig

SIZES = dict(
    vocab_size=120,
    hidden_size=48,
    intermediate_size=64,
    num_hidden_layers=4,
    num_attention_heads=3,
    num_key_value_heads=1,
    max_position_embeddings=256,
)
VISION = dict(patch_size=14, spatial_merge_size=2, temporal_patch_size=2, width=32)


def text_config(**changes):
    made = PretrainedConfig(tie_word_embeddings=False)
    for name, value in {**SIZES, **changes}.items():
        setattr(made, name, value)
    return made


def held(cache, layer):
    """Keys and values that a cache has of a layer, in transformers 4 and 5."""
    if hasattr(cache, "layers"):
        return cache.layers[layer].keys, cache.layers[layer].values
    return cache.key_cache[layer], cache.value_cache[layer]


class Attention(nn.Module):
    """Sees what its mask says; keys and values of a call are stored, or only put behind others."""

    scale = 1.0  # of the queries

    def __init__(self, config, layer):
        super().__init__()
        d, self.heads, self.layer = config.hidden_size, config.num_attention_heads, layer
        self.groups = config.num_key_value_heads
        narrow = d // self.heads * self.groups
        self.q_proj, self.o_proj = nn.Linear(d, d), nn.Linear(d, d, bias=False)
        self.k_proj, self.v_proj = nn.Linear(d, narrow), nn.Linear(d, narrow)

    def forward(self, x, mask, turns, cache, store):
        q = self.q_proj(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)
        k, v = (
            p(x).unflatten(-1, (self.groups, -1)).transpose(1, 2)
            for p in (self.k_proj, self.v_proj)
        )
        q, k = (one * turns[0] + turned(one) * turns[1] for one in (q * self.scale, k))
        if store:
            k, v = cache.update(k, v, self.layer)
        else:
            k, v = (torch.cat(p, 2) for p in zip(held(cache, self.layer), (k, v), strict=True))
        k, v = (one.repeat_interleave(self.heads // self.groups, 1) for one in (k, v))
        out = nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        return self.o_proj(out.transpose(1, 2).flatten(2))


class Layer(nn.Module):
    def __init__(self, config, layer):
        super().__init__()
        d, wide = config.hidden_size, config.intermediate_size
        self.self_attn = Attention(config, layer)
        self.mlp = nn.Sequential(nn.Linear(d, wide), nn.SiLU(), nn.Linear(wide, d))
        self.input_layernorm, self.post_attention_layernorm = RMSNorm(d), RMSNorm(d)

    def forward(self, x, mask, turns, cache, store):
        x = x + self.self_attn(self.input_layernorm(x), mask, turns, cache, store)
        return (x + self.mlp(self.post_attention_layernorm(x)),)


class Decoder(nn.Module):
    """Positions are given, and turn queries and keys."""

    def __init__(self, config):
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Layer(config, i) for i in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size)
        self.width = config.hidden_size // config.num_attention_heads

    def forward(
        self,
        input_ids=None,
        attention_mask=None,
        position_ids=None,
        past_key_values=None,
        inputs_embeds=None,
        use_cache=None,
        store_kv=False,
    ):
        assert use_cache and past_key_values is not None
        x = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        even = torch.arange(0, self.width, 2, dtype=torch.float64)
        angles = position_ids[..., None] * 1e4 ** (-even / self.width)
        angles = torch.cat((angles, angles), -1)[:, None]
        turns = angles.cos().to(x), angles.sin().to(x)
        mask = self.mask_of(attention_mask)
        for layer in self.layers:
            x = layer(x, mask, turns, past_key_values, store_kv)[0]
        return self.norm(x), past_key_values

    def mask_of(self, given):
        """What attention takes, of what the family's code hands on."""
        return given


class Tower(nn.Module):
    """Qwen2-VL's patches to tokens, a token from its own four patches and the mean of its image."""

    def __init__(self, width, out):
        super().__init__()
        self.patches, self.mix = nn.Linear(3 * 2 * 14 * 14, width), nn.Linear(width, width)
        self.merger = nn.Linear(4 * width, out)

    def forward(self, patches, grid_thw):
        x = self.patches(patches).tanh()
        parts = x.split(grid_thw.prod(-1).tolist())
        x = torch.cat([p + self.mix(p.mean(0)) for p in parts])
        return self.merger(x.view(-1, 4 * x.shape[-1]))


def draw(model, mask_id, scale=1.0):
    """Random weights; keys are enlarged so that attention is far from uniform, and no position is
    filled with the mask."""
    for name, p in model.named_parameters():
        if p.ndim > 1:
            nn.init.normal_(p, std=1.0 if "embed_tokens" in name else p[0].numel() ** -0.5)
        if "k_proj" in name:
            p.data.mul_(3)
        if "lm_head.weight" in name:
            p.data.mul_(scale)
            p.data[mask_id] = 0


def causal(blocks, length):
    """(n, n) bool over so many blocks: a position sees its own block and those before."""
    number = torch.arange(blocks * length) // length
    return number[None] <= number[:, None]


def counts(length, steps):
    """How many tokens each step of a block commits at least."""
    return [length // steps + (step < length % steps) for step in range(steps)]


def sampled(logits, temperature, top_k, top_p):
    """Tokens drawn of logits (1, n, V), and their probabilities under what they were drawn from."""
    logits = logits / temperature
    if top_k > 0:
        least = logits.topk(top_k).values[..., -1:]
        logits = logits.masked_fill(logits < least, -torch.inf)
    if top_p < 1:
        sure, order = logits.softmax(-1).sort(descending=True)
        late = sure.cumsum(-1) - sure > top_p
        logits = logits.masked_fill(late.gather(-1, order.argsort(-1)), -torch.inf)
    odds = logits.softmax(-1)
    ids = torch.multinomial(odds[0], 1)[None, :, 0]
    return ids, odds.gather(-1, ids[..., None])[..., 0]
