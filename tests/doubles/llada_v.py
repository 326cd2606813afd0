"""A tiny stand-in for LLaDA-V: same module paths, class names, packing, decoding and traps.

Of our own writing, after the family's behaviour. Tiles are 48 pixels with patches of 14, so
that a tile has 3x3 tokens and 6 pixels that no patch sees, as 384 and 27 have.
"""

import math
import os
from types import SimpleNamespace

import numpy as np
import torch
from copying import copied
from PIL import Image
from torch import nn
from torch.nn import functional
from transformers import BatchEncoding

from captum_dcam.adapters.common.text import LLADA, SpecialIds

#: a small vocabulary, unless upstream's own code runs, which has its ids by number
REAL = "CAPTUM_DCAM_UPSTREAM_LLADA_V" in os.environ
IDS = LLADA if REAL else SpecialIds(91, 80, 81, 92, 93, 94)
MASK, BOS, EOS, HEADER, HEADER_END, TURN_END = IDS
VOCABULARY = 126464 if REAL else 120
IMAGE = -200
TILE, PATCH = 48, 14
NEWLINE = 98
WORDS = ["<unk>", *"a an the red blue dog cat on of mat what is this describe image . ?".split()]
MARKERS = {"<|bos|>": BOS, "<|eos|>": EOS, "<|head|>": HEADER, "<|/head|>": HEADER_END}
MARKERS |= {"<|eot_id|>": TURN_END, "<|mask|>": MASK}


class Tokenizer:
    """Words of a short list; every other id reads as ``tok<id>``."""

    bos_token_id, eos_token_id = BOS, EOS
    all_special_ids = sorted(MARKERS.values())

    def encode(self, text, add_special_tokens=True):
        for marker in MARKERS:
            text = text.replace(marker, f" {marker} ")
        out = []
        for word in text.replace("\n", " \n ").split(" "):
            if word == "\n":
                out.append(NEWLINE)
            elif word in MARKERS:
                out.append(MARKERS[word])
            elif word[:3] == "tok" and word[3:].isdigit():
                out.append(int(word[3:]))
            elif word:
                out.append(WORDS.index(word) if word in WORDS else 0)
        return out

    def __call__(self, text, **_options):
        return BatchEncoding({"input_ids": self.encode(text)})

    def decode(self, ids, **_options):
        markers = {v: k for k, v in MARKERS.items()}
        out = ""
        for one in ids:
            i = int(one)
            if i in markers:
                out += markers[i]
            elif i == NEWLINE:
                out += "\n"
            else:
                out += " " + (WORDS[i] if i < len(WORDS) else f"tok{i}")
        return out

    def apply_chat_template(self, messages, tokenize=False, add_generation_prompt=False):
        assert not tokenize
        text = "<|bos|>"
        for message in messages:
            text += f"<|head|>{message['role']}<|/head|>\n{message['content']}<|eot_id|>"
        return text + ("<|head|>assistant<|/head|>\n" if add_generation_prompt else "")


class ImageProcessor:
    """Pixels from 0..255 to -1..1, resized to a tile."""

    image_mean = image_std = (0.5, 0.5, 0.5)

    def __init__(self, tile=TILE):
        self.size = (tile, tile)
        self.crop_size = {"height": tile, "width": tile}

    def preprocess(self, images, return_tensors="pt"):
        pictures = images if isinstance(images, list) else [images]
        out = []
        for picture in pictures:
            small = picture.convert("RGB").resize(self.size, Image.Resampling.BICUBIC)
            out.append(torch.from_numpy(np.array(small, dtype=np.float32)) / 127.5 - 1)
        return {"pixel_values": torch.stack(out).permute(0, 3, 1, 2)}


class Tower(nn.Module):
    """Patches, mixed a little; a side of ``tile // patch`` tokens."""

    def __init__(self, width, tile=TILE, patch=PATCH):
        super().__init__()
        self.patch = nn.Conv2d(3, width, patch, stride=patch)
        self.mlp = nn.Linear(width, width)
        self.image_size, self.num_patches_per_side = tile, tile // patch
        self.config = SimpleNamespace(image_size=tile, patch_size=patch, hidden_size=width)
        self.image_processor = ImageProcessor(tile)
        self.is_loaded = True

    def forward(self, images):
        tokens = self.patch(images).flatten(2).transpose(1, 2)
        return tokens + torch.tanh(self.mlp(tokens))


def rotate(x, positions):
    """Rotary embedding of (B, heads, L, d) at positions (L,)."""
    half = x.shape[-1] // 2
    speed = 10000.0 ** (-torch.arange(half, dtype=x.dtype, device=x.device) / half)
    angle = positions[:, None].to(x.dtype) * speed
    cos, sin = angle.cos(), angle.sin()
    a, b = x[..., :half], x[..., half:]
    return torch.cat((a * cos - b * sin, b * cos + a * sin), -1)


class Attention(nn.Module):
    def __init__(self, width, heads):
        super().__init__()
        self.heads = heads
        self.q_proj, self.k_proj = nn.Linear(width, width, False), nn.Linear(width, width, False)
        self.v_proj, self.o_proj = nn.Linear(width, width, False), nn.Linear(width, width, False)

    def split(self, x):
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)

    def forward(self, hidden_states, positions, fast_dllm_cache=None):
        del fast_dllm_cache
        q, k, v = (self.split(p(hidden_states)) for p in (self.q_proj, self.k_proj, self.v_proj))
        return self.attend(rotate(q, positions), rotate(k, positions), v)

    def attend(self, q, k, v):
        out = functional.scaled_dot_product_attention(q, k, v)
        return self.o_proj(out.transpose(1, 2).flatten(2))


class Norm(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x):
        return self.weight * x * (x.pow(2).mean(-1, keepdim=True) + 1e-6).rsqrt()


class MLP(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, x):
        return self.down(functional.silu(self.up(x)))


class LLaDADecoderLayer(nn.Module):
    def __init__(self, width, heads):
        super().__init__()
        self.self_attn, self.mlp = Attention(width, heads), MLP(width)
        self.input_layernorm, self.post_attention_layernorm = Norm(width), Norm(width)

    def forward(self, hidden_states, positions, fast_dllm_cache=None):
        options = {} if fast_dllm_cache is None else {"fast_dllm_cache": fast_dllm_cache}
        x = hidden_states
        x = x + self.self_attn(self.input_layernorm(x), positions, **options)
        return (x + self.mlp(self.post_attention_layernorm(x)),)


class LlavaLLaDAModel(nn.Module):
    def __init__(self, config):
        super().__init__()
        width = config.hidden_size
        self.embed_tokens = nn.Embedding(VOCABULARY, width)
        self.layers = nn.ModuleList(
            LLaDADecoderLayer(width, config.num_attention_heads)
            for _ in range(config.num_hidden_layers)
        )
        self.norm = Norm(width)
        self.vision_tower = Tower(width, config.tile, config.patch)
        self.mm_projector = nn.Linear(width, width)
        self.image_newline = nn.Parameter(torch.randn(width))

    def forward(self, input_ids=None, inputs_embeds=None, fast_dllm_cache=None):
        x = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        options = {} if fast_dllm_cache is None else {"fast_dllm_cache": fast_dllm_cache}
        positions = torch.arange(x.shape[1], device=x.device)
        for layer in self.layers:
            x = layer(x, positions, **options)[0]
        return (self.norm(x),)


def best_canvas(size, canvases):
    """The canvas that keeps most of the picture's pixels, then wastes least."""

    def quality(canvas):
        scale = min(canvas[0] / size[0], canvas[1] / size[1])
        kept = min(int(size[0] * scale) * int(size[1] * scale), size[0] * size[1])
        return kept, kept - canvas[0] * canvas[1]

    return max(canvases, key=quality)


class LlavaLLaDAModelLM(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.config = config
        self.model = LlavaLLaDAModel(config)
        self.lm_head = nn.Linear(config.hidden_size, VOCABULARY, bias=False)

    def get_model(self):
        return self.model

    def get_vision_tower(self):
        return self.model.vision_tower

    def get_input_embeddings(self):
        return self.model.embed_tokens

    @property
    def device(self):
        return self.lm_head.weight.device

    def forward(self, *_args, **_kwargs):
        raise RuntimeError("forward is for training: it masks at random")

    # -- packing -----------------------------------------------------------------------------

    def pack(self, tiles, size):
        """Features (N, D) of one picture's tiles (1 + gw*gh, 3, S, S); size is (W, H)."""
        side, tile = self.model.vision_tower.num_patches_per_side, self.config.tile
        features = self.model.mm_projector(self.model.vision_tower(tiles))
        newline = self.model.image_newline
        if len(tiles) == 1:
            return torch.cat((features[0], newline[None]))
        bw, bh = best_canvas(size, self.config.image_grid_pinpoints)
        gw, gh = bw // tile, bh // tile
        rows = [torch.cat([f.view(side, side, -1) for f in features[1:][r * gw : (r + 1) * gw]], 1)
                for r in range(gh)]  # fmt: skip
        mosaic = torch.cat(rows)
        height, width = mosaic.shape[:2]
        if size[0] / size[1] > width / height:
            cut = (height - int(size[1] * (width / size[0]))) // 2
            mosaic = mosaic[cut : height - cut]
        else:
            cut = (width - int(size[0] * (height / size[1]))) // 2
            mosaic = mosaic[:, cut : width - cut]
        height, width = mosaic.shape[:2]
        times = math.sqrt(height * width / (4 * side**2))
        if times > 1.1:
            small = (int(height // times), int(width // times))
            planes = mosaic.permute(2, 0, 1)[None]
            mosaic = functional.interpolate(planes, small, mode="bilinear")[0].permute(1, 2, 0)
        ends = newline.expand(mosaic.shape[0], 1, -1)
        return torch.cat((features[0], torch.cat((mosaic, ends), 1).flatten(0, 1)))

    def prepare_inputs_labels_for_multimodal(
        self, input_ids, position_ids, attention_mask, past, labels, images, modalities=None,
        image_sizes=None,
    ):  # fmt: skip
        tiles = [i if i.ndim == 4 else i[None] for i in images]
        packed = iter([self.pack(t, s) for t, s in zip(tiles, image_sizes, strict=True)])
        out = []
        for ids in input_ids[: len(modalities or ["image"])]:
            parts, begin = [], 0
            for at in [*(ids == IMAGE).nonzero()[:, 0].tolist(), len(ids)]:
                parts.append(self.model.embed_tokens(ids[begin:at]))
                parts += [next(packed)] if at < len(ids) else []
                begin = at + 1
            out.append(torch.cat(parts)[: getattr(self.config, "tokenizer_model_max_length", None)])
        return None, None, None, past, torch.stack(out), None

    # -- decoding ----------------------------------------------------------------------------

    @torch.no_grad()
    def generate(self, inputs, images=None, image_sizes=None, modalities=("image",), **kwargs):
        embeds = self.prepare_inputs_labels_for_multimodal(
            inputs, None, None, None, None, images, list(modalities), image_sizes=image_sizes
        )[4]
        return self.generate_with_embeds(embeds, **kwargs)

    @torch.no_grad()
    def generate_with_embeds(
        self, inputs_embeds, steps=128, gen_length=128, block_length=128, temperature=0.0,
        cfg_scale=0.0, remasking="low_confidence", mask_id=MASK, tokenizer=None,
        stopping_criteria=None, generation_suffix=None, revised=None, **ignored,
    ):  # fmt: skip
        return decode(
            self, inputs_embeds, lambda x, start, begin: self.model(inputs_embeds=x)[0], steps,
            gen_length, block_length, temperature, cfg_scale, remasking, mask_id, tokenizer,
            stopping_criteria, generation_suffix, revised=revised,
        )  # fmt: skip


class ReDiffModelLM(LlavaLLaDAModelLM):
    """The same with ReDiff's decoder (whose class has LLaDA-V's name), which edits."""

    @torch.no_grad()
    def generate(
        self, inputs, images=None, image_sizes=None, modalities=("image",), revise=False,
        revise_topk=None, revise_start=1.0, fake_ans=None, **kwargs,
    ):  # fmt: skip
        assert fake_ans is None
        edits = (revise_start, revise_topk) if revise else None
        return super().generate(inputs, images, image_sizes, modalities, revised=edits, **kwargs)


def decode(
    model, embeds, run, steps, gen_length, block_length, temperature, cfg_scale, remasking, mask_id,
    tokenizer, stops, suffix, refresh=None, revised=None,
):  # fmt: skip
    """The schedule; ``run(x, start, begin)``: hidden states of x, which starts at ``start``;
    ``revised``: from which share of a block's steps on ReDiff edits, and what share of tokens."""
    words = model.model.embed_tokens
    tail = [] if suffix is None else tokenizer.encode(suffix, add_special_tokens=False)
    front, total = embeds.shape[1], embeds.shape[1] + gen_length + len(tail)
    ids = torch.full((1, total), mask_id, device=embeds.device)
    if tail:
        ids[0, -len(tail) :] = torch.tensor(tail)
    x = words(torch.tensor([mask_id], device=embeds.device)).repeat(1, total, 1)
    if tail:
        x[0, -len(tail) :] = words(ids[0, -len(tail) :])
    x[:, :front] = embeds
    assert gen_length % block_length == 0 and steps % (gen_length // block_length) == 0
    per_block = steps // (gen_length // block_length)
    wanted = [tokenizer.encode(s, add_special_tokens=False) for s in stops or ()]
    stop = None
    for begin in range(front, front + gen_length, block_length):
        end = begin + block_length
        if stop is not None and stop <= begin:
            break
        count = int((ids[0, begin:end] == mask_id).sum())
        for step in range(per_block):
            open_ = ids == mask_id
            open_[:, :front] = False
            if stop is not None and not open_[0, front:stop].any():
                break
            if not open_[0, begin:end].any():
                break
            again = refresh is None or step % refresh == 0
            start = 0 if again else begin
            low = max(start, front)  # nothing in front of the canvas can be chosen
            if cfg_scale > 0:
                blind = x.clone()
                blind[:, :front] = words(torch.tensor(mask_id, device=x.device))
                both = model.lm_head(run(torch.cat((x, blind)), 0, begin))[:, low:].float()
                logits = both[1:] + (cfg_scale + 1) * (both[:1] - both[1:])
            else:
                part = x if start == 0 else x[:, start:]
                logits = model.lm_head(run(part, start, begin))[:, low - start :].float()
            for one in (EOS, BOS, HEADER, HEADER_END):
                ruled = open_[:, low:] if revised is None else torch.ones_like(open_[:, low:])
                logits[:, :, one] = logits[:, :, one].masked_fill(ruled, -math.inf)
            noisy = logits
            if temperature > 0:
                noise = torch.rand_like(logits, dtype=torch.float64)
                noisy = logits.double().exp() / (-noise.log()) ** temperature
            chosen = noisy.argmax(-1)
            if remasking == "random":
                sure = torch.rand(chosen.shape, device=x.device)
            else:
                sure = logits.double().softmax(-1).gather(-1, chosen[..., None])[..., 0]
            sure[:, (end if stop is None else stop) - low :] = -math.inf
            odds, sure = sure, sure.masked_fill(~open_[:, low:], -math.inf)
            k = count // per_block + (step < count % per_block)
            take = torch.zeros_like(ids, dtype=torch.bool)
            take[0, low + sure[0].topk(k).indices] = True
            take &= open_
            found = ids.clone()
            found[:, low:] = chosen
            ids = torch.where(take, found, ids)
            # what stands is untouched; the sequence is changed in place, as the family does it
            x[take] = words(found)[take]
            if revised is not None and step >= per_block - math.ceil(per_block * revised[0]):
                edit = ~open_
                edit[:, :begin] = edit[:, end:] = False
                if revised[1]:
                    every = torch.full(ids.shape, -math.inf, dtype=odds.dtype)
                    every[:, low:] = odds
                    every = every.masked_fill(~edit, -math.inf)
                    surest = every[0].topk(int(edit.sum() * revised[1])).indices
                    edit = torch.zeros_like(edit)
                    edit[0, surest] = True
                ids = torch.where(edit, found, ids)
                x[edit] = words(found)[edit]
            stop = first_stop(ids[0, front : front + gen_length], wanted, front, stop)
    last = front + gen_length if stop is None else stop
    return torch.cat((ids[:, front:last], ids[:, total - len(tail) :]), 1)


def first_stop(answer, wanted, front, stop):
    """Where the first listed stop sequence that occurs begins, if that is earlier."""
    text = answer.tolist()
    for sequence in wanted:
        at = [i for i in range(len(text)) if text[i : i + len(sequence)] == sequence]
        if at and (stop is None or front + at[0] < stop):
            stop = front + at[0]
        if stop is not None:
            break
    return stop


def config(layers=4, width=16, tile=TILE, patch=PATCH, **changes):
    grid = [(tile * w, tile * h) for w in range(1, 7) for h in range(1, 7)]
    return SimpleNamespace(
        **{
            "model_type": "llava_llada",
            "hidden_size": width,
            "num_hidden_layers": layers,
            "num_attention_heads": 2,
            "vocab_size": VOCABULARY,
            "image_aspect_ratio": "anyres_max_4",
            "mm_patch_merge_type": "spatial_unpad",
            "image_grid_pinpoints": grid,
            "max_position_embeddings": 8192,
            "tokenizer_model_max_length": 8192,
            "tile": tile,
            "patch": patch,
            **changes,
        }
    )


@copied
def model(seed=0, dtype=torch.float32, edits=False, **changes):
    """Random weights, large enough that attention is far from uniform."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        made = (ReDiffModelLM if edits else LlavaLLaDAModelLM)(config(**changes))
        with torch.no_grad():
            for layer in made.model.layers:
                for part in (layer.self_attn.q_proj, layer.self_attn.k_proj):
                    part.weight.mul_(3)
            made.lm_head.weight.mul_(4)
    return made.to(dtype).eval()


def processor(tile=TILE):
    return Tokenizer(), ImageProcessor(tile)
