"""Recording of generations whose upstream code keeps no history."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from captum_dcam.model.guard import DRAWING


@contextmanager
def seeded(
    generator: torch.Generator | None, device: torch.device | None = None, *, bits: int = 62
) -> Iterator[None]:
    r"""Let code that draws from PyTorch's global generators draw reproducibly from ``generator``.

    The states of the global generators are restored.

    Args:
        generator (torch.Generator, optional): None: nothing is changed (greedy decoding).
        device (device, optional): whose generator is restored besides the CPU's. Default: all
        bits (int, optional): of the seed that is drawn; what a generator's seed gives depends on
            it, so a family keeps its number. Default: 62
    """
    if generator is None:
        yield
        return
    seed = int(torch.randint(2**bits, (), generator=generator, device=generator.device))
    only = None if device is None else [device] if device.type == "cuda" else []
    with DRAWING, torch.random.fork_rng(devices=only):
        torch.manual_seed(seed)
        yield


def guided(logits: Tensor, scale: Any) -> Tensor:
    """Classifier-free guidance of LLaDA's decoders: rows [conditional; unconditional] to one."""
    conditional, blind = logits.chunk(2)
    return blind + (scale + 1) * (conditional - blind)


@dataclass
class CanvasLog:
    r"""Canvases, commit steps and probabilities of a decoder that works on token ids.

    Such a decoder fills in masks; a token counts as committed when it changed for the last time.
    Every step calls :meth:`see` with what the model is given and :meth:`read` with its logits;
    :meth:`finish` takes the answer.

    Args:
        mask_id (int): of the mask token.
        canvases (list of Tensor): (B, T) ids before every step so far.

    Attributes:
        tokens (Tensor): the answer (B, T), once finished.
    """

    mask_id: int
    canvases: list[Tensor] = field(default_factory=list)
    tokens: Tensor = field(init=False, repr=False)
    _confidence: Tensor | None = None
    _logits: Tensor | None = None
    _from: int = 0

    @classmethod
    def joined(cls, logs: Sequence[CanvasLog]) -> CanvasLog:
        """The finished logs of examples that were decoded one by one, as that of their batch."""
        canvases = zip(*(log.canvases for log in logs), strict=True)
        out = cls(logs[0].mask_id, [torch.cat(rows) for rows in canvases])
        out.tokens = torch.cat([log.tokens for log in logs])
        out._confidence = torch.cat([log.confidence for log in logs])
        return out

    def see(self, canvas: Tensor) -> None:
        """The canvas (B, T) before a step; decoders change theirs in place, so it is copied."""
        self._note(canvas)
        self.canvases.append(canvas.clone())

    def read(self, logits: Tensor, first: int = 0) -> None:
        """The step's logits (B, n, V), row t predicting position ``first`` + t; a step writes no
        others."""
        self._logits, self._from = logits.detach(), first

    def finish(self, tokens: Tensor) -> None:
        """The answer (B, T)."""
        self._note(tokens)
        self.tokens = tokens

    def cut(self, length: int) -> None:
        """Forget the positions from ``length`` on, before :meth:`finish`."""
        self.canvases = [canvas[:, :length] for canvas in self.canvases]
        if self._confidence is not None:
            self._confidence = self._confidence[:, :length]

    def _note(self, canvas: Tensor) -> None:
        """Probabilities of what the step before has committed; ``canvas`` is its outcome."""
        if self._confidence is None:
            self._confidence = torch.zeros(canvas.shape)
        if self._logits is None:
            return
        new = (self.canvases[-1] != canvas) & (canvas != self.mask_id)
        own = new[:, self._from : self._from + self._logits.shape[1]]
        rows = self._logits[own].double().softmax(-1)
        sure = rows.gather(-1, canvas[new][:, None])[:, 0]
        self._confidence[new.cpu()] = sure.float().cpu()
        self._logits = None

    @property
    def states(self) -> Tensor:
        """(S, B, T), the canvas before every step."""
        return torch.stack(self.canvases)

    @property
    def commit_step(self) -> Tensor:
        """(B, T) int64: the last step that changed a position. Positions that the decoder left
        masked to the end count for the last step, those that it was given for the first."""
        states = self.states
        changed = torch.cat((states[1:], self.tokens[None])) != states
        number = torch.arange(len(states), device=states.device)[:, None, None]
        last = torch.where(changed, number, 0).amax(0)
        return last.masked_fill(self.tokens == self.mask_id, len(states) - 1)

    @property
    def confidence(self) -> Tensor:
        """(B, T) float32 on the CPU: probability, by the model's own logits, of the committed
        token at its step; 0 where the decoder left the mask."""
        assert self._confidence is not None
        return self._confidence
