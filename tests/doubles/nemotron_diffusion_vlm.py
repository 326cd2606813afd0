"""A tiny Nemotron-Labs-Diffusion-VLM of our own writing, faithful to what others have published of
the real one.

Module paths, layers that see everything or are causal by an attribute, a mask that only the causal
ones take, queries scaled by ``cache_position``, images of any size with a break between rows, a
tokenizer without a processor, ``generate`` and its arguments. Random weights.
"""

import functools
from types import SimpleNamespace

import torch
from copying import copied
from doubles import block
from doubles import causal_block as causal
from doubles import dream_vl as qwen
from tokenizers import AddedToken
from torch import nn
from transformers import DynamicCache, PretrainedConfig, PreTrainedModel

LENGTH = 4
TEMPLATE = qwen.TEMPLATE.replace("<|image_pad|>", "<|image_start|>")


@functools.cache
def tokenizer():
    made = qwen.tokenizer()
    words = type(made)(
        tokenizer_object=made.backend_tokenizer.from_str(made.backend_tokenizer.to_str()),
        eos_token="<|im_end|>", pad_token="<|endoftext|>", chat_template=TEMPLATE,
    )  # fmt: skip
    names = (f"<|image_{name}|>" for name in ("start", "break", "end"))
    words.add_tokens([AddedToken(t, special=True) for t in names])
    return words


class NemotronLabsDiffusionVLMConfig(PretrainedConfig):
    model_type = "nemotron_labs_diffusion_vlm"

    def __init__(self, block_size=LENGTH, **kwargs):
        kwargs.pop("vision_config", None)
        super().__init__(**{**block.SIZES, "vocab_size": len(tokenizer()), **kwargs})
        self.vision_config = PretrainedConfig(patch_size=14, width=32)
        self.spatial_merge_size, self.block_size = 2, block_size
        self.mask_token_id = tokenizer().convert_tokens_to_ids("<|mask|>")
        self.eos_token_id = tokenizer().eos_token_id


class Encoder(causal.Decoder):
    """Layers are causal, or see everything, by their attention's ``diffusion_lm``."""

    def __init__(self, config):
        super().__init__(config)
        for layer in self.layers:
            layer.self_attn.diffusion_lm = True

    def forward(
        self,
        input_ids=None,
        attention_mask=None,
        position_ids=None,
        past_key_values=None,
        inputs_embeds=None,
        use_cache=None,
        cache_position=None,
        use_causal_mask=False,
    ):
        x = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        cache = past_key_values
        places = causal.positions(cache, x.shape[1]) if cache_position is None else cache_position
        mask, ways = None, {layer.self_attn.diffusion_lm for layer in self.layers}
        assert len(ways) == 1
        if not ways.pop():
            assert use_causal_mask
            given = attention_mask is not None and attention_mask.ndim == 4
            behind = cache.get_seq_length()
            mask = attention_mask if given else causal.causal(x.shape[1], behind)
        for layer in self.layers:
            layer.self_attn.scale = (1 + 0.1 * torch.log1p(places // 8))[:, None].to(x)
        rows = places[None] if position_ids is None else position_ids
        try:
            return (self.run(x, mask, rows, cache, bool(use_cache)),)
        finally:
            for layer in self.layers:
                del layer.self_attn.scale


class NemotronLabsDiffusionVLMModel(PreTrainedModel):
    config_class = NemotronLabsDiffusionVLMConfig

    def __init__(self, config):
        super().__init__(config)
        wide, out = config.vision_config.width, config.hidden_size
        self.encoder = Encoder(config)
        self.encoder.vision_tower = nn.Conv2d(3, wide, 14, 14)
        self.encoder.multi_modal_projector = nn.Conv2d(wide, out, 2, 2)
        self.diffusion_head = nn.Linear(out, config.vocab_size, bias=False)
        self.post_init()

    def _init_weights(self, module):
        """Random weights are drawn in :func:`model`."""

    def get_input_embeddings(self):
        return self.encoder.embed_tokens

    def _embed_with_vision(self, ids, pixel_values, image_sizes):
        x = self.encoder.embed_tokens(ids)
        seen = []
        for image, (height, width) in zip(pixel_values, image_sizes.tolist(), strict=True):
            patches = self.encoder.vision_tower(image[None, :, :height, :width])
            patches = patches + patches.mean((2, 3), keepdim=True)
            seen.append(self.encoder.multi_modal_projector(patches)[0].flatten(1).T)
        where = (ids == tokenizer().convert_tokens_to_ids("<|image_pad|>"))[..., None]
        return x.masked_scatter(where, torch.cat(seen).to(x))

    def forward(
        self,
        input_ids=None,
        past_key_values=None,
        use_cache=None,
        use_causal_mask=False,
        pixel_values=None,
        image_sizes=None,
    ):
        own = {"input_ids": input_ids}
        if pixel_values is not None:
            embeds = self._embed_with_vision(input_ids, pixel_values, image_sizes)
            own = {"inputs_embeds": embeds}
        cache = DynamicCache() if use_cache and past_key_values is None else past_key_values
        hidden = self.encoder(
            **own, past_key_values=cache, use_cache=use_cache, use_causal_mask=use_causal_mask
        )[0]
        return SimpleNamespace(logits=self.diffusion_head(hidden), past_key_values=cache)

    @torch.no_grad()
    def generate(
        self,
        prompt_ids,
        pixel_values=None,
        image_sizes=None,
        max_new_tokens=128,
        steps=128,
        block_length=32,
        shift_logits=False,
        threshold=None,
        causal_context=True,
        temperature=0.0,
        eos_token_id=None,
    ):
        assert not shift_logits and causal_context and not max_new_tokens % block_length
        per_block = steps // (max_new_tokens // block_length)
        cache, least = None, []

        def run(ids, store):
            nonlocal cache
            for layer in self.encoder.layers:
                layer.self_attn.diffusion_lm = not store
            shown = {} if cache else {"pixel_values": pixel_values, "image_sizes": image_sizes}
            out = self(ids, past_key_values=cache, use_cache=store, use_causal_mask=store, **shown)
            cache = out.past_key_values
            for layer in self.encoder.layers:
                layer.self_attn.diffusion_lm = True
            return out.logits

        def pick(logits, open_, step):
            nonlocal least
            if step == 0:
                least = block.counts(int(open_.sum()), per_block)
            if temperature:
                best, odds = block.sampled(logits, temperature, 0, 1.0)
            else:
                best, odds = causal.sure(logits)
            odds = odds.where(open_, -torch.inf)
            count = int(open_.sum()) if threshold else least[step]
            top = odds[0].topk(count).indices
            chosen = torch.zeros_like(open_)
            chosen[:, top] = True
            if threshold:
                chosen &= odds >= threshold
                chosen[:, top[0]] = True
            return best, chosen

        mask_id = self.config.mask_token_id
        return causal.decoded(
            run, prompt_ids, max_new_tokens, block_length, mask_id, eos_token_id, pick
        )


@copied
def model(seed=0, dtype=torch.float32, scale=1.0, **changes):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        made = NemotronLabsDiffusionVLMModel(NemotronLabsDiffusionVLMConfig(**changes))
        block.draw(made, made.config.mask_token_id)
        made.diffusion_head.weight.data.mul_(scale)
        made.diffusion_head.weight.data[made.config.mask_token_id] = 0
    return made.to(dtype).eval()


processor = tokenizer  # it has none
