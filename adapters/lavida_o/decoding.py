r"""How LaViDa-O decodes with ``use_fast_dlm``: settings, recording, and one step with gradients.

It runs the whole sequence at every block's beginning and the block alone at its other steps,
against keys and values of the whole call in which the block's own are replaced. A step's state is
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
from captum_dcam.errors import InputError


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
                # what the whole call committed lies in the block too
                self.wholes.append(self.wholes[-1])
                self.spans.append((begin, begin + self.block))
            self.lengths.append(ids.shape[1])
            self.see(canvas)

        def scored(_module: nn.Module, _args: Any, output: Any) -> None:
            (begin, end), width = self.spans[-1], self.canvases[-1].shape[1]
            logits = output.logits
            whole = begin < 0
            padding = (0, 0, begin, width - end)
            self.read(logits[:, -width:] if whole else nn.functional.pad(logits, padding))

        words: Any = inner.get_submodule("transformer.wte")
        with words.register_forward_pre_hook(embedded), inner.register_forward_hook(scored):
            yield

    def all_states(self) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        """(S, 1, …): canvas, canvas of the last whole call, block's bounds (-1 at whole calls); and
        the same (1, …) with the whole answer visible, as a whole call."""
        tokens, spans = self.tokens, torch.tensor(self.spans, device=self.tokens.device)
        states = self.states, torch.stack(self.wholes), spans[:, None]
        return states, (tokens, tokens, torch.full_like(spans[:1], -1))

    def runs(self) -> Tensor:
        """(S, 1, T) bool: the positions that each step ran."""
        ran = torch.zeros(len(self.spans), 1, self.canvases[0].shape[1], dtype=torch.bool)
        for step, (begin, end) in enumerate(self.spans):
            ran[step, :, slice(None) if begin < 0 else slice(begin, end)] = True
        return ran


@dataclass(frozen=True)
class Fast:
    """Settings of ``use_fast_dlm``: upstream commits all tokens above a rising bar of confidence
    (``factor``), above ``threshold``, or as many per step as the number of steps says (neither)."""

    factor: float | None = 1.0
    threshold: float | None = None


def fast_settings(settings: dict[str, Any], cache: str) -> Fast | None:
    """Take them out of ``settings``; None without ``use_fast_dlm``. Raises what cannot work."""
    wanted = bool(settings.pop("use_fast_dlm", False))
    given = {n: settings.pop(n) for n in ("factor", "threshold") if n in settings}
    if not wanted:
        if given:
            raise InputError(f"{' and '.join(given)}: of use_fast_dlm=True, which was not given")
        return None
    if cache == "prefix":
        raise InputError(
            "use_fast_dlm runs the whole sequence at every block, cache='prefix' only once: "
            "captum_dcam.wrap(model, processor, cache='none')"
        )
    if given.get("threshold") is not None:
        given.setdefault("factor", None)
    made = Fast(**given)
    if made.factor is not None and made.threshold is not None:
        raise InputError("factor and threshold: upstream ignores threshold beside factor; give one")
    for name in ("schedule", "shift", "step_ratio"):
        if settings.get(name) is not None:
            raise InputError(f"{name} has no effect with use_fast_dlm: leave it out")
    if settings.get("remasking", "low_confidence") not in ("low_confidence", "random"):
        raise InputError(
            f"remasking is {settings['remasking']!r}: use_fast_dlm knows low_confidence and random"
        )
    return made


def fast_arguments(options: dict[str, Any], made: Fast, steps: int) -> dict[str, Any]:
    """Arguments of the family's ``generate``, from those of decoding without."""
    without = ("prefix_lm", "schedule", "schedule_kwargs")
    rest = {name: value for name, value in options.items() if name not in without}
    return {**rest, "use_fast_dlm": True, "steps": steps, **vars(made)}


def fast_logits(model: Any, prefix: Tensor, canvas: Tensor, whole: Tensor, spans: Tensor) -> Tensor:
    """Logits (R, T, V): one whole call for all rows, then each row's block against its own cache.

    Positions that a row's call leaves out have logits 0.
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
