"""A tiny MMaDA of our own writing, faithful to what was found out about the real one.

Same module paths, ids, return types, decoding schedule and traps: causal under an attention mask
with zeros, positions cached at the first call, hooks on ``model.model`` never fire. Random weights.
"""

import functools
import math
import os
from types import SimpleNamespace

import torch
from copying import copied
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerFast

from captum_dcam.adapters.common.text import LLADA, SpecialIds

#: small vocabularies, unless upstream's own code runs, which has its ids by number
REAL = "CAPTUM_DCAM_UPSTREAM_MMADA" in os.environ
IDS = LLADA if REAL else SpecialIds(191, 180, 181, 192, 193, 194)
MASK, MARKS = IDS.mask, (126089, 126084, 126085) if REAL else (189, 184, 185)
TEXT, BITS = (126464, 13) if REAL else (200, 6)
CODES = 2**BITS
WORDS = "what is this describe the picture image a red blue green circle square on left right of"
MARKERS = {
    "<|startoftext|>": IDS.bos,
    "<|endoftext|>": IDS.eos,
    "<|mdm_mask|>": MASK,
    "<|start_header_id|>": IDS.header,
    "<|end_header_id|>": IDS.header_end,
    "<|eot_id|>": IDS.turn_end,
}
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}<|start_header_id|>{{ m.role }}<|end_header_id|>\n"
    "{{ m.content | trim }}<|eot_id|>{% endfor %}"
    "{{ '<|start_header_id|>assistant<|end_header_id|>\n' }}"
)


#: Lumina-DiMOO's, in the order of ``packing.ROW_MARKS``
ROW_MARKS = (126349, 126084, 126350, 126354, 126355) if REAL else (182, 184, 183, 186, 187)
FIRST_CODE = 126356 if REAL else TEXT
TAGS = ("<system>", "</system>", "<user>", "</user>")


@functools.cache
def tokenizer(size=TEXT, template=TEMPLATE, tags=()):
    """Words with and without a leading blank; every other id is some piece of text."""
    words = [*WORDS.split(), "user", "assistant", "system", "\n", "."]
    table = {form: i for i, form in enumerate(f for w in words for f in (w, f" {w}"))}
    table["<unk>"] = len(table)
    names = {i: name for name, i in MARKERS.items()}
    names |= {size - 50 + i: tag for i, tag in enumerate(tags)}
    names |= dict(zip(ROW_MARKS[-2:], ("<answer>", "</answer>"), strict=True)) if tags else {}
    for i in range(len(table), size):
        table[names.get(i, f" w{i}")] = i
    made = Tokenizer(models.WordLevel(table, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.Split(Regex(r"\n| ?[^\s]+"), "isolated")
    made.decoder = decoders.Fuse()
    tags = (*tags, "<answer>", "</answer>") if tags else ()
    made.add_special_tokens([AddedToken(n, special=True) for n in (*MARKERS, *tags)])
    return PreTrainedTokenizerFast(
        tokenizer_object=made,
        bos_token="<|startoftext|>",
        eos_token="<|endoftext|>",
        pad_token="<|endoftext|>",
        chat_template=template,
    )


class MMadaConfig(PretrainedConfig):
    model_type = "mmada"
    use_cache = False

    def __init__(self, d_model=32, n_heads=4, n_layers=4, max_sequence_length=512, **kwargs):
        super().__init__(**kwargs)
        self.d_model, self.n_heads, self.n_layers = d_model, n_heads, n_layers
        self.max_sequence_length = max_sequence_length
        self.codebook_size, self.embedding_size = CODES, TEXT + CODES


class RotaryEmbedding(nn.Module):
    def __init__(self, width, cache):
        super().__init__()
        self.width, self.__cache = width, cache

    def forward(self, x):
        length = x.shape[-2]
        known = self.__cache.get("sin")
        if known is None or known.shape[0] < length:
            rates = 10000.0 ** (-torch.arange(0, self.width, 2, dtype=torch.float64) / self.width)
            angles = (torch.arange(length, dtype=torch.float64)[:, None] * rates).repeat(1, 2)
            self.__cache["sin"], self.__cache["cos"] = angles.sin(), angles.cos()
        sin, cos = (self.__cache[n][:length].to(x) for n in ("sin", "cos"))
        first, second = x.chunk(2, -1)
        return x * cos + torch.cat((-second, first), -1) * sin


class RMSNorm(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x):
        return self.weight * x * (x.pow(2).mean(-1, keepdim=True) + 1e-5).rsqrt()


class LLaDALlamaBlock(nn.Module):
    def __init__(self, config, cache):
        super().__init__()
        d = config.d_model
        self.heads = config.n_heads
        self.attn_out = nn.Linear(d, d, bias=False)
        self.ff_out = nn.Linear(2 * d, d, bias=False)
        self.rotary_emb = RotaryEmbedding(d // self.heads, cache)
        self.attn_norm, self.ff_norm = RMSNorm(d), RMSNorm(d)
        self.q_proj, self.k_proj, self.v_proj = (nn.Linear(d, d, bias=False) for _ in range(3))
        self.ff_proj, self.up_proj = (
            nn.Linear(d, 2 * d, bias=False),
            nn.Linear(d, 2 * d, bias=False),
        )

    def forward(self, x, attention_bias=None, layer_past=None, use_cache=False):
        assert layer_past is None and not use_cache
        normed = self.attn_norm(x)
        q, k, v = (
            part(normed).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for part in (self.q_proj, self.k_proj, self.v_proj)
        )
        mixed = nn.functional.scaled_dot_product_attention(
            self.rotary_emb(q), self.rotary_emb(k), v, attn_mask=attention_bias
        )
        x = x + self.attn_out(mixed.transpose(1, 2).flatten(2))
        inner = self.ff_norm(x)
        x = x + self.ff_out(nn.functional.silu(self.ff_proj(inner)) * self.up_proj(inner))
        return x, None


class LLaDAModel(nn.Module):
    def __init__(self, config):
        super().__init__()
        cache = {}
        self.transformer = nn.ModuleDict(
            {
                "wte": nn.Embedding(config.embedding_size, config.d_model),
                "ln_f": RMSNorm(config.d_model),
                "blocks": nn.ModuleList(
                    LLaDALlamaBlock(config, cache) for _ in range(config.n_layers)
                ),
                "ff_out": nn.Linear(config.d_model, config.embedding_size, bias=False),
            }
        )

    def forward(self, ids, embeds, attention_mask, attention_bias):
        x = self.transformer.wte(ids) if embeds is None else embeds
        length = x.shape[1]
        if attention_mask is not None and bool((attention_mask == 0).any()):
            attention_bias = torch.ones(
                length, length, device=x.device
            ).tril()  # the trap: causal from here on
            attention_bias = attention_bias.bool() & attention_mask.bool()[:, None, None]
        for block in self.transformer.blocks:
            x, _ = block(x, attention_bias=attention_bias)
        return self.transformer.ff_out(self.transformer.ln_f(x))


class MMadaModelLM(PreTrainedModel):
    config_class = MMadaConfig
    base_model_prefix = "model"

    def __init__(self, config):
        super().__init__(config)
        self.model = LLaDAModel(config)
        self.post_init()

    def _init_weights(self, module):
        """Random weights are drawn in :func:`model`."""

    def tie_weights(self, *_args, **_kwargs):
        """Nothing is tied, as upstream's checkpoints say."""

    def get_input_embeddings(self):
        return self.model.transformer.wte

    def get_output_embeddings(self):
        return self.model.transformer.ff_out

    def forward(
        self,
        input_ids=None,
        inputs_embeds=None,
        attention_mask=None,
        attention_bias=None,
        use_cache=None,
        return_dict=None,
    ):
        use_cache = self.config.use_cache if use_cache is None else use_cache
        return SimpleNamespace(
            logits=self.model.forward(input_ids, inputs_embeds, attention_mask, attention_bias)
        )

    @torch.no_grad()
    def mmu_generate(
        self,
        idx=None,
        input_embeddings=None,
        max_new_tokens=128,
        steps=128,
        block_length=128,
        temperature=0.0,
        top_k=None,
        eot_token=None,
        cfg_scale=0.0,
        remasking="low_confidence",
        mask_id=MASK,
        attention_mask=None,
    ):
        batch, prompt = idx.shape
        x = torch.cat((idx, idx.new_full((batch, max_new_tokens), mask_id)), dim=1)
        assert max_new_tokens % block_length == 0
        blocks = max_new_tokens // block_length
        assert steps % blocks == 0
        each = steps // blocks
        for block in range(blocks):
            end = prompt + (block + 1) * block_length
            begin = end - block_length
            todo = [int((row[begin:end] == mask_id).sum()) for row in x]
            for step in range(each):
                logits = self._scores(x, prompt, cfg_scale, mask_id)[:, prompt:]
                noisy = logits
                if temperature > 0:
                    noise = torch.rand_like(logits, dtype=torch.float64)
                    noisy = logits.double().exp() / (-noise.log()) ** temperature
                best = noisy.argmax(-1)
                if remasking == "random":
                    sure = torch.rand(best.shape, device=best.device)
                else:
                    sure = logits.double().softmax(-1).gather(-1, best[..., None])[..., 0]
                for row in range(batch):
                    count = todo[row] // each + (step < todo[row] % each)
                    open_ = [p for p in range(end - prompt) if x[row, prompt + p] == mask_id]
                    open_.sort(key=lambda p, r=row, s=sure: -float(s[r, p]))
                    for p in open_[:count]:
                        x[row, prompt + p] = best[row, p]
        return x

    def _scores(self, x, prompt, cfg_scale, mask_id):
        if cfg_scale <= 0:
            return self(x).logits
        blind = x.clone()
        blind[:, :prompt] = mask_id
        seeing, unseeing = self(torch.cat([x, blind])).logits.chunk(2)
        return unseeing + (cfg_scale + 1) * (seeing - unseeing)


class LLaDAModelLM(MMadaModelLM):
    """What Lumina-DiMOO calls the language model."""


class LLaDAForMultiModalGeneration(LLaDAModelLM):
    """Lumina-DiMOO's: takes lists of ids, and gives attention a bias of ones."""

    def forward(self, input_ids=None, labels=None, infer=False, **_ignored):
        ids = torch.tensor(input_ids.tolist() if infer else input_ids)
        bias = torch.ones(len(ids), 1, ids.shape[1], ids.shape[1], dtype=torch.bool)
        return LLaDAModelLM.forward(self, input_ids=ids, attention_bias=bias)


class VQModel(nn.Module):
    """Of Lumina-DiMOO: what diffusers' returns of pixels."""

    def __init__(self):
        super().__init__()
        self.encoder = nn.Conv2d(3, BITS, 16, stride=16)
        self.config = SimpleNamespace(num_vq_embeddings=CODES, block_out_channels=[8] * 5)

    def encode(self, x):
        return SimpleNamespace(latents=self.encoder(x - 0.5))

    def quantize(self, latents):
        bits = (latents > 0) * 2 ** torch.arange(BITS, device=latents.device)[:, None, None]
        return latents, None, (None, None, bits.sum(1).flatten())


class MAGVITv2(nn.Module):
    """Bits of a code: signs of random projections of a 16 × 16 patch."""

    def __init__(self):
        super().__init__()
        self.encoder = nn.Conv2d(3, BITS, 16, stride=16)

    def get_code(self, pixel_values):
        bits = self.encoder(pixel_values).flatten(2) > 0
        return (bits * 2 ** torch.arange(BITS, device=bits.device)[:, None]).sum(1)


@copied
def model(seed=0, dtype=torch.float32, rows=False, **changes):
    """Random weights; keys are enlarged so that attention is far from uniform."""
    with torch.random.fork_rng(devices=[]):
        made = (LLaDAForMultiModalGeneration if rows else MMadaModelLM)(MMadaConfig(**changes))
        torch.manual_seed(seed)  # how much was drawn before depends on transformers
        for name, p in made.named_parameters():
            if p.ndim > 1:
                nn.init.normal_(p, std=1.0 if "wte" in name else 1 / math.sqrt(p.shape[-1]))
            if "k_proj" in name:
                p.data.mul_(3)
    return made.to(dtype).eval()


@copied
def vq(seed=0, dtype=torch.float32, rows=False):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        made = VQModel() if rows else MAGVITv2()
    return made.to(dtype).eval()


def understood(
    model, ids, code_start, gen_length=8, steps=4, block_length=4, temperature=0.0, cfg_scale=0.0,
    mask_id=MASK, **_options,
):  # fmt: skip
    """Lumina-DiMOO's loop, on the sequence with its canvas; nothing stops it."""
    x, given = ids.clone(), ids != mask_id
    each = steps * block_length // gen_length
    for end in range(code_start + block_length, code_start + gen_length + 1, block_length):
        todo = int((x[0, end - block_length : end] == mask_id).sum())
        for step in range(each):
            if cfg_scale > 0:
                seeing, blind = model(
                    torch.cat((x, x.masked_fill(given, mask_id))), infer=True
                ).logits.chunk(2)
                logits = blind + (cfg_scale + 1) * (seeing - blind)
            else:
                logits = model(x, infer=True).logits
            best = logits.argmax(-1)[0]
            sure = logits[0].double().softmax(-1)
            open_ = [p for p in range(end) if x[0, p] == mask_id]
            open_.sort(key=lambda p, s=sure, b=best: -float(s[p, b[p]]))
            for p in open_[: todo // each + (step < todo % each)]:
                x[0, p] = best[p]
    return x
