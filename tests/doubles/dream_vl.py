"""A tiny Dream-VL of our own writing, faithful to what was found out about the real one.

Same module paths, return types, processor, shift by one, schedule, and traps: a mask (B, N) that
attention cannot take on a CPU, a prompt cache that fails, defaults that nobody wants, ranking over
the whole batch. Random weights.
"""

import functools
from types import SimpleNamespace

import numpy as np
import torch
from copying import copied
from PIL import Image
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerFast

LEAST, MOST = 56 * 56, 28 * 28 * 30
VOCABULARY = 120
MARKERS = [
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|image_pad|>",
    "<|video_pad|>",
    "<|mask|>",
]
WORDS = (
    "what is this describe the picture image a red blue green circle square on left right of "
    "system user assistant You are helpful . \n"
)
TEMPLATE = (
    "{% for m in messages %}{% if loop.first and m.role != 'system' %}<|im_start|>system\n"
    "You are a helpful assistant.<|im_end|>\n{% endif %}<|im_start|>{{ m.role }}\n"
    "{% if m.content is string %}{{ m.content }}{% else %}{% for part in m.content %}"
    "{% if part.type == 'image' %}<|image_pad|>{% elif part.type == 'video' %}<|video_pad|>"
    "{% else %}{{ part.text }}{% endif %}{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
    "{{ '<|im_start|>assistant\n' }}"
)

#: Dimple's, with markers around images
MARKED = TEMPLATE.replace("<|image_pad|>", "<|vision_start|><|image_pad|><|vision_end|>")


@functools.cache
def tokenizer():
    words = [w for w in WORDS.split(" ") if w]
    table = {}
    for form in (f for w in words for f in (w, f" {w}")):
        table.setdefault(form, len(table))
    for name in ("<unk>", *MARKERS):
        table[name] = len(table)
    for i in range(len(table), VOCABULARY):
        table[f" w{i}"] = i
    made = Tokenizer(models.WordLevel(table, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.Split(Regex(r"\n| ?[^\s.]+|\."), "isolated")
    made.decoder = decoders.Fuse()
    made.add_special_tokens([AddedToken(n, special=True) for n in MARKERS])
    return PreTrainedTokenizerFast(
        tokenizer_object=made,
        eos_token="<|endoftext|>",
        pad_token="<|endoftext|>",
        mask_token="<|mask|>",
        chat_template=TEMPLATE,
    )


def shape(**changes):
    """Arguments of the configuration, the real one's too."""
    ids = dict(zip(MARKERS, tokenizer().convert_tokens_to_ids(MARKERS), strict=True))
    sizes = dict(
        vocab_size=VOCABULARY,
        hidden_size=48,
        intermediate_size=64,
        num_hidden_layers=4,
        num_attention_heads=3,
        num_key_value_heads=1,
        max_position_embeddings=256,
        rope_theta=10000.0,
        mrope_section=[2, 3, 3],
        projector_hidden_act="gelu",
        mask_token_id=ids["<|mask|>"],
        pad_token_id=ids["<|endoftext|>"],
        image_token_id=ids["<|image_pad|>"],
        video_token_id=ids["<|video_pad|>"],
        vision_start_token_id=ids["<|vision_start|>"],
        vision_end_token_id=ids["<|vision_end|>"],
        vision_config=dict(depth=1, embed_dim=32, hidden_size=32, num_heads=2),
    )
    return {**sizes, **changes}


def draw(model):
    """Random weights; keys are enlarged so that attention is far from uniform, and no position is
    filled with the mask."""
    for name, p in model.named_parameters():
        if p.ndim > 1:
            nn.init.normal_(p, std=1.0 if "embed_tokens" in name else p[0].numel() ** -0.5)
        if "k_proj" in name:
            p.data.mul_(3)
        if "lm_head" in name:
            p.data[model.config.mask_token_id] = 0


class ImageProcessor:
    """Pictures in multiples of 28 pixels; the four patches of a token follow each other."""

    patch_size, merge_size, temporal_patch_size = 14, 2, 2

    def __call__(self, images=None, videos=None, return_tensors="pt"):
        if videos is not None:
            parts = [self.patches(list(frames)) for frames in videos]
            names = ("pixel_values_videos", "video_grid_thw")
        else:
            parts = [self.patches([image] * 2) for image in images]
            names = ("pixel_values", "image_grid_thw")
        pixels = torch.cat([p for p, _ in parts])
        return dict(zip(names, (pixels, torch.tensor([g for _, g in parts])), strict=True))

    @staticmethod
    def size(width, height):
        if width < 28 or height < 28:
            short = min(width, height)
            width, height = (28 if n == short else round(n / short * 28) for n in (width, height))
        wide, high = round(width / 28) * 28, round(height / 28) * 28
        if wide * high > MOST:
            shrink = (width * height / MOST) ** 0.5
            return int(width / shrink / 28) * 28, int(height / shrink / 28) * 28
        if wide * high < LEAST:
            grow = (LEAST / (width * height)) ** 0.5
            return -int(-width * grow / 28 // 1) * 28, -int(-height * grow / 28 // 1) * 28
        return wide, high

    def patches(self, frames):
        wide, high = self.size(*frames[0].size)
        stack = []
        for frame in frames:
            small = frame.convert("RGB").resize((wide, high), Image.Resampling.BICUBIC)
            values = np.asarray(small, dtype=np.float64) / 255
            mean = (0.48145466, 0.4578275, 0.40821073)
            std = (0.26862954, 0.26130258, 0.27577711)
            stack.append((values - mean) / std)
        rows = []
        for t in range(0, len(frames), 2):
            for y in range(0, high, 28):
                for x in range(0, wide, 28):
                    for dy in (0, 14):
                        for dx in (0, 14):
                            cut = np.s_[y + dy : y + dy + 14, x + dx : x + dx + 14]
                            pair = np.stack([stack[t][cut], stack[t + 1][cut]])
                            rows.append(pair.transpose(3, 0, 1, 2).ravel())
        grid = (len(frames) // 2, high // 14, wide // 14)
        return torch.from_numpy(np.stack(rows)).float(), grid


class DreamVLConfig(PretrainedConfig):
    model_type = "dream-vl"

    def __init__(self, vision_config=None, **kwargs):
        vision = dict(patch_size=14, spatial_merge_size=2, temporal_patch_size=2)
        own = {n: kwargs.pop(n) for n in list(kwargs) if n in shape()}
        super().__init__(**{"tie_word_embeddings": False, **kwargs})  # transformers 4 ties
        for name, value in own.items():
            setattr(self, name, value)
        self.vision_config = PretrainedConfig(**vision, **(vision_config or {}))


class DreamVLGenerationConfig:
    def __init__(self, **kwargs):
        self.temperature, self.top_k, self.steps, self.alg = 0.0, None, 512, "origin"
        self.alg_temp, self.top_p, self.eps, self.eos_penalty = None, None, 1e-3, 0.0
        self.use_cache = self.output_history = False
        self.__dict__.update(kwargs)


def turned(x):
    first, second = x.chunk(2, -1)
    return torch.cat((-second, first), -1)


class RMSNorm(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x):
        return self.weight * x * (x.pow(2).mean(-1, keepdim=True) + 1e-6).rsqrt()


class DreamVLRotaryEmbedding(nn.Module):
    """Three sorts of positions, one for each section of the head's width."""

    def __init__(self, config):
        super().__init__()
        self.config, self.section = config, config.mrope_section
        width = config.hidden_size // config.num_attention_heads
        rates = config.rope_theta ** (-torch.arange(0, width, 2, dtype=torch.float64) / width)
        self.register_buffer("inv_freq", rates.float(), persistent=False)

    def forward(self, positions, like):
        angles = positions[..., None] * self.inv_freq.double()
        parts = angles.split(self.section, -1)
        angles = torch.cat([p[i] for i, p in enumerate(parts)], -1).repeat(1, 1, 2)[:, None]
        return angles.cos().to(like), angles.sin().to(like)


class DreamVLSdpaAttention(nn.Module):
    def __init__(self, config):
        super().__init__()
        d, self.heads = config.hidden_size, config.num_attention_heads
        self.groups = config.num_key_value_heads
        narrow = d // self.heads * self.groups
        self.q_proj, self.o_proj = nn.Linear(d, d), nn.Linear(d, d, bias=False)
        self.k_proj, self.v_proj = nn.Linear(d, narrow), nn.Linear(d, narrow)

    def forward(self, hidden_states, attention_mask, position_embeddings):
        if attention_mask is not None and attention_mask.ndim == 2:
            raise RuntimeError("attention cannot take a mask (B, N) on this device")
        cos, sin = position_embeddings
        q = self.q_proj(hidden_states).unflatten(-1, (self.heads, -1)).transpose(1, 2)
        k = self.k_proj(hidden_states).unflatten(-1, (self.groups, -1)).transpose(1, 2)
        v = self.v_proj(hidden_states).unflatten(-1, (self.groups, -1)).transpose(1, 2)
        q, k = (x * cos + turned(x) * sin for x in (q, k))
        k, v = (x.repeat_interleave(self.heads // self.groups, 1) for x in (k, v))
        mixed = nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=attention_mask)
        return self.o_proj(mixed.transpose(1, 2).flatten(2)), None, None


class DreamVLDecoderLayer(nn.Module):
    def __init__(self, config):
        super().__init__()
        d, wide = config.hidden_size, config.intermediate_size
        self.self_attn = DreamVLSdpaAttention(config)
        self.mlp = nn.Sequential(nn.Linear(d, wide), nn.SiLU(), nn.Linear(wide, d))
        self.input_layernorm, self.post_attention_layernorm = RMSNorm(d), RMSNorm(d)

    def forward(self, hidden_states, attention_mask=None, position_embeddings=None):
        mixed = self.self_attn(
            self.input_layernorm(hidden_states), attention_mask, position_embeddings
        )[0]
        hidden_states = hidden_states + mixed
        return (hidden_states + self.mlp(self.post_attention_layernorm(hidden_states)),)


class DreamVLBaseModel(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(
            DreamVLDecoderLayer(config) for _ in range(config.num_hidden_layers)
        )
        self.norm = RMSNorm(config.hidden_size)
        self.rotary_emb = DreamVLRotaryEmbedding(config)

    def forward(self, attention_mask=None, position_ids=None, inputs_embeds=None):
        x = inputs_embeds
        turns = self.rotary_emb(position_ids, x)
        for layer in self.layers:
            x = layer(x, attention_mask=attention_mask, position_embeddings=turns)[0]
        return self.norm(x)


class Visual(nn.Module):
    """Patches to tokens, a token from its own four patches and the mean of its picture."""

    def __init__(self, config):
        super().__init__()
        self.spatial_merge_size = config.spatial_merge_size
        self.patch_embed = nn.Linear(3 * 2 * 14 * 14, config.embed_dim)
        self.blocks = nn.ModuleList([nn.Linear(config.embed_dim, config.embed_dim)])
        self.merger = nn.Linear(4 * config.embed_dim, config.hidden_size)

    def get_dtype(self):
        return self.merger.weight.dtype

    def forward(self, patches, grid_thw):
        x = self.patch_embed(patches).tanh()
        parts = x.split(grid_thw.prod(-1).tolist())
        x = torch.cat([p + self.blocks[0](p.mean(0)) for p in parts])
        return self.merger(x.view(-1, 4 * x.shape[-1]))


class DreamVLGenerationMixin:
    @torch.no_grad()
    def diffusion_generate(
        self,
        inputs,
        generation_config=None,
        attention_mask=None,
        generation_tokens_hook_func=lambda step, x, logits: x,
        generation_logits_hook_func=lambda step, x, logits: logits,
        **pictures,
    ):
        c = generation_config
        if c is None:  # the trap
            c = DreamVLGenerationConfig(temperature=1.0, top_k=50)
        if attention_mask is None:
            raise ValueError("attention_mask should be provided")
        if c.use_cache:
            raise RuntimeError("the prompt cache does not work")
        extra = inputs.new_full((len(inputs), c.max_new_tokens), c.mask_token_id)
        x = generation_tokens_hook_func(None, torch.cat((inputs, extra), 1), None)
        mask = torch.cat((attention_mask, torch.ones_like(extra)), 1)
        times = torch.linspace(1, c.eps, c.steps + 1)
        grids = [pictures.get(n) for n in ("image_grid_thw", "video_grid_thw")]
        history, embeds = [], None
        for step in range(c.steps):
            x = x.clone()
            positions, _ = self.get_rope_index(x, *grids, mask)
            if embeds is None:
                embeds = self.embed(x, **pictures)
            raw = self(inputs_embeds=embeds, attention_mask=mask, position_ids=positions).logits
            shifted = torch.cat((raw[:, :1], raw[:, :-1]), 1)
            shifted = generation_logits_hook_func(step, x, shifted)
            masked = x == c.mask_token_id
            share = 1 - times[step + 1] / times[step]
            last = step == c.steps - 1
            x[masked] = self.filled(shifted[masked], share, last, c)
            x = generation_tokens_hook_func(step, x, shifted)
            history.append(x.clone())
            embeds[masked] = self.get_input_embeddings()(x[masked])
        return SimpleNamespace(sequences=x, history=history if c.output_history else None)

    def filled(self, logits, share, last, c):
        """What stands in the masked places afterwards, the whole batch in one list."""
        out = torch.full((len(logits),), c.mask_token_id, device=logits.device)
        if c.temperature > 0:
            logits = logits / c.temperature
        if c.top_k is not None:
            least = logits.topk(min(c.top_k, logits.shape[-1])).values[:, -1:]
            logits = logits.masked_fill(logits < least, torch.finfo(logits.dtype).min)
        probs = logits.softmax(-1)
        best = probs.max(-1).indices
        if c.temperature > 0:
            best = torch.multinomial(probs, 1)[:, 0]
        if c.alg == "origin":
            chosen = torch.rand(len(out), device=out.device) < (1 if last else share)
            return torch.where(chosen, best, out)
        sure = probs.gather(1, best[:, None])[:, 0]
        if c.alg == "topk_margin":
            sure = probs.topk(2).values @ torch.tensor([1.0, -1.0]).to(probs)
        elif c.alg == "entropy":
            sure = (probs * (probs + 1e-10).log()).sum(-1)
        count = len(out) if last else int(len(out) * share)
        where = sure.topk(count).indices if count else []
        out[where] = best[where]
        return out


class DreamVLModel(DreamVLGenerationMixin, PreTrainedModel):
    config_class = DreamVLConfig

    def __init__(self, config):
        super().__init__(config)
        self.visual = Visual(config.vision_config)
        self.model = DreamVLBaseModel(config)
        wide, d = config.vision_config.hidden_size, config.hidden_size
        self.projector = nn.Sequential(nn.Linear(wide, d), nn.GELU(), nn.Linear(d, d))
        self.lm_head = nn.Linear(d, config.vocab_size, bias=False)
        self.post_init()

    def _init_weights(self, module):
        """Random weights are drawn in :func:`model`."""

    def get_input_embeddings(self):
        return self.model.embed_tokens

    def get_rope_index(self, ids, image_grid_thw=None, video_grid_thw=None, attention_mask=None):
        assert not (ids == self.config.vision_start_token_id).any()
        positions = (attention_mask.cumsum(1) - 1).masked_fill(attention_mask == 0, 1)
        return positions.expand(3, -1, -1), torch.zeros(len(ids), 1)

    def _features(self, pixels, grid):
        return self.visual(pixels, grid).split((grid.prod(-1) // 4).tolist())

    get_image_features = get_video_features = _features

    def embed(
        self,
        ids,
        pixel_values=None,
        image_grid_thw=None,
        pixel_values_videos=None,
        video_grid_thw=None,
    ):
        x = self.get_input_embeddings()(ids)
        for token, pixels, grid in (
            (self.config.image_token_id, pixel_values, image_grid_thw),
            (self.config.video_token_id, pixel_values_videos, video_grid_thw),
        ):
            if pixels is not None:
                seen = self.projector(torch.cat(self._features(pixels, grid)))
                x[ids == token] = seen.to(x)
        return x

    def forward(
        self,
        inputs_embeds=None,
        attention_mask=None,
        position_ids=None,
        use_cache=False,
        return_dict=True,
    ):
        assert not use_cache and return_dict
        hidden = self.model(
            attention_mask=attention_mask, position_ids=position_ids, inputs_embeds=inputs_embeds
        )
        return SimpleNamespace(logits=self.lm_head(hidden))


class DimpleGenerationConfig(DreamVLGenerationConfig):
    def __init__(self, **kwargs):
        self.alg_p_threshold, self.use_original_confidence = None, True
        self.decoding_pipeline = "dim"
        super().__init__(**kwargs)


class DimpleSdpaAttention(DreamVLSdpaAttention):
    """Its model expands the mask before."""


class DimpleGenerationMixin(DreamVLGenerationMixin):
    """Takes all that are sure enough, and stops when nothing is masked; otherwise what the rest of
    the schedule asks for, one token at least."""

    @torch.no_grad()
    def diffusion_generate(
        self, inputs, generation_config=None, attention_mask=None,
        generation_logits_hook_func=lambda step, x, logits: logits, **pictures,
    ):  # fmt: skip
        c = generation_config
        assert c.decoding_pipeline == "dim" and c.alg == "maskgit_plus" and c.temperature == 0
        extra = inputs.new_full((len(inputs), c.max_new_tokens), c.mask_token_id)
        x = torch.cat((inputs, extra), 1)
        mask = torch.cat((attention_mask, torch.ones_like(extra)), 1)
        times = torch.linspace(1, c.eps, c.steps + 1)
        grids = [pictures.get(n) for n in ("image_grid_thw", "video_grid_thw")]
        embeds, history = self.embed(x, **pictures), []
        for step in range(c.steps):
            positions, _ = self.get_rope_index(x, *grids, mask)
            raw = self(inputs_embeds=embeds, attention_mask=mask, position_ids=positions).logits
            shifted = torch.cat((raw[:, :1], raw[:, :-1]), 1)
            shifted = generation_logits_hook_func(step, x, shifted)
            masked = x == c.mask_token_id
            sure, best = shifted[masked].softmax(-1).max(-1)
            take = sure > (c.alg_p_threshold or torch.inf)
            if step == c.steps - 1 and c.alg_p_threshold:
                take[:] = True
            if not take.any():
                now, total = int(masked.sum()), c.max_new_tokens * len(x)
                left = now / total
                after = [t for i, t in enumerate(times) if t < left and i > step]
                counts = [now if t <= times[-1] else int(now * (1 - t / left)) for t in after]
                take[sure.topk(next(n for n in counts if n)).indices] = True
            x = x.clone()
            x[masked] = best.where(take, c.mask_token_id)
            embeds[masked] = self.get_input_embeddings()(x[masked])
            history.append(x)
            if not (x == c.mask_token_id).any():
                break
        return SimpleNamespace(sequences=x, history=history if c.output_history else None)


class DimpleModel(DimpleGenerationMixin, DreamVLModel):
    def __init__(self, config):
        super().__init__(config)
        self.img_projector = self.projector
        del self.projector
        for layer in self.model.layers:
            layer.self_attn.__class__ = DimpleSdpaAttention

    get_image_features = get_video_features = None

    def embed(self, ids, pixel_values=None, image_grid_thw=None):
        x = self.get_input_embeddings()(ids)
        if pixel_values is not None:
            seen = self.img_projector(self.visual(pixel_values, image_grid_thw))
            x[ids == self.config.image_token_id] = seen.to(x)
        return x

    def get_rope_index(self, ids, image_grid_thw=None, video_grid_thw=None, attention_mask=None):
        """An image's tokens have places in its grid; text goes on behind the largest."""
        out = torch.ones(3, *ids.shape, dtype=torch.int64)
        grids = iter([] if image_grid_thw is None else image_grid_thw.tolist())
        for b, row in enumerate(ids):
            at, place = attention_mask[b].nonzero()[:, 0].tolist(), 0
            while at:
                if row[at[0]] != self.config.image_token_id:
                    out[:, b, at.pop(0)] = place
                    place += 1
                    continue
                _, high, wide = next(grids)
                high, wide = high // 2, wide // 2
                for k in range(high * wide):
                    out[:, b, at.pop(0)] = place + torch.tensor([0, k // wide, k % wide])
                place += max(high, wide)
        return out, torch.zeros(len(ids), 1)

    def forward(self, inputs_embeds=None, attention_mask=None, **options):
        seen = attention_mask.bool()
        seen = seen[:, None, :, None] & seen[:, None, None]
        seen = seen | torch.eye(seen.shape[-1], dtype=torch.bool)
        return super().forward(inputs_embeds=inputs_embeds, attention_mask=seen, **options)


@copied
def model(seed=0, dtype=torch.float32, dimple=False, **changes):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        cls = DimpleModel if dimple else DreamVLModel
        made = cls(DreamVLConfig(**shape(**changes)))
        draw(made)
    return made.to(dtype).eval()


def processor(dimple=False):
    template = MARKED if dimple else TEMPLATE
    return SimpleNamespace(
        tokenizer=tokenizer(), image_processor=ImageProcessor(), chat_template=template
    )
