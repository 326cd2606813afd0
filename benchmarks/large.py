r"""Time and memory of explaining a model of 8 billion parameters: ``python benchmarks/large.py``.

The model is shaped as LaViDa-LLaDA-8B behind SigLIP-so400m and has random weights: what an
explanation costs depends on shapes, not on what was learned. It runs behind the family's adapter.
Packing and decoding are those of the family's double in ``tests/doubles/lavida.py``; the blocks,
the vision tower and the projector are here.

Compared in one run: the model's own generation with nothing of this library around it, generation
as the library records it, and one word and 32 words explained afterwards.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Annotated, Any

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # before torch is imported: see docs/COST.md

import torch
import typer
from cost import peak_bytes, seconds
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional
from transformers import SiglipVisionConfig, SiglipVisionModel

from captum_dcam import DenoisingForward, explain_generation
from captum_dcam.adapters.lavida import LavidaAdapter
from captum_dcam.data.scenes import make_scene
from captum_dcam.evaluation.plan import DTYPES
from captum_dcam.model.words import repeated_function_words, words_of

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tests"))

from doubles import lavida as double  # noqa: E402

PROMPT = "Describe the image."
COLUMNS = ("cache", "what", "seconds", "times generation", "peak GiB")
GIB = 2**30
#: words that the ids of a random model are read as: a third of them function words
WORDS = (
    "a the of and on in with is to at man woman dog street table red small people white sky car "
    "building sitting standing large black horse field water boat"
).split()


@dataclass(frozen=True)
class Shape:
    """Width, blocks, heads and MLP width of the language model; the same of the vision tower."""

    width: int
    blocks: int
    heads: int
    mlp: int
    vocabulary: int = 126464
    sight: tuple[int, int, int, int] = (1152, 26, 16, 4304)  # SigLIP-so400m without its last block


SHAPES = {
    "tiny": Shape(64, 4, 4, 128, 512, (32, 2, 2, 64)),
    "1b": Shape(2048, 16, 16, 6144),
    "3b": Shape(3072, 24, 24, 8192),
    "8b": Shape(4096, 32, 32, 12288),
}


class Block(nn.Module):
    """A block of LLaDA's shape: attention to everything, SwiGLU, no biases."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        d, m = shape.width, shape.mlp
        self.heads = shape.heads
        self.attn_norm, self.ff_norm = nn.RMSNorm(d), nn.RMSNorm(d)
        self.q_proj, self.k_proj, self.v_proj, self.attn_out = (
            nn.Linear(d, d, bias=False) for _ in range(4)
        )
        self.ff_proj, self.up_proj = nn.Linear(d, m, bias=False), nn.Linear(d, m, bias=False)
        self.ff_out = nn.Linear(m, d, bias=False)

    def forward(
        self,
        x: Tensor,
        attention_bias: Tensor | None = None,
        layer_past: tuple[Tensor, Tensor] | None = None,
        use_cache: bool = False,
        block_mask: Any = None,
    ) -> tuple[Tensor, tuple[Tensor, Tensor] | None]:
        h = self.attn_norm(x)
        q, k, v = (
            part(h).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for part in (self.q_proj, self.k_proj, self.v_proj)
        )
        if layer_past is not None:
            k, v = (torch.cat(pair, dim=2) for pair in zip(layer_past, (k, v), strict=True))
        out = functional.scaled_dot_product_attention(rotated(q, k.shape[2]), rotated(k), v)
        x = x + self.attn_out(out.transpose(1, 2).flatten(2))
        h = self.ff_norm(x)
        x = x + self.ff_out(functional.silu(self.ff_proj(h)) * self.up_proj(h))
        return x, (k, v) if use_cache else None


def rotated(x: Tensor, length: int | None = None) -> Tensor:
    """Rotary embedding of (B, heads, L, d), the last L of ``length`` positions."""
    count, half = x.shape[2], x.shape[3] // 2
    end = count if length is None else length
    at = torch.arange(end - count, end, device=x.device)[:, None]
    angle = at * 500000.0 ** (-torch.arange(half, device=x.device) / half)
    cos, sin = angle.cos().to(x.dtype), angle.sin().to(x.dtype)
    a, b = x.chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, a * sin + b * cos), dim=-1)


class Sight(nn.Module):
    """SigLIP of transformers, as upstream wraps it: patch states of the last block it has."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        width, blocks, heads, mlp = shape.sight
        config = SiglipVisionConfig(
            hidden_size=width,
            num_hidden_layers=blocks,
            num_attention_heads=heads,
            intermediate_size=mlp,
            image_size=384,
            patch_size=14,
            vision_use_head=False,
        )
        self.inner = SiglipVisionModel(config)
        self.image_size, self.num_patches_per_side = 384, 27
        self.config = SimpleNamespace(image_size=384, patch_size=14)
        self.image_processor, self.is_loaded = double.ImageProcessor(384), True

    def forward(self, images: Tensor) -> Tensor:
        return self.inner(images).last_hidden_state


class Tokenizer(double.Tokenizer):
    """Ids of the answer read as English words."""

    def decode(self, ids: Any, **options: Any) -> str:
        known = set(double.MARKERS.values())
        own = [super(Tokenizer, self).decode([i]) if int(i) in known else
               " " + WORDS[int(i) % len(WORDS)] for i in ids]  # fmt: skip
        return "".join(own)


@contextmanager
def made_on(device: torch.device, dtype: torch.dtype, seed: int) -> Iterator[None]:
    """Modules are made on the device, in the type, with weights of the seed."""
    before = torch.get_default_dtype()
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices), torch.device(device):
        torch.manual_seed(seed)
        torch.set_default_dtype(dtype)
        try:
            yield
        finally:
            torch.set_default_dtype(before)


def build(shape: Shape, device: str, dtype: torch.dtype, cache: str, seed: int) -> LavidaAdapter:
    """The model behind the family's adapter."""
    with made_on(torch.device(device), dtype, seed):
        model = double.LlavaLladaForMaskedDiffusion(
            double.config(tile=384, width=shape.width, layers=0)
        )
        inner, (seen, *_) = model.model, shape.sight
        inner.transformer["blocks"] = nn.ModuleList(Block(shape) for _ in range(shape.blocks))
        inner.transformer["wte"] = nn.Embedding(shape.vocabulary, shape.width)
        inner.transformer["ff_out"] = nn.Linear(shape.width, shape.vocabulary, bias=False)
        inner.vision_tower = Sight(shape)
        inner.mm_projector = nn.Sequential(
            nn.Linear(seen, shape.width), nn.GELU(), nn.Linear(shape.width, shape.width)
        )
    return LavidaAdapter(model.eval(), (Tokenizer(), double.ImageProcessor(384)), cache)


def measure(
    adapter: LavidaAdapter,
    picture: Image.Image,
    layer: int | None,
    tokens: int,
    steps: int,
    words: int,
    repeats: int,
) -> list[dict[str, Any]]:
    """Seconds and peak bytes of generating and explaining, with one cache."""
    request = adapter.prepare([[picture]], [PROMPT])
    forward = DenoisingForward(adapter, layer)
    # greedy, a random model writes one word over and over
    settings = {"gen_length": tokens, "steps": steps, "temperature": 1.0}
    forward.generate(request, generator=torch.Generator().manual_seed(0), **settings)
    every = words_of(adapter, forward.trajectory.tokens[0].tolist())
    repeated = repeated_function_words(every)
    one, many = every[len(every) // 2 :][:1], every[:words]

    def plain() -> None:
        views = adapter._packing.arguments(request.pixels, request.extras[1])
        adapter.model.generate(
            request.extras[0],
            **views,
            max_new_tokens=tokens,
            block_length=tokens,
            step_per_block=steps,
            temperature=1.0,
            mask_id=adapter.mask_id,
            prefix_lm=adapter.cache == "prefix",
        )

    def recorded() -> None:
        forward.generate(request, generator=torch.Generator().manual_seed(0), **settings)

    work: dict[str, Callable[[], Any]] = {
        "generation alone": plain,
        "generation, recorded": recorded,
        "one word, raw map": lambda: explain_generation(forward, one, refinements=[]),
        "one word": lambda: explain_generation(forward, one),
        f"{len(many)} words": lambda: explain_generation(forward, many),
    }
    place = request.layout
    facts = {
        "prefix tokens": place.prefix_length,
        "image tokens": sum(g.positions.numel() for g in place.grids),
        "answer words": len(every),
        "repeated function words": len(repeated),
        "block": forward.layer,
    }
    rows: list[dict[str, Any]] = []
    for name, call in work.items():
        took = seconds(call, repeats)
        ratio = took / rows[0]["seconds"] if rows else 1.0
        row = (adapter.cache, name, took, ratio, peak_bytes(call) / GIB)
        rows.append(dict(zip(COLUMNS, row, strict=True)) | facts)
    return rows


def machine(device: str) -> str:
    """What ran it, in words."""
    if device.startswith("cuda"):
        return f"{torch.cuda.get_device_name(device)}, CUDA {torch.version.cuda}"
    return f"CPU, {torch.get_num_threads()} threads"


def markdown(report: dict[str, Any]) -> str:
    """The table of docs/COST.md."""
    lines = ["| " + " | ".join(COLUMNS) + " |", "|" + "---|" * len(COLUMNS)]
    for row in report["rows"]:
        cells = [f"{row[n]:.2f}" if isinstance(row[n], float) else str(row[n]) for n in COLUMNS]
        lines.append("| " + " | ".join(cells) + " |")
    settings = ", ".join(f"{k} {v}" for k, v in report.items() if k != "rows")
    facts = [f"{k} {v}" for k, v in report["rows"][0].items() if k not in COLUMNS]
    return "\n".join([*lines, "", f"{settings}; {', '.join(facts)}."])


def main(
    size: Annotated[str, typer.Option(help=f"One of {', '.join(SHAPES)}.")] = "8b",
    device: Annotated[str, typer.Option(help="Default: cuda where there is one.")] = "",
    dtype: Annotated[str, typer.Option()] = "bfloat16",
    cache: Annotated[list[str] | None, typer.Option(help="Default: prefix and full.")] = None,
    layer: Annotated[int | None, typer.Option(help="Default: the recommended block.")] = None,
    width: Annotated[int, typer.Option(help="Of the picture.")] = 640,
    height: Annotated[int, typer.Option()] = 480,
    tokens: Annotated[int, typer.Option(help="Length of the answer.")] = 64,
    steps: Annotated[int, typer.Option(help="Denoising steps.")] = 32,
    words: Annotated[int, typer.Option(help="Words of the last row.")] = 32,
    repeats: Annotated[int, typer.Option(help="Timed after two warm-ups.")] = 3,
    seed: Annotated[int, typer.Option()] = 0,
    output: Annotated[Path | None, typer.Option(help="Write the figures here as JSON.")] = None,
) -> None:
    """Print seconds and peak memory of explaining, beside those of generating."""
    for option, value, known in (
        ("--size", size, SHAPES),
        ("--dtype", dtype, DTYPES),
    ):
        if value not in known:
            raise typer.BadParameter(f"{value!r} is none of {', '.join(known)}", param_hint=option)
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    picture = make_scene(7, 0).image.resize((width, height))
    rows: list[dict[str, Any]] = []
    count = weights = 0
    for one in cache or ["prefix", "none"]:
        adapter = build(SHAPES[size], device, getattr(torch, dtype), one, seed)
        count = sum(p.numel() for p in adapter.model.parameters())
        weights = sum(p.numel() * p.element_size() for p in adapter.model.parameters())
        rows += measure(adapter, picture, layer, tokens, steps, words, repeats)
        del adapter
    report = {
        "size": size,
        "parameters": f"{count / 1e9:.2f} billion",
        "weights": f"{weights / GIB:.2f} GiB",
        "dtype": dtype,
        "tokens": tokens,
        "steps": steps,
        "repeats": repeats,
        "seed": seed,
        "machine": machine(device),
        "torch": str(torch.__version__),
        "rows": rows,
    }
    typer.echo(markdown(report))
    if output is not None:
        output.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    typer.run(main)
