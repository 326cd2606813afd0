"""A tiny Fast-dVLM of our own writing, faithful to what others have published of the real one.

Module paths, M-RoPE over an image's rows and columns, position p predicted at p - 1, a causal
context, ``generate`` and its arguments. Random weights.
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
MASK = "|<MASK>|"
TEMPLATE = qwen.TEMPLATE.replace("<|image_pad|>", "<|vision_start|><|image_pad|><|vision_end|>")


@functools.cache
def tokenizer():
    made = qwen.tokenizer()
    words = type(made)(
        tokenizer_object=made.backend_tokenizer.from_str(made.backend_tokenizer.to_str()),
        eos_token="<|im_end|>", pad_token="<|endoftext|>", chat_template=TEMPLATE,
    )  # fmt: skip
    words.add_tokens([AddedToken(MASK, special=True)])
    return words


class Fast_dVLMConfig(PretrainedConfig):
    model_type = "fast_dvlm"

    def __init__(self, **kwargs):
        made = {"text_config", "vision_config", "image_token_id"}
        others = {name: kwargs[name] for name in kwargs.keys() - made}
        super().__init__(**{"tie_word_embeddings": False, **others})  # transformers 4 ties
        self.text_config = block.text_config(vocab_size=len(tokenizer()))
        self.vision_config = PretrainedConfig(**block.VISION)
        self.image_token_id = tokenizer().convert_tokens_to_ids("<|image_pad|>")


class TextModel(causal.Decoder):
    def forward(
        self,
        attention_mask=None,
        position_ids=None,
        past_key_values=None,
        inputs_embeds=None,
        use_cache=None,
        update_past_key_values=True,
    ):
        assert attention_mask.dtype == torch.bool and position_ids.ndim == 3
        x = inputs_embeds
        return (self.run(x, attention_mask, position_ids, past_key_values, update_past_key_values),)


class Core(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.config, self.rope_deltas = config, None
        self.visual = block.Tower(config.vision_config.width, config.text_config.hidden_size)
        self.language_model = TextModel(config.text_config)

    def spots(self, ids, grids):
        """(3, 1, P): an image's tokens share a time, and lie in rows and columns."""
        out, grids, start, at = [], grids.tolist(), 0, 0
        one = ids[0].tolist()
        while at < len(one):
            if one[at] != self.config.image_token_id:
                out.append(torch.full((3, 1), start))
                start, at = start + 1, at + 1
                continue
            _, high, wide = (n // m for n, m in zip(grids.pop(0), (1, 2, 2), strict=True))
            rows, columns = torch.meshgrid(torch.arange(high), torch.arange(wide), indexing="ij")
            own = torch.stack((torch.zeros_like(rows), rows, columns)).flatten(1) + start
            out.append(own)
            start, at = int(own.max()) + 1, at + high * wide
        return torch.cat(out, 1)[:, None]

    def forward(
        self,
        input_ids=None,
        pixel_values=None,
        image_grid_thw=None,
        past_key_values=None,
        use_cache=None,
        update_past_key_values=True,
    ):
        x = self.language_model.embed_tokens(input_ids)
        behind, count = past_key_values.get_seq_length() if past_key_values else 0, x.shape[1]
        if pixel_values is not None:
            where = (input_ids == self.config.image_token_id)[..., None]
            x = x.masked_scatter(where, self.visual(pixel_values, image_grid_thw).to(x))
            places = self.spots(input_ids, image_grid_thw)
            self.rope_deltas = int(places.max()) + 1 - count
        else:
            places = (behind + self.rope_deltas + torch.arange(count)).expand(3, 1, -1)
        mask = causal.causal(count, behind)
        return self.language_model(
            inputs_embeds=x,
            attention_mask=mask if update_past_key_values else torch.ones_like(mask),
            position_ids=places,
            past_key_values=past_key_values,
            use_cache=use_cache,
            update_past_key_values=update_past_key_values,
        )[0]


class Fast_dVLMForConditionalGeneration(PreTrainedModel):
    config_class = Fast_dVLMConfig

    def __init__(self, config):
        super().__init__(config)
        text = config.text_config
        self.model = Core(config)
        self.lm_head = nn.Linear(text.hidden_size, text.vocab_size, bias=False)
        self.post_init()

    def _init_weights(self, module):
        """Random weights are drawn in :func:`model`."""

    def get_input_embeddings(self):
        return self.model.language_model.embed_tokens

    def forward(self, **kwargs):
        return SimpleNamespace(logits=self.lm_head(self.model(**kwargs)))

    @torch.no_grad()
    def generate(
        self,
        input_ids,
        tokenizer,
        block_size=32,
        max_tokens=128,
        mask_id=None,
        pixel_values=None,
        image_grid_thw=None,
        threshold=0.9,
    ):
        cache, shown = DynamicCache(), [pixel_values, image_grid_thw]

        def run(ids, store):
            pictures = (
                {"pixel_values": shown.pop(0), "image_grid_thw": shown.pop(0)} if shown else {}
            )
            return self(
                input_ids=ids,
                past_key_values=cache,
                use_cache=True,
                update_past_key_values=store,
                **pictures,
            ).logits

        def pick(logits, open_, _step):
            best, odds = causal.sure(torch.cat((logits[:, :1], logits[:, :-1]), 1))
            odds = odds.where(open_, -torch.inf)
            chosen = odds > threshold
            chosen[:, odds[0].argmax()] = True
            return best, chosen & open_

        end = tokenizer.eos_token_id
        return causal.decoded(run, input_ids, max_tokens, block_size, mask_id, end, pick)[0]


@copied
def model(seed=0, dtype=torch.float32, scale=1.0):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        made = Fast_dVLMForConditionalGeneration(Fast_dVLMConfig())
        block.draw(made, tokenizer().convert_tokens_to_ids(MASK), scale)
    return made.to(dtype).eval()


def processor():
    return SimpleNamespace(
        tokenizer=tokenizer(), image_processor=qwen.ImageProcessor(), chat_template=TEMPLATE
    )
