"""A tiny DiffusionVL of our own writing, faithful to what was found out about the real one.

Same module paths, ids with -200 for an image, masks by kind of attention, the prompt's tail inside
the first block, masked positions known by their embeddings, the pass that stores a block, the end
of the answer. Random weights.
"""

from types import SimpleNamespace

import torch
from copying import copied
from doubles import block
from doubles import dream_vl as qwen
from torch import nn
from transformers import DynamicCache, PretrainedConfig, PreTrainedModel

LENGTH = 4
IMAGE = -200


class DiffusionVLConfig(PretrainedConfig):
    model_type = "diffusionvl_qwenvl"

    def __init__(self, bd3lm_block_size=LENGTH, **kwargs):
        ids = dict(
            zip(qwen.MARKERS, qwen.tokenizer().convert_tokens_to_ids(qwen.MARKERS), strict=True)
        )
        made = {"text_config", "vision_config", "mask_token_id", "end_token_id", "image_token_id"}
        others = {name: kwargs[name] for name in kwargs.keys() - made}
        super().__init__(**{"tie_word_embeddings": False, **others})  # transformers 4 ties
        self.text_config = block.text_config()
        self.vision_config = PretrainedConfig(**block.VISION)
        self.image_token_id, self.video_token_id = ids["<|image_pad|>"], None
        self.mask_token_id, self.end_token_id = ids["<|mask|>"], ids["<|im_end|>"]
        self.bd3lm_block_size = bd3lm_block_size


class DiffusionVLDecoder(block.Decoder):
    def __init__(self, config):
        super().__init__(config.text_config)
        self.bd3lm_block_size, self.mask_token_id = config.bd3lm_block_size, config.mask_token_id

    def mask_of(self, given):
        assert given.keys() == {"full_attention", "sliding_attention"}
        return given["full_attention"]


class DiffusionVL_Qwen2_5_VL_ForConditionalGeneration(PreTrainedModel):
    config_class = DiffusionVLConfig

    def __init__(self, config):
        super().__init__(config)
        text = config.text_config
        self.visual = block.Tower(config.vision_config.width, text.hidden_size)
        self.model = DiffusionVLDecoder(config)
        self.lm_head = nn.Linear(text.hidden_size, text.vocab_size, bias=False)
        self.post_init()

    def _init_weights(self, module):
        """Random weights are drawn in :func:`model`."""

    def get_input_embeddings(self):
        return self.model.embed_tokens

    def embed(self, ids, images, grids):
        parts = self.visual(images, grids).split((grids.prod(-1) // 4).tolist())
        rows, left = [], list(parts)
        for one in ids[0]:
            rows.append(left.pop(0) if one == IMAGE else self.model.embed_tokens(one[None]))
        return torch.cat(rows)[None]

    @torch.no_grad()
    def generate(self, inputs=None, images=None, image_grid_thws=None, **kwargs):
        embeds = self.embed(inputs, images, image_grid_thws)
        return self.generate_with_bd3lm(inputs_embeds=embeds, **kwargs)

    @torch.no_grad()
    def generate_with_bd3lm(
        self,
        inputs_embeds,
        steps=4,
        gen_length=128,
        temperature=0.0,
        top_k=0,
        top_p=1.0,
        remasking_strategy="low_confidence_static",
        confidence_threshold=0.85,
        **_others,
    ):
        size, prompt = self.model.bd3lm_block_size, inputs_embeds.shape[1]
        count = -(-(prompt + gen_length) // size)
        mask_id, end = self.model.mask_token_id, self.config.end_token_id
        masked = self.get_input_embeddings()(torch.tensor([mask_id]))
        x = masked.repeat(1, count * size, 1)
        x[:, :prompt] = inputs_embeds
        ids = torch.full((1, count * size), mask_id)
        ids[:, :prompt] = self.lm_head(inputs_embeds).argmax(-1)
        seen = torch.where(block.causal(count, size), 0.0, -torch.inf).to(x.dtype)
        cache, first = DynamicCache(), prompt // size

        def run(start, stop, embeds, store):
            mask = seen[None, None, start:stop, :stop]
            return self.model(
                inputs_embeds=embeds,
                attention_mask={"full_attention": mask, "sliding_attention": mask},
                position_ids=torch.arange(start, stop)[None],
                past_key_values=cache,
                use_cache=True,
                store_kv=store,
            )[0]

        if first:
            run(0, first * size, x[:, : first * size], True)
        least = [*block.counts(size, steps), size // steps]
        for number in range(first, count):
            place = slice(number * size, number * size + size)
            own, own_ids = x[:, place].clone(), ids[:, place]
            for step in range(steps + 1):
                open_ = ((own - masked).abs() < 1e-5).all(-1)
                if not open_.any():
                    run(place.start, place.stop, own, True)
                    break
                logits = self.lm_head(run(place.start, place.stop, own, False)).float()
                if temperature == 0:
                    best = logits.argmax(-1)
                    sure = logits.softmax(-1).gather(-1, best[..., None])[..., 0]
                else:
                    best, sure = block.sampled(logits, temperature, top_k, top_p)
                sure = sure.where(open_, -torch.inf)
                chosen = sure > confidence_threshold
                if remasking_strategy == "low_confidence_static" or chosen.sum() < least[step]:
                    top = sure[0].topk(min(least[step], int(open_.sum()))).indices
                    chosen = torch.zeros_like(open_)
                    chosen[:, top] = True
                own_ids = torch.where(chosen, best, own_ids)
                written = self.get_input_embeddings()(best)
                own = torch.where(chosen[..., None], written, own)
            ids[:, place] = own_ids
            if end in ids[:, max(prompt, place.start) : place.stop]:
                break
        return ids[:, prompt : prompt + gen_length]


@copied
def model(seed=0, dtype=torch.float32, **changes):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        made = DiffusionVL_Qwen2_5_VL_ForConditionalGeneration(DiffusionVLConfig(**changes))
        block.draw(made, made.config.mask_token_id)
    return made.to(dtype).eval()


def processor():
    return SimpleNamespace(
        tokenizer=qwen.tokenizer(),
        image_processor=qwen.ImageProcessor(),
        chat_template=qwen.TEMPLATE,
    )
