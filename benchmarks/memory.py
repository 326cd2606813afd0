r"""Peak memory of explaining, counted without a GPU: ``python benchmarks/memory.py``.

The library's own code runs on tensors that have shapes and no values (device meta), behind LaViDa's
adapter, on blocks of any size. Every storage that an operation makes counts from then until it is
freed. Attention is counted as a fused kernel has it, which keeps queries, keys, values, outputs and
one number per query and head. What this leaves out: a GPU's context, memory that its allocator
holds, and workspaces inside kernels.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any
from unittest import mock
from weakref import WeakSet, finalize

import torch
import typer
from large import GIB, SHAPES, Shape, build
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from captum_dcam import DenoisingForward
from captum_dcam.adapters.common.prefix import Prefix
from captum_dcam.adapters.lavida import LavidaAdapter
from captum_dcam.evaluation.plan import DTYPES
from captum_dcam.maps import Reading, word_maps
from captum_dcam.model.adapter import Request
from captum_dcam.model.layout import Layout, uniform_grid
from captum_dcam.model.tap import recorded
from captum_dcam.model.trajectory import CACHES, Trajectory
from captum_dcam.model.words import Target

META = torch.device("meta")
DEVICE = "captum_dcam.model.adapter.device_of"
#: bytes that an allocation takes at least, and a multiple of them
UNIT = 512


class Live(TorchDispatchMode):
    """Counts bytes of storages while they live; ``peak`` is the most at once."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = self.peak = 0
        self._seen: WeakSet[Any] = WeakSet()

    def add(self, tensor: Tensor) -> None:
        """Count a tensor's storage, unless it is counted already."""
        storage = tensor.untyped_storage()
        if tensor.device != META or storage in self._seen:
            return
        size = -(-storage.nbytes() // UNIT) * UNIT
        self._seen.add(storage)
        finalize(storage, self._free, size)
        self.bytes += size
        self.peak = max(self.peak, self.bytes)

    def _free(self, size: int) -> None:
        self.bytes -= size

    def __torch_dispatch__(self, func: Any, _types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor):
                self.add(tensor)
        return out


class Yes(TorchFunctionMode):
    """Without values every question to them is answered with yes: finite, any gradient, …"""

    def __torch_function__(self, func: Any, _types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if getattr(func, "__name__", "") == "__bool__" and args[0].is_meta:
            return True
        return func(*args, **(kwargs or {}))


class Fused(torch.autograd.Function):
    """Attention by what a fused kernel keeps."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = torch.empty_like(q)
        lengths = q.new_empty(q.shape[:-1], dtype=torch.float32)
        ctx.save_for_backward(q, k, v, out, lengths)
        return out

    @staticmethod
    def backward(ctx: Any, _out: Tensor) -> tuple[Tensor, ...]:
        q, k, v, *_ = ctx.saved_tensors
        return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)


@contextmanager
def counted(model: nn.Module) -> Iterator[Live]:
    """The count of all that lives, the model's weights included, while the context is open."""
    with ExitStack() as stack:
        enter = stack.enter_context
        attention = "torch.nn.functional.scaled_dot_product_attention"
        enter(mock.patch(attention, lambda q, k, v, **_: Fused.apply(q, k, v)))
        enter(Yes())
        live = enter(Live())
        for tensor in (*model.parameters(), *model.buffers()):
            live.add(tensor)
        yield live


def adapter_of(shape: Shape, dtype: torch.dtype, cache: str) -> LavidaAdapter:
    """The family's adapter of a model without values."""
    refusing = "captum_dcam.adapters.common.packing.check_newline"
    with mock.patch(refusing), mock.patch(DEVICE, lambda _model: META):
        return build(shape, "meta", dtype, cache, 0)


def request_of(adapter: Any, prefix: int) -> Request:
    """A request of a prefix of so many tokens, nearly all of them of one image."""
    side = math.isqrt(int(prefix * 0.95))
    start = (prefix - side**2) // 2
    layout = Layout((uniform_grid(start, (side, side), (384, 384)),), prefix)
    pixels = torch.empty(1, 1, 3, 384, 384, dtype=adapter.dtype, device=META)
    said = torch.zeros(1, prefix, dtype=torch.bool)
    return Request(pixels, (), layout, ("",), ((),), said)


@torch.no_grad()
def decode(adapter: Any, embeds: Tensor, answer: int, steps: int) -> None:
    """What a generation computes, as LaViDa's code does; nothing is kept."""
    model, cached = adapter.model.model, adapter.cache == "prefix"
    past = None
    if cached:
        past = model(None, input_embeddings=embeds, use_cache=True).attn_key_values
    canvas = torch.zeros(1, answer, dtype=torch.long, device=META)
    for _ in range(steps):
        words = model.transformer.wte(canvas)
        given = words if cached else torch.cat((embeds, words), 1)
        logits = model(None, input_embeddings=given, past_key_values=past).logits
        wide = logits.double()  # sampled: the noise is as wide
        (wide.exp() / -torch.rand_like(wide).log()).argmax(-1)
        logits.double().softmax(-1)


def bound(adapter: Any, request: Request, embeds: Tensor, answer: int, steps: int) -> Any:
    """A forward with a generation as the library records it."""
    forward = DenoisingForward(adapter)
    each = torch.arange(answer) * steps // answer
    below = list(adapter.blocks[: forward.layer + 1])
    with forward.held(), recorded(below, True) as (lengths, outputs):
        decode(adapter, embeds, answer, steps)
    trajectory = Trajectory(
        tokens=torch.zeros(1, answer, dtype=torch.long),
        states=(torch.zeros(steps, 1, answer, dtype=torch.long, device=META),),
        final_state=(torch.zeros(1, answer, dtype=torch.long, device=META),),
        commit_step=each[None],
        confidence=torch.ones(1, answer),
        cache=adapter.cache,
        image_end=request.layout.image_end,
        lengths=tuple(lengths),
        settings={},
    )
    forward.bind(request, trajectory)
    kept = {"layer": forward.layer, "calls": dict(enumerate(outputs)), "embedded": Prefix(embeds)}
    trajectory.kept.update(kept, stamp=forward._stamp())
    return forward


def measure(
    adapter: LavidaAdapter,
    prefix: int,
    answer: int,
    steps: int,
    words: Sequence[int],
    rows: int | None,
    card: int,
) -> dict[str, int]:
    r"""Peak bytes of what is done, in order.

    Args:
        adapter (LavidaAdapter): of a model without values.
        prefix, answer, steps (int): tokens of the prefix and of the answer, denoising steps.
        words (sequence of int): how many are explained. Of those beyond the second batch of rows
            none is run: they need no more.
        rows (int or None): at once; None: as many as the library finds to fit.
        card (int): bytes of a GPU's memory, for that.
    """
    found: dict[str, int] = {}
    request = request_of(adapter, prefix)
    width = adapter.blocks[0].q_proj.in_features
    with ExitStack() as stack:
        enter = stack.enter_context
        enter(mock.patch(DEVICE, lambda _model: META))
        enter(mock.patch.object(DenoisingForward, "_stamp", lambda *_: b""))
        live = enter(counted(adapter.model))
        enter(mock.patch("captum_dcam.model.budget.free_bytes", lambda _: card - live.bytes))
        embeds = torch.empty(1, prefix, width, dtype=adapter.dtype, device=META)
        decode(adapter, embeds, answer, 1)
        found["generation alone"] = live.peak
        forward = bound(adapter, request, embeds, answer, steps)
        found["generation, recorded"] = live.peak
        forward.internal_batch_size = rows
        for count in words:
            run = count if rows is None else min(count, 2 * rows + 1)
            targets = [Target("w", (p * answer // run,), (p,)) for p in range(run)]
            live.peak = live.bytes
            word_maps(forward, targets, [0] * run, Reading(backward="constant_norms"))
            found[f"{count} word{'s' * (count > 1)}"] = live.peak
    return found


def markdown(shape: str, rows: Sequence[dict[str, Any]]) -> str:
    """The table of docs/COST.md."""
    columns = list(rows[0])
    lines = ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
    for row in rows:
        cells = [f"{v:.2f}" if isinstance(v, float) else str(v) for v in row.values()]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join([*lines, "", f"{shape}; torch {torch.__version__}."])


def main(
    size: Annotated[str, typer.Option(help=f"One of {', '.join(SHAPES)}.")] = "8b",
    width: Annotated[int, typer.Option(help="Of another model. Default: the size's")] = 0,
    blocks: Annotated[int, typer.Option()] = 0,
    heads: Annotated[int, typer.Option()] = 0,
    mlp: Annotated[int, typer.Option()] = 0,
    vocabulary: Annotated[int, typer.Option()] = 0,
    dtype: Annotated[str, typer.Option()] = "bfloat16",
    cache: Annotated[str, typer.Option(help="'prefix' or 'none'.")] = "prefix",
    prefix: Annotated[list[int] | None, typer.Option(help="Tokens. Default: 881 and 2351")] = None,
    answer: Annotated[list[int] | None, typer.Option(help="Tokens. Default: 64")] = None,
    words: Annotated[list[int] | None, typer.Option(help="Default: 1 and 32")] = None,
    rows: Annotated[list[int] | None, typer.Option(help="At once; 0: what fits.")] = None,
    card: Annotated[float, typer.Option(help="GiB of a GPU's memory.")] = 24.0,
    output: Annotated[Path | None, typer.Option(help="Write the figures here as JSON.")] = None,
) -> None:
    """Print peaks of explaining, and how often they are plain generation's."""
    for option, value, known in (
        ("--size", size, tuple(SHAPES)),
        ("--dtype", dtype, DTYPES),
        ("--cache", cache, CACHES),
    ):
        if value not in known:
            raise typer.BadParameter(f"{value!r} is none of {', '.join(known)}", param_hint=option)
    given = {"width": width, "blocks": blocks, "heads": heads, "mlp": mlp, "vocabulary": vocabulary}
    shape = replace(SHAPES[size], **{n: v for n, v in given.items() if v})
    adapter = adapter_of(shape, getattr(torch, dtype), cache)
    table: list[dict[str, Any]] = []
    for length in prefix or (881, 2351):
        for count in answer or (64,):
            for at_once in rows or (1,):
                found = measure(
                    adapter, length, count, count // 2, words or (1, 32), at_once or None,
                    int(card * GIB),
                )  # fmt: skip
                plain = found["generation alone"]
                row: dict[str, Any] = {"cache": cache, "prefix": length, "answer": count}
                row["rows"] = at_once or f"what fits into {card:g} GiB"
                row |= {name: peak / GIB for name, peak in found.items()}
                row |= {f"{n}, ×": p / plain for n, p in found.items() if "word" in n}
                table.append(row)
    typer.echo(markdown(f"{shape}, {dtype}", table))
    if output is not None:
        output.write_text(json.dumps(table, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    typer.run(main)
