r"""Recording decoders that work on token ids: masks are filled in, and what is filled stays."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass
class CanvasLog:
    r"""Canvases, commit steps and probabilities, noted while a decoder runs.

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

    def see(self, canvas: Tensor) -> None:
        """The canvas (B, T) before a step; decoders change theirs in place, so it is copied."""
        self._note(canvas)
        self.canvases.append(canvas.clone())

    def read(self, logits: Tensor) -> None:
        """The step's logits (B, T, V), row t predicting position t."""
        self._logits = logits.detach()

    def finish(self, tokens: Tensor) -> None:
        """The answer (B, T)."""
        self._note(tokens)
        self.tokens = tokens

    def _note(self, canvas: Tensor) -> None:
        """Probabilities of what the step before has committed; ``canvas`` is its outcome."""
        if self._confidence is None:
            self._confidence = torch.zeros(canvas.shape)
        if self._logits is None:
            return
        new = (self.canvases[-1] == self.mask_id) & (canvas != self.mask_id)
        rows = self._logits[new].double().softmax(-1)
        sure = rows.gather(-1, canvas[new][:, None])[:, 0]
        self._confidence[new.cpu()] = sure.float().cpu()
        self._logits = None

    @property
    def states(self) -> Tensor:
        """(S, B, T), the canvas before every step."""
        return torch.stack(self.canvases)

    @property
    def commit_step(self) -> Tensor:
        """(B, T) int64: the last step in which a position was masked; positions that the decoder
        left masked to the end count for the last step."""
        return (self.states == self.mask_id).sum(0) - 1

    @property
    def confidence(self) -> Tensor:
        """(B, T) float32 on the CPU: probability, by the model's own logits, of the committed
        token at its step; 0 where the decoder left the mask."""
        assert self._confidence is not None
        return self._confidence
