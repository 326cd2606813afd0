"""A tiny MinerU-Diffusion of our own writing, faithful to what was found out about the real one.

Same module paths, a prompt that is prefilled whole with blocks counted back from its end, sampling
without a greedy mode, commits above a threshold, writing over visible tokens, ``step_map``, the end
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
TEMPLATE = qwen.TEMPLATE.replace("<|image_pad|>", "<|vision_start|><|image_pad|><|vision_end|>")


class MinerUDiffusionConfig(PretrainedConfig):
    model_type = "mineru_diffusion"

    def __init__(self, **kwargs):
        ids = dict(
            zip(qwen.MARKERS, qwen.tokenizer().convert_tokens_to_ids(qwen.MARKERS), strict=True)
        )
        made = {"text_config", "vision_config", "mask_token_id", "image_token_id"}
        super().__init__(**{name: kwargs[name] for name in kwargs.keys() - made})
        self.text_config = block.text_config()
        self.vision_config = PretrainedConfig(**block.VISION)
        self.image_token_id, self.mask_token_id = ids["<|image_pad|>"], ids["<|mask|>"]


class SDARDecoder(block.Decoder):
    def mask_of(self, given):
        assert given.dtype == torch.bool and given.ndim == 4
        return given


class SDARForCausalLM(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.model = SDARDecoder(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)

    def forward(self, **kwargs):
        return SimpleNamespace(logits=self.lm_head(self.model(**kwargs)[0]))

    def generate_with_embeds(
        self,
        inputs_embeds,
        gen_length,
        block_length,
        mask_token_id,
        denoising_steps=8,
        temperature=1.0,
        top_k=0,
        top_p=1.0,
        dynamic_threshold=0.85,
        stopping_criteria=None,
        tokenizer=None,
    ):
        if gen_length % block_length:
            raise ValueError("gen_length must be a multiple of block_length")
        prompt, cache = inputs_embeds.shape[1], DynamicCache()
        embed = self.model.embed_tokens
        masked = embed(torch.tensor([mask_token_id]))
        x = torch.cat((inputs_embeds, masked[None].expand(1, gen_length, -1)), 1)
        ids = torch.full((1, prompt + gen_length), mask_token_id)
        step_map = torch.zeros_like(ids)
        before = -(-prompt // block_length)
        seen = block.causal(before + gen_length // block_length, block_length)
        seen = seen[-prompt - gen_length :, -prompt - gen_length :]

        def run(start, stop, store):
            return self(
                inputs_embeds=x[:, start:stop],
                attention_mask=seen[None, None, start:stop, :stop],
                position_ids=torch.arange(start, stop)[None],
                past_key_values=cache,
                use_cache=True,
                store_kv=store,
            ).logits

        run(0, prompt, True)
        least = block.counts(block_length, denoising_steps)
        stops = [tokenizer.encode(s, add_special_tokens=False) for s in stopping_criteria or ()]
        taken = 0
        for start in range(prompt, prompt + gen_length, block_length):
            stop = start + block_length
            own, own_ids, own_map = x[:, start:stop], ids[:, start:stop], step_map[:, start:stop]
            for step in range(denoising_steps + 1):
                open_ = (own == masked).all(-1)
                if not open_.any():
                    run(start, stop, True)
                    break
                best, sure = block.sampled(run(start, stop, False), temperature, top_k, top_p)
                sure = sure.where(open_, -torch.inf)
                chosen, count = sure > dynamic_threshold, least[min(step, denoising_steps - 1)]
                if chosen.sum() < count:  # of too few masks, visible tokens too
                    chosen = torch.zeros_like(open_)
                    chosen[:, sure[0].topk(count).indices] = True
                taken += 1
                written = embed(best)
                own[chosen], own_ids[chosen] = written[chosen], best[chosen]
                own_map[chosen] = taken
            said = ids[0, prompt:stop].tolist()
            for one in stops:
                at = [i for i in range(len(said)) if said[i : i + len(one)] == one]
                if at:
                    return ids[:, prompt : prompt + at[0]], step_map[:, prompt:stop], None
        return ids[:, prompt:], step_map[:, prompt:], None


class MinerUDiffusionForConditionalGeneration(PreTrainedModel):
    config_class = MinerUDiffusionConfig

    def __init__(self, config):
        super().__init__(config)
        text = config.text_config
        self.vision_model = block.Tower(config.vision_config.width, text.hidden_size)
        self.language_model = SDARForCausalLM(text)
        self.post_init()

    def _init_weights(self, module):
        """Random weights are drawn in :func:`model`."""

    def get_input_embeddings(self):
        return self.language_model.model.embed_tokens

    @torch.no_grad()
    def generate(self, pixel_values=None, image_grid_thw=None, input_ids=None, **kwargs):
        embeds = self.get_input_embeddings()(input_ids)
        where = (input_ids == self.config.image_token_id)[..., None]
        embeds = embeds.masked_scatter(where, self.vision_model(pixel_values, image_grid_thw))
        return self.language_model.generate_with_embeds(inputs_embeds=embeds, **kwargs)


@copied
def model(seed=0, dtype=torch.float32, scale=1.0):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        made = MinerUDiffusionForConditionalGeneration(MinerUDiffusionConfig())
        block.draw(made, made.config.mask_token_id, scale)
    return made.to(dtype).eval()


def processor():
    return SimpleNamespace(
        tokenizer=qwen.tokenizer(), image_processor=qwen.ImageProcessor(), chat_template=TEMPLATE
    )
