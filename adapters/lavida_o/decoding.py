r"""How LaViDa-O decodes with ``use_fast_dlm``: recording it, and one step with gradients.

It runs the whole sequence at every block's beginning and the block alone at its other steps,
against keys and values of the whole run in which the block's own are replaced. A step's state is
then the canvas, the canvas of that whole run, and where the block lies.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from captum_dcam.adapters.common.recording import CanvasLog


@dataclass
class FastLog(CanvasLog):
    r"""Recording of ``use_fast_dlm`` through hooks.

    Args:
        prefix (int): P, tokens before the canvas.
        block (int): tokens of a block.
    """

    prefix: int = 0
    block: int = 0
    wholes: list[Tensor] = field(default_factory=list)
    spans: list[tuple[int, int]] = field(default_factory=list)
    lengths: list[int] = field(default_factory=list)

    @contextmanager
    def watching(self, inner: nn.Module) -> Iterator[None]:
        """Hooks on the word embedding and on the transformer while the context is open."""
        blocks_begun = 0

        def embedded(_module: nn.Module, args: tuple[Any, ...]) -> None:
            nonlocal blocks_begun
            ids = args[0]
            if ids.ndim != 2:  # the prompt's ids come as one row without a batch
                return
            if ids.shape[1] > self.prefix:
                canvas = ids[:, self.prefix :]
                self.wholes.append(canvas.clone())
                self.spans.append((-1, -1))
                blocks_begun += 1
            else:
                begin = (blocks_begun - 1) * self.block
                canvas = self.canvases[-1].clone()
                canvas[:, begin : begin + self.block] = ids
                # what the whole run committed lies in the block too
                self.wholes.append(self.wholes[-1])
                self.spans.append((begin, begin + self.block))
            self.lengths.append(ids.shape[1])
            self.see(canvas)

        def scored(_module: nn.Module, _args: Any, output: Any) -> None:
            begin, end = self.spans[-1]
            width = self.canvases[-1].shape[1]
            logits = output.logits
            if begin < 0:
                self.read(logits[:, -width:])
                return
            self.read(nn.functional.pad(logits, (0, 0, begin, width - end)))

        words: Any = inner.get_submodule("transformer.wte")
        handles = [
            words.register_forward_pre_hook(embedded),
            inner.register_forward_hook(scored),
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def all_states(self) -> tuple[Tensor, ...]:
        """(S, 1, …): canvas, canvas of the last whole run, block's bounds (-1 at whole runs)."""
        canvases = self.states
        spans = torch.tensor(self.spans, device=canvases.device)[:, None]
        return canvases, torch.stack(self.wholes), spans

    def final(self, tokens: Tensor) -> tuple[Tensor, ...]:
        """The same with the whole answer visible, as a whole run."""
        return tokens, tokens, torch.full((1, 2), -1, device=tokens.device)

    def last_runs(self) -> Tensor:
        """(1, T): the last step that ran each position."""
        last = torch.zeros(1, self.canvases[0].shape[1], dtype=torch.int64)
        for step, (begin, end) in enumerate(self.spans):
            ran = slice(None) if begin < 0 else slice(begin, end)
            last[:, ran] = step
        return last


def fast_logits(model: Any, prefix: Tensor, canvas: Tensor, whole: Tensor, spans: Tensor) -> Tensor:
    """Logits (R, T, V): one whole run for all rows, then each row's block against its own cache.

    Positions that a row's step did not run have logits 0.
    """
    inner, width = model.model, canvas.shape[1]
    words = inner.transformer.wte(whole)
    embeds = torch.cat((prefix.to(words.dtype), words), dim=1)
    out = inner(None, input_embeddings=embeds, use_cache=True)
    rows = []
    for row, (begin, end) in enumerate(spans.tolist()):
        own = slice(row, row + 1)
        if begin < 0:
            rows.append(out.logits[own, -width:])
            continue
        # the block's keys are written into the cache in place: copies keep the graph whole
        cache = [(k[own].clone(), v[own].clone()) for k, v in out.attn_key_values]
        here = torch.zeros(1, embeds.shape[1], dtype=torch.bool, device=embeds.device)
        here[:, prefix.shape[1] + begin : prefix.shape[1] + end] = True
        part = inner(
            canvas[own, begin:end], past_key_values=cache, use_cache=True, replace_position=here
        ).logits
        rows.append(nn.functional.pad(part, (0, 0, begin, width - end)))
    return torch.cat(rows)
