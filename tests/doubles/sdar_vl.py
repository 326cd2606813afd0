"""A tiny SDAR-VL of our own writing: what its authors' script says of the model, on the images of
LLaVA-OneVision, as transformers cuts them. And the script's loop. Random weights.
"""

import functools
import math
from types import SimpleNamespace

import torch
from copying import copied
from doubles import block
from doubles import dream_vl as qwen
from tokenizers import AddedToken
from torch import nn
from transformers import DynamicCache, PretrainedConfig, PreTrainedModel

LENGTH = 4
SIDE, PATCH = 28, 7  # pixels of a tile and of a token
PINS = [[SIDE * high, SIDE * wide] for high in (1, 2) for wide in (1, 2, 3)]
TEMPLATE = qwen.TEMPLATE.replace("<|image_pad|>", "<image>\n")


@functools.cache
def tokenizer():
    made = qwen.tokenizer()
    words = type(made)(
        tokenizer_object=made.backend_tokenizer.from_str(made.backend_tokenizer.to_str()),
        eos_token="<|im_end|>", pad_token="<|endoftext|>", chat_template=TEMPLATE,
    )  # fmt: skip
    words.add_tokens([AddedToken(t, special=True) for t in ("<image>", "<|MASK|>")])
    return words


class SDARVLConfig(PretrainedConfig):
    model_type = "sdar_vl"

    def __init__(self, **kwargs):
        made = {"text_config", "vision_config", "image_token_index", "image_grid_pinpoints"}
        super().__init__(**{name: kwargs[name] for name in kwargs.keys() - made})
        self.text_config = block.text_config(vocab_size=len(tokenizer()), model_type="sdar")
        self.vision_config = PretrainedConfig(image_size=SIDE, patch_size=PATCH, width=32)
        self.image_token_index = tokenizer().convert_tokens_to_ids("<image>")
        self.image_grid_pinpoints, self.vision_aspect_ratio = PINS, "anyres_max_9"


class SDARDecoder(block.Decoder):
    def mask_of(self, given):
        assert given.ndim == 3
        return given.bool()


class LanguageModel(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.model = SDARDecoder(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)


class SDARVLForConditionalGeneration(PreTrainedModel):
    config_class = SDARVLConfig

    def __init__(self, config):
        super().__init__(config)
        text, wide = config.text_config, config.vision_config.width
        self.vision_tower = nn.Conv2d(3, wide, PATCH, PATCH)
        self.multi_modal_projector = nn.Linear(wide, text.hidden_size)
        self.image_newline = nn.Parameter(torch.randn(text.hidden_size))
        self.language_model = LanguageModel(text)
        self.post_init()

    def _init_weights(self, module):
        """Random weights are drawn in :func:`model`."""

    def get_input_embeddings(self):
        return self.language_model.model.embed_tokens

    def packed(self, views, size):
        """(n, D): the base view's tokens, then the mosaic's rows, each with a newline."""
        x = self.vision_tower(views)
        x = x + self.vision_tower(views).mean((2, 3), keepdim=True)
        base, tiles = x[0].flatten(1).T, x[1:]
        (height, width), n = size.tolist(), SIDE // PATCH
        high, wide = best(height, width)
        grid = tiles.unflatten(0, (high, wide)).permute(2, 0, 3, 1, 4)
        grid = grid.reshape(-1, high * n, wide * n)
        rows, columns = grid.shape[1:]
        if width / height > columns / rows:
            cut = (rows - int(round(height * columns / width, 7))) // 2
            grid = grid[:, cut : rows - cut]
        else:
            cut = (columns - int(round(width * rows / height, 7))) // 2
            grid = grid[:, :, cut : columns - cut]
        times = math.sqrt(grid.shape[1] * grid.shape[2] / (9 * n * n))
        assert times <= 1.1  # nothing here is reduced
        grid = self.multi_modal_projector(grid.permute(1, 2, 0))
        lines = self.image_newline.expand(len(grid), 1, -1)
        grid = torch.cat((grid, lines), 1).flatten(0, 1)
        return torch.cat((self.multi_modal_projector(base), grid))

    def forward(
        self,
        input_ids=None,
        pixel_values=None,
        image_sizes=None,
        pixel_values_videos=None,
        image_sizes_videos=None,
        **kwargs,
    ):
        assert pixel_values_videos is image_sizes_videos is None
        x = self.get_input_embeddings()(input_ids)
        if pixel_values is not None:
            seen = torch.cat([self.packed(*p) for p in zip(pixel_values, image_sizes, strict=True)])
            where = (input_ids == self.config.image_token_index)[..., None]
            x = x.masked_scatter(where, seen.to(x))
        hidden = self.language_model.model(inputs_embeds=x, **kwargs)[0]
        return SimpleNamespace(logits=self.language_model.lm_head(hidden))


def best(height, width):
    """Rows and columns of tiles: most of the image's pixels shown, then least waste."""

    def merit(pin):
        scale = min(pin[1] / width, pin[0] / height)
        shown = min(int(width * scale) * int(height * scale), width * height)
        return shown, shown - pin[0] * pin[1]

    high, wide = max(PINS, key=merit)
    return high // SIDE, wide // SIDE


@torch.no_grad()
def generate(
    model,
    inputs,
    mask_id,
    gen_length=128,
    block_length=8,
    denoising_steps=8,
    remasking_strategy="low_confidence_dynamic",
    confidence_threshold=0.9,
    stopping_criteria_idx=(),
):
    """The script's loop, greedy; ids (1, …) of prompt and answer."""
    prompt, cache = inputs["input_ids"].shape[1], DynamicCache()
    count = -(-(prompt + gen_length) // block_length)
    seen = block.causal(count, block_length)[None].float()
    x = torch.full((1, count * block_length), mask_id)
    x[:, :prompt] = inputs["input_ids"]

    def run(start, stop, ids, store, **pictures):
        return model(
            input_ids=ids,
            attention_mask=seen[:, start:stop, :stop],
            position_ids=torch.arange(start, stop)[None],
            past_key_values=cache,
            use_cache=True,
            store_kv=store,
            **pictures,
        ).logits

    first = prompt // block_length * block_length
    pictures = {name: inputs[name] for name in ("pixel_values", "image_sizes")}
    run(0, first, x[:, :first], True, **pictures)
    least = block.counts(block_length, denoising_steps)
    for start in range(first, count * block_length, block_length):
        stop = start + block_length
        own = x[:, start:stop].clone()
        for step in range(denoising_steps + 1):
            open_ = own == mask_id
            if not open_.any():
                run(start, stop, own, True)
                break
            logits = run(start, stop, own, False)
            sure, ids = logits.softmax(-1).max(-1)
            sure = sure.where(open_, -torch.inf)
            chosen = sure > confidence_threshold
            if remasking_strategy == "sequential":
                at = int(open_[0].nonzero()[0])
                chosen = torch.zeros_like(open_)
                chosen[:, at : at + least[step]] = True
            elif remasking_strategy == "low_confidence_static" or chosen.sum() < least[step]:
                chosen = torch.zeros_like(open_)
                chosen[:, sure[0].topk(least[step]).indices] = True
            own = torch.where(chosen, ids, own)
        x[:, start:stop] = own
        if any(i in x[:, prompt:] for i in stopping_criteria_idx):
            break
    return x


@copied
def model(seed=0, dtype=torch.float32, scale=1.0):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        made = SDARVLForConditionalGeneration(SDARVLConfig())
        block.draw(made, tokenizer().convert_tokens_to_ids("<|MASK|>"), scale)
    return made.to(dtype).eval()


def processor():
    import transformers

    from captum_dcam.model.hub import check_transformers, find

    check_transformers(find("sdar_vl"))  # older versions have none of its image processor
    name = "LlavaOnevisionImageProcessor"  # transformers 5 has one without torchvision, too
    kind = getattr(transformers, f"{name}Pil", None) or getattr(transformers, name)
    images = kind(size={"height": SIDE, "width": SIDE}, image_grid_pinpoints=PINS)
    return SimpleNamespace(tokenizer=tokenizer(), image_processor=images, chat_template=TEMPLATE)
