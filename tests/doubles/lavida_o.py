"""A tiny stand-in for LaViDa-O's understanding path: LaViDa-LLaDA with a strided convolution behind
the tower, and a decoder that rebuilds its cache at every block.

Of our own writing, after the family's behaviour. Tiles are 104 pixels of 7x7 patches,
reduced to 3x3 tokens by default; ``tile=384`` has the real 27x27 and 13x13.
"""

import math

import torch
from copying import copied
from doubles import lavida as base
from torch import nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

#: what upstream reads from NOT_ALWASY_DO_2DPOOL=1 when it is imported
ALWASY_DO_2DPOOL = False
MASK, VOCABULARY = base.MASK, base.VOCABULARY


class SpatialPool(nn.Module):
    """A convolution of 2x2 patches with stride 2; an odd last row and column are lost."""

    def __init__(self, width):
        super().__init__()
        self.stride = 2
        self.pool = nn.Conv2d(width, width, 2, 2)

    def forward(self, features, images=None):
        side = math.isqrt(features.shape[1])
        return self.pool(features.transpose(1, 2).unflatten(2, (side, side))).flatten(2).mT


class LLaDALlamaBlock(base.LLaDALlamaBlock):
    def forward(
        self, x, attention_bias=None, layer_past=None, use_cache=False, block_mask=None,
        modality_indices=None, replace_position=None,
    ):  # fmt: skip
        if replace_position is None:
            return super().forward(x, None, layer_past, use_cache)
        h = self.attn_norm(x)
        q, k, v = (
            p(h).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for p in (self.q_proj, self.k_proj, self.v_proj)
        )
        where = replace_position.nonzero()[:, 1]
        for old, new in zip(layer_past, (k, v), strict=True):
            old[:, :, where] = new  # in place, in the cache that was handed in
        k, v = layer_past
        out = functional.scaled_dot_product_attention(
            base.turned(q, int(where[0])), base.turned(k), v
        )
        x = x + self.attn_out(out.transpose(1, 2).flatten(2))
        x = x + self.ff_out(self.up_proj(self.ff_norm(x)).tanh())
        return x, (k, v) if use_cache else None


class LlavaLladaModel(base.LlavaLladaModel):
    def __init__(self, config):
        super().__init__(config)
        blocks = [LLaDALlamaBlock(config.d_model, 2) for _ in range(config.n_layers)]
        self.transformer["blocks"] = nn.ModuleList(blocks)
        self.vision_resampler = SpatialPool(8)

    def forward(
        self, input_ids, input_embeddings=None, past_key_values=None, use_cache=False,
        modality_indices=None, replace_position=None,
    ):  # fmt: skip
        x = self.transformer.wte(input_ids) if input_embeddings is None else input_embeddings
        pairs = []
        for i, block in enumerate(self.transformer.blocks):
            past = None if past_key_values is None else past_key_values[i]
            rest = (None, past, use_cache, None, modality_indices, replace_position)
            if self.activation_checkpointing_strategy == "whole_layer":
                x, pair = checkpoint(block, x, *rest, use_reentrant=True)
            else:
                x, pair = block(x, *rest)
            pairs.append(pair)
        logits = self.transformer.ff_out(self.transformer.ln_f(x))
        kept = pairs if use_cache else None
        return base.SimpleNamespace(logits=logits, attn_key_values=kept)


class LlavaLladaForMaskedDiffusion(base.LlavaLladaForMaskedDiffusion):
    def __init__(self, config):
        nn.Module.__init__(self)
        self.config = config
        self.model = LlavaLladaModel(config)
        self.model.set_activation_checkpointing("whole_layer")

    def encode(self, images):
        features = self.model.vision_tower(images)
        return self.model.mm_projector(self.model.vision_resampler(features, images=images))

    def get_2dPool(self, features):
        """Never used: upstream pools twice unless NOT_ALWASY_DO_2DPOOL is set, and fails."""
        raise AssertionError("13x13 tokens do not fill 27x27")

    def pools_always(self):
        return ALWASY_DO_2DPOOL

    @torch.no_grad()
    def generate(self, inputs, images=None, image_sizes=None, use_fast_dlm=False, **options):
        if use_fast_dlm:
            front = self.prepare_inputs_labels_for_multimodal(
                inputs, None, None, None, None, images, options.pop("modalities"), image_sizes
            )[4]
            return self.fast(front, **options)
        return super().generate(inputs, images=images, image_sizes=image_sizes, **options)

    @torch.no_grad()
    def fast(
        self, front, steps=128, max_new_tokens=128, block_length=128, temperature=0.0,
        remasking="low_confidence", mask_id=126336, factor=1.0, threshold=None,
        step_per_block=None, **_ignored,
    ):  # fmt: skip
        """A whole run at every block's beginning, then the block alone against its cache."""
        start = front.shape[1]
        ids = torch.full((1, start + max_new_tokens), mask_id, device=self.device)
        ids[:, :start] = 0
        each = min(step_per_block or steps // (max_new_tokens // block_length), block_length)
        runs = 0
        for begin in range(start, ids.shape[1], block_length):
            block = slice(begin, begin + block_length)
            x = self.embed(ids)
            x[:, :start] = front
            out = self.model(ids, input_embeddings=x, use_cache=True)
            logits, step = out.logits[:, block], 0
            here = torch.zeros_like(ids, dtype=torch.bool)
            here[:, block] = True
            while True:
                runs += 1
                part = ids[:, block]
                masked = part == mask_id
                count = block_length // each + (step < block_length % each)
                take = chosen(logits, masked, count, factor, threshold)
                part[:, take] = logits.argmax(-1)[:, take]  # a view: ids change
                step += 1
                if not (ids[:, block] == mask_id).any():
                    break
                logits = self.model(
                    ids[:, block], past_key_values=out.attn_key_values, use_cache=True,
                    replace_position=here,
                ).logits  # fmt: skip
        return ids, runs


def chosen(logits, masked, count, factor, threshold):
    """Positions that one step commits: the surest, as many as stay above a rising bar."""
    sure = logits.double().softmax(-1).amax(-1).masked_fill(~masked, -math.inf)[0]
    order = sure.sort(descending=True)
    open_ = int(masked.sum())
    if factor is not None:
        bars = [1 - factor / (n + 1) for n in range(1, open_ + 1)]
        bars[0] = -1.0
        low = [n for n in range(open_) if order.values[n] < bars[n]]
        count = low[0] if low else open_ - 1
        count += count in (0, open_ - 1)
    elif threshold is not None:
        count = max(1, int((sure >= threshold).sum()))
    return order.indices[:count]


def config(**changes):
    made = base.config(**{"mm_spatial_pool_mode": None, **changes})
    made.dual_tower, made.dual_tower_layers = True, 2
    return made


@copied
def model(seed=0, dtype=torch.float32, **changes):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        made = LlavaLladaForMaskedDiffusion(config(**changes))
        with torch.no_grad():
            for name, parameter in made.named_parameters():
                if any(n in name for n in ("q_proj", "k_proj", "ff_out")):
                    parameter.mul_(3)
    return made.to(dtype).eval()


processor = base.processor
