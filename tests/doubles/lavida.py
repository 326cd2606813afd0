"""A tiny stand-in for LaViDa-LLaDA and LaViDa-Dream: same module paths, class names, return types,
packing, decoding and traps.

Written from the family's description, not from its code. By default tiles are 104 pixels of 7x7
patches, pooled to 4x4 tokens, with 6 pixels that no patch sees; ``tile=384`` has the real sizes.
"""

import itertools
import math
from types import SimpleNamespace

import numpy as np
import torch
from copying import copied
from PIL import Image
from torch import nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint
from transformers import BatchEncoding

IMAGE = -200
PATCH = 14
WORDS = ["!", *"a an the red blue dog cat on of mat what is this describe image . ? \n".split(" ")]
MARKERS = {"<|bos|>": 89, "<|mask|>": 90, "<|eos|>": 91, "<|eot|>": 92, "<|head|>": 93}
MASK, EOS, VOCABULARY = 90, 91, 96
#: what upstream reads from NOT_ALWASY_DO_2DPOOL when it is imported
ALWASY_DO_2DPOOL = True


class Tokenizer:
    """Words of a short list; every other id reads as ``w<id>``."""

    bos_token_id, eos_token_id, pad_token_id = 89, 91, 91
    all_special_ids = sorted(MARKERS.values())

    def encode(self, text, add_special_tokens=True):
        for sign in (*MARKERS, "\n"):
            text = text.replace(sign, f" {sign} ")
        known = {**{w: i for i, w in enumerate(WORDS)}, **MARKERS}
        return [
            known.get(w, int(w[1:]) if w[:1] == "w" and w[1:].isdigit() else 88)
            for w in text.split(" ")
            if w
        ]

    def __call__(self, text, **_options):
        return BatchEncoding({"input_ids": self.encode(text)})

    def decode(self, ids, **_options):
        signs = {v: k for k, v in MARKERS.items()}
        out = ""
        for i in map(int, ids):
            word = WORDS[i] if i < len(WORDS) else f"w{i}"
            out += signs.get(i, "\n" if word == "\n" else f" {word}")
        return out

    def apply_chat_template(self, messages, tokenize=False, add_generation_prompt=False):
        assert not tokenize
        turns = [f"<|head|>{m['role']}\n{m['content']}<|eot|>" for m in messages]
        return "<|bos|>" + "".join(turns) + "<|head|>assistant\n" * add_generation_prompt


class ImageProcessor:
    image_mean = image_std = (0.5, 0.5, 0.5)

    def __init__(self, tile):
        self.size = (tile, tile)
        self.crop_size = {"height": tile, "width": tile}

    def preprocess(self, images, return_tensors="pt"):
        pictures = images if isinstance(images, list) else [images]
        small = [p.convert("RGB").resize(self.size, Image.Resampling.BICUBIC) for p in pictures]
        pixels = torch.stack([torch.from_numpy(np.array(p, dtype=np.float32)) for p in small])
        return {"pixel_values": pixels.permute(0, 3, 1, 2) / 127.5 - 1}


class Tower(nn.Module):
    def __init__(self, width, tile):
        super().__init__()
        self.conv, self.mlp = nn.Conv2d(3, width, PATCH, PATCH), nn.Linear(width, width)
        self.image_size, self.num_patches_per_side = tile, tile // PATCH
        self.config = SimpleNamespace(image_size=tile, patch_size=PATCH)
        self.image_processor, self.is_loaded = ImageProcessor(tile), True

    def forward(self, images):
        given = images.to(self.conv.weight.dtype)  # builders leave the tower in another type
        tokens = self.conv(given).flatten(2).transpose(1, 2)
        return (tokens + self.mlp(tokens).tanh()).to(images.dtype)


def turned(x, start=0):
    """Rotary embedding of (B, heads, L, d) at positions from ``start``."""
    half = x.shape[-1] // 2
    speed = 100.0 ** (-torch.arange(half, dtype=x.dtype, device=x.device) / half)
    at = torch.arange(start, start + x.shape[-2], device=x.device)
    angle = at[:, None].to(x.dtype) * speed
    cos, sin = angle.cos(), angle.sin()
    a, b = x[..., :half], x[..., half:]
    return torch.cat((a * cos - b * sin, a * sin + b * cos), -1)


class Norm(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x):
        return self.weight * x / (x.pow(2).mean(-1, keepdim=True) + 1e-5).sqrt()


class Joint:
    """What both models share: packing, and what a loaded model has."""

    def get_vision_tower(self):
        return self.model.vision_tower

    @property
    def device(self):
        return next(self.parameters()).device

    def get_2dPool(self, features):
        side = self.get_vision_tower().num_patches_per_side
        planes = features.transpose(1, 2).unflatten(2, (side, side))
        mode = self.config.mm_spatial_pool_mode
        if mode == "average":
            planes = functional.avg_pool2d(planes, 2)
        else:
            assert mode == "bilinear"
            half = [-(-side // 2)] * 2
            planes = functional.interpolate(planes, size=half, mode="bilinear")
        return planes.flatten(2).transpose(1, 2)

    def encode(self, images):
        return self.model.mm_projector(self.model.vision_tower(images))

    def pools_always(self):
        return ALWASY_DO_2DPOOL

    def features(self, images, sizes):
        """Tokens of every picture; a 4-D tensor is packed as it is, a list pooled."""
        if not isinstance(images, list):
            return list(self.encode(images))
        out = []
        for views, size in zip(images, sizes, strict=True):
            tokens = self.encode(views if views.ndim == 4 else views[None])
            if self.pools_always():
                tokens = self.get_2dPool(tokens)
            if len(tokens) == 1:
                newline = self.model.image_newline[None]
                unpad = "unpad" in self.config.mm_patch_merge_type
                out.append(torch.cat((tokens[0], newline)) if unpad else tokens[0])
            else:
                out.append(torch.cat((tokens[0], self.mosaic(tokens[1:], size))))
        return out

    def mosaic(self, tiles, size):
        """Tiles put together, without the rows or columns of padding, a newline behind each row."""
        width, height = size
        tile = self.get_vision_tower().image_size
        best = None
        for w, h in self.config.image_grid_pinpoints:
            scale = min(w / width, h / height)
            used = min(int(width * scale) * int(height * scale), width * height)
            if best is None or (used, used - w * h) > best[0]:
                best = (used, used - w * h), w // tile, h // tile
        _, wide, tall = best
        side = math.isqrt(tiles.shape[1])
        rows = tiles.view(tall, wide, side, side, -1).transpose(1, 2).flatten(0, 1).flatten(1, 2)
        h, w = tall * side, wide * side
        if width / height > w / h:
            cut = (h - int(height * (w / width))) // 2
            rows = rows[cut : h - cut]
        else:
            cut = (w - int(width * (h / height))) // 2
            rows = rows[:, cut : w - cut]
        newline = self.model.image_newline.expand(len(rows), 1, -1)
        return torch.cat((rows, newline), dim=1).flatten(0, 1)

    def prepare_inputs_labels_for_multimodal(
        self,
        input_ids,
        positions,
        mask,
        past,
        labels,
        images,
        modalities=("image",),
        image_sizes=(),
    ):
        assert mask is None and all(m == "image" for m in modalities)
        left = iter(self.features(images, image_sizes))
        rows = []
        for ids in input_ids[: len(modalities)]:  # upstream loses rows without a modality
            parts, start = [], 0
            for at in [*(ids == IMAGE).nonzero()[:, 0].tolist(), len(ids)]:
                parts.append(self.embed(ids[start:at]))
                if at < len(ids):
                    parts.append(next(left))
                start = at + 1
            rows.append(torch.cat(parts)[: self.config.tokenizer_model_max_length])
        return None, None, None, None, torch.stack(rows), None


# -- LLaDA -----------------------------------------------------------------------------------------


class LLaDALlamaBlock(nn.Module):
    def __init__(self, width, heads):
        super().__init__()
        self.heads = heads
        self.attn_norm, self.ff_norm = Norm(width), Norm(width)
        self.q_proj, self.k_proj, self.v_proj, self.attn_out, self.up_proj, self.ff_out = (
            nn.Linear(width, width, bias=False) for _ in range(6)
        )

    def forward(self, x, attention_bias=None, layer_past=None, use_cache=False, block_mask=None):
        h = self.attn_norm(x)
        q, k, v = (
            p(h).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for p in (self.q_proj, self.k_proj, self.v_proj)
        )
        if layer_past is not None:
            k, v = (torch.cat((old, new), -2) for old, new in zip(layer_past, (k, v), strict=True))
        seen = k.shape[-2] - q.shape[-2]
        out = functional.scaled_dot_product_attention(turned(q, seen), turned(k), v)
        x = x + self.attn_out(out.transpose(1, 2).flatten(2))
        x = x + self.ff_out(self.up_proj(self.ff_norm(x)).tanh())
        return x, (k, v) if use_cache else None


class LlavaLladaModel(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.config = config
        width = config.d_model
        blocks = [LLaDALlamaBlock(width, 2) for _ in range(config.n_layers)]
        self.transformer = nn.ModuleDict(
            {
                "wte": nn.Embedding(VOCABULARY, width),
                "ln_f": Norm(width),
                "blocks": nn.ModuleList(blocks),
                "ff_out": nn.Linear(width, VOCABULARY, bias=False),
            }
        )
        build_sight(self, config, width)
        self.activation_checkpointing_strategy = None

    def set_activation_checkpointing(self, strategy):
        self.activation_checkpointing_strategy = strategy

    @property
    def device(self):
        return self.transformer.wte.weight.device

    def forward(self, input_ids, input_embeddings=None, past_key_values=None, use_cache=False):
        assert input_ids is None
        x, pairs = input_embeddings, []
        for i, block in enumerate(self.transformer.blocks):
            past = None if past_key_values is None else past_key_values[i]
            if self.activation_checkpointing_strategy == "whole_layer":  # hooks see no graph
                x, pair = checkpoint(block, x, None, past, use_cache, None, use_reentrant=True)
            else:
                x, pair = block(x, None, layer_past=past, use_cache=use_cache, block_mask=None)
            pairs.append(pair)
        logits = self.transformer.ff_out(self.transformer.ln_f(x))
        return SimpleNamespace(logits=logits, attn_key_values=pairs if use_cache else None)


def build_sight(inner, config, width):
    inner.vision_tower = Tower(8, config.tile)
    inner.mm_projector = nn.Linear(8, width)
    inner.image_newline = nn.Parameter(torch.randn(width))


class LlavaLladaForMaskedDiffusion(nn.Module, Joint):
    def __init__(self, config):
        super().__init__()
        self.config = config
        self.model = LlavaLladaModel(config)
        self.model.set_activation_checkpointing("whole_layer")

    def get_input_embeddings(self):
        return self.model.transformer.wte

    def embed(self, ids):
        return self.model.transformer.wte(ids)

    def forward(self, *_args, **_kwargs):
        raise AssertionError("training only: masks at random and doubles the batch")

    @torch.no_grad()
    def generate(
        self,
        inputs,
        images=None,
        image_sizes=None,
        modalities=("image",),
        max_new_tokens=128,
        block_length=128,
        temperature=0.0,
        remasking="low_confidence",
        mask_id=126336,
        verbose=False,
        prefix_lm=False,
        step_per_block=None,
        step_ratio=None,
        schedule=None,
        schedule_kwargs=None,
        draft_tokens=None,
        **_ignored,  # steps and do_sample among them
    ):
        front = self.prepare_inputs_labels_for_multimodal(
            inputs, None, None, None, None, images, modalities, image_sizes
        )[4]
        past = None
        if prefix_lm:
            past = self.model(None, input_embeddings=front, use_cache=True).attn_key_values
        start = 0 if prefix_lm else front.shape[1]
        x = torch.full((1, start + max_new_tokens), mask_id, device=self.device)
        x[:, :start] = 0
        if draft_tokens is not None:
            x[:, start : start + draft_tokens.shape[1]] = draft_tokens
        assert max_new_tokens % block_length == 0
        steps = min(step_per_block, block_length) if step_per_block else block_length
        steps = int(steps * step_ratio) if step_ratio else steps
        history = []
        for block in range(max_new_tokens // block_length):
            open_until = start + (block + 1) * block_length
            shift = (schedule_kwargs or {}).get("shift", 3)
            plan = commits(int((x[0, :open_until] == mask_id).sum()), steps, schedule, shift)
            for step in range(steps):
                masked = x == mask_id
                if not masked[:, :open_until].any():
                    continue
                embeds = self.embed(x)
                if not prefix_lm:
                    embeds[:, :start] = front
                logits = self.model(None, input_embeddings=embeds, past_key_values=past).logits
                best = logits.argmax(-1)
                if temperature:
                    wide = logits.double()
                    best = (wide.exp() / (-torch.rand_like(wide).log()) ** temperature).argmax(-1)
                probs = logits.double().softmax(-1)
                sure = {
                    "low_confidence": lambda: probs.gather(-1, best[..., None])[..., 0],  # noqa: B023
                    "random": lambda: torch.rand(best.shape, device=best.device),  # noqa: B023
                    "entrophy": lambda: (probs * (probs + 1e-10).log()).sum(-1),  # noqa: B023
                    "margin": lambda: -probs.topk(2).values.diff(dim=-1)[..., 0],  # noqa: B023
                }[remasking]()
                sure = sure.masked_fill(~masked, -math.inf)
                sure[:, open_until:] = -math.inf
                chosen = sure[0].topk(plan[step]).indices
                x[0, chosen] = torch.where(masked, best, x)[0, chosen]
                history.append(x.clone())
        return (x, history) if verbose else x


def commits(masked, steps, schedule, shift=3):
    """Tokens committed at every step; a schedule's are laid out backwards."""
    if schedule is None:
        return [masked // steps + (i < masked % steps) for i in range(steps)]
    steps = min(steps, masked)
    t = torch.linspace(0, 1, steps + 1)
    done = {
        "shift": shift * t / (1 + (shift - 1) * t),
        "cosine": 1 - (1 + (math.pi * t).cos()) / 2,
        "logit_normal": (1 + torch.erf((t / (1 - t)).log() / math.sqrt(2))) / 2,
        "linear": t,
    }[schedule]
    marks = [int(m) for m in done * masked]
    counts = [max(1, b - a) for a, b in itertools.pairwise(marks)]
    at = 0
    while sum(counts) > masked:
        if counts[at % steps] > 1:
            counts[at % steps] -= 1
        at += 1
    return counts[::-1]


# -- Dream -----------------------------------------------------------------------------------------


class PrefixCache:
    """Filled by a first run, only read by later ones."""

    def __init__(self):
        self.past_key_values = {}

    def update(self, k, v, layer):
        if layer not in self.past_key_values:
            self.past_key_values[layer] = (k, v)
            return k, v
        old = self.past_key_values[layer]
        return tuple(torch.cat((a, b), -2) for a, b in zip(old, (k, v), strict=True))

    def get_seq_length(self):
        return self.past_key_values[0][0].shape[-2] if self.past_key_values else 0


class DreamAttention(nn.Module):
    def __init__(self, width, heads, layer):
        super().__init__()
        self.heads, self.layer = heads, layer
        self.q_proj, self.k_proj, self.v_proj, self.o_proj = (
            nn.Linear(width, width) for _ in range(4)
        )

    def forward(self, h, past, start):
        q, k, v = (
            p(h).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for p in (self.q_proj, self.k_proj, self.v_proj)
        )
        q, k = turned(q, start), turned(k, start)
        if past is not None:
            k, v = past.update(k, v, self.layer)
        out = functional.scaled_dot_product_attention(q, k, v)
        return self.o_proj(out.transpose(1, 2).flatten(2))


class DreamDecoderLayer(nn.Module):
    def __init__(self, width, heads, layer):
        super().__init__()
        self.self_attn, self.mlp = DreamAttention(width, heads, layer), nn.Linear(width, width)
        self.input_layernorm, self.post_attention_layernorm = Norm(width), Norm(width)

    def forward(self, hidden_states, past_key_value=None, use_cache=False, start=0):
        normed = self.input_layernorm(hidden_states)
        h = hidden_states + self.self_attn(normed, past_key_value, start)
        h = h + self.mlp(self.post_attention_layernorm(h)).tanh()
        return (h, past_key_value) if use_cache else (h,)


class LlavaDreamModel(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.config = config
        width = config.hidden_size
        self.embed_tokens, self.norm = nn.Embedding(VOCABULARY, width), Norm(width)
        layers = [DreamDecoderLayer(width, 2, i) for i in range(config.num_hidden_layers)]
        self.layers = nn.ModuleList(layers)
        build_sight(self, config, width)

    def forward(self, inputs_embeds, past_key_values=None, use_cache=False):
        if use_cache and past_key_values is None:
            past_key_values = PrefixCache()
        start = 0 if past_key_values is None else past_key_values.get_seq_length()
        h = inputs_embeds
        for layer in self.layers:
            h = layer(h, past_key_value=past_key_values, use_cache=use_cache, start=start)[0]
        return self.norm(h), past_key_values


class LlavaDreamForMaskedDiffusion(nn.Module, Joint):
    def __init__(self, config):
        super().__init__()
        self.config = config
        self.model = LlavaDreamModel(config)
        self.lm_head = nn.Linear(config.hidden_size, VOCABULARY, bias=False)

    def get_input_embeddings(self):
        return self.model.embed_tokens

    def embed(self, ids):
        return self.model.embed_tokens(ids)

    def forward(self, *_args, **_kwargs):
        raise AssertionError("training only: masks at random and doubles the batch")

    def forward_dream(
        self, input_ids, mask, positions, past_key_values=None, inputs_embeds=None, use_cache=None
    ):
        assert input_ids is None and mask is None and positions is None
        hidden, past = self.model(inputs_embeds, past_key_values, bool(use_cache))
        return SimpleNamespace(logits=self.lm_head(hidden), past_key_values=past)

    @torch.no_grad()
    def generate(
        self,
        inputs,
        images=None,
        image_sizes=None,
        modalities=("image",),
        max_new_tokens=512,
        steps=512,
        temperature=0.2,
        top_p=0.95,
        top_k=None,
        alg="entropy",
        alg_temp=0.0,
        output_history=False,
        prefix_lm=False,
        schedule=None,
        schedule_kwargs=None,
        step_ratio=None,
        generation_logits_hook_func=None,
        generation_tokens_hook_func=None,
    ):
        front = self.prepare_inputs_labels_for_multimodal(
            inputs, None, None, None, None, images, modalities, image_sizes
        )[4]
        start, past = front.shape[1], None
        x = torch.full((1, start + max_new_tokens), MASK, device=self.device)
        x[:, :start] = 0
        if prefix_lm:
            run = self.forward_dream(None, None, None, inputs_embeds=front, use_cache=True)
            past, x = run.past_key_values, x[:, start:]
            x[:, 0] = run.logits[:, -1].argmax(-1)
        if generation_tokens_hook_func is not None:
            x = generation_tokens_hook_func(None, x, None)
        steps = min(steps, max_new_tokens)
        times = torch.linspace(1, 1e-3, steps + 1)
        if step_ratio is not None:
            steps = int(max_new_tokens * step_ratio)
        plan = None
        if schedule is not None:
            shift = (schedule_kwargs or {}).get("shift", 3)
            plan = commits(int((x == MASK).sum()), steps, schedule, shift)
        history = []
        for step in range(steps):
            masked = x == MASK
            embeds = self.embed(x)
            if not prefix_lm:
                embeds[:, :start] = front
            logits = self.forward_dream(
                None, None, None, inputs_embeds=embeds, past_key_values=past
            ).logits
            logits = torch.cat((logits[:, :1], logits[:, :-1]), dim=1)
            if generation_logits_hook_func is not None:
                logits = generation_logits_hook_func(step, x, logits)
            share = float(1 - times[step + 1] / times[step])
            last = step == steps - 1
            if alg == "origin":
                hit = torch.rand(int(masked.sum()), device=x.device) < (1 if last else share)
                where = masked[0].nonzero()[:, 0][hit]
                x[0, where] = drawn(logits[0, where], temperature, top_p, top_k, alg)[1]
            else:
                where = masked[0].nonzero()[:, 0]
                sure, token = drawn(logits[0, where], temperature, top_p, top_k, alg)
                left = len(where)
                count = plan[step] if plan else left if last else int(left * share)
                if count > 0:
                    if alg_temp:
                        best = torch.multinomial((sure / alg_temp).softmax(-1), count)
                    else:
                        best = sure.topk(count).indices
                    x[0, where[best]] = token[best]
            history.append(x.clone())
        return SimpleNamespace(sequences=x, history=history if output_history else None)


def drawn(logits, temperature, top_p, top_k, alg):
    """Confidence and token of every row, after the filters."""
    if temperature > 0:
        logits = logits / temperature
    low = torch.finfo(logits.dtype).min
    if top_p is not None and top_p < 1:
        ordered, order = logits.sort(descending=True)
        out = ordered.softmax(-1).cumsum(-1) > top_p
        out = torch.cat((torch.zeros_like(out[:, :1]), out[:, :-1]), dim=1)
        logits = logits.masked_fill(torch.zeros_like(out).scatter(-1, order, out), low)
    if top_k is not None:
        floor = logits.topk(min(top_k, logits.shape[-1])).values[:, -1:]
        logits = logits.masked_fill(logits < floor, low)
    probs = logits.softmax(-1)
    sure, token = probs.max(-1)
    if temperature > 0 and len(probs):
        token = torch.distributions.Categorical(probs=probs).sample()
        sure = probs.gather(-1, token[:, None])[:, 0]
    if alg == "topk_margin":
        top = probs.sort(-1, descending=True).values
        sure = top[:, 0] - top[:, 1]
    if alg == "entropy":
        sure = (probs * (probs + 1e-10).log()).sum(-1)
    return sure, token


# -- made ------------------------------------------------------------------------------------------


CLASSES = {"llada": LlavaLladaForMaskedDiffusion, "dream": LlavaDreamForMaskedDiffusion}


def config(variant="llada", tile=104, width=32, layers=4, **changes):
    pins = [(1, 2), (2, 1), (2, 2), (3, 1), (1, 3)]
    made = dict(
        model_type=f"llava_{variant}",
        d_model=width,
        hidden_size=width,
        n_layers=layers,
        num_hidden_layers=layers,
        mask_token_id=MASK,
        tile=tile,
        image_aspect_ratio="anyres",
        image_grid_pinpoints=[(w * tile, h * tile) for w, h in pins],
        mm_patch_merge_type="spatial_unpad",
        mm_spatial_pool_mode="bilinear",
        tokenizer_model_max_length=8192,
    )
    return SimpleNamespace(**{**made, **changes})


@copied
def model(variant="llada", seed=0, dtype=torch.float32, **changes):
    """Random weights, large enough that attention is far from uniform."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        made = CLASSES[variant](config(variant, **changes))
    with torch.no_grad():
        for name, weight in made.named_parameters():
            if "q_proj" in name or "k_proj" in name:
                weight.mul_(4)
            if "conv" in name:
                weight.mul_(3)
    return made.to(dtype).eval()


def processor(tile=104):
    return Tokenizer(), ImageProcessor(tile)
