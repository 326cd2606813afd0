r"""Recording generations whose upstream code keeps no history, by hooks on the model's parts."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn


@contextmanager
def seeded(
    generator: torch.Generator | None, device: torch.device | None = None, *, bits: int = 62
) -> Iterator[None]:
    r"""Let code that draws from PyTorch's global generators draw reproducibly from ``generator``.

    The global generators are as before afterwards.

    Args:
        generator (torch.Generator, optional): None: nothing is changed (greedy decoding).
        device (device, optional): whose generator is put back besides the CPU's. Default: all
        bits (int, optional): of the seed that is drawn; what a generator's seed gives depends on
            it, so a family keeps its number. Default: 62
    """
    if generator is None:
        yield
        return
    seed = int(torch.randint(2**bits, (), generator=generator, device=generator.device))
    only = None if device is None else [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=only):
        torch.manual_seed(seed)
        yield


@dataclass(frozen=True)
class Step:
    """One run of the transformer: the canvas (1, W) it was given, and the part it was given.

    ``length`` tokens from sequence position ``start`` on went in; the rest came from a cache.
    """

    canvas: Tensor
    start: int
    length: int


@dataclass
class CanvasRecorder:
    r"""Canvas, commits and confidences of a decoder that works on embeddings in place.

    Every step such a decoder runs ``transformer(inputs_embeds=…)``, then ``head``, and embeds the
    candidates of all positions it ran with ``words``. Where the embeddings differ at the next step,
    the candidate was committed.

    Args:
        prefix (int): tokens before the canvas.
        canvas (Tensor): (1, W) ids before the first step.
        mask_id (int): of the mask token.
        forbidden (sequence of int): ids that the decoder rules out at masked positions.
        guidance (float): the decoder's classifier-free guidance scale; above 0, row 1 of a run is
            the unconditional one. Default: 0
    """

    prefix: int
    canvas: Tensor
    mask_id: int
    forbidden: Sequence[int] = ()
    guidance: float = 0.0
    steps: list[Step] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.canvas = self.canvas.clone()
        self.commit_step = torch.full_like(self.canvas, -1)
        self.confidence = torch.zeros(self.canvas.shape, device=self.canvas.device)
        self._embeds: Tensor | None = None
        self._logits: Tensor | None = None
        self._chosen: Tensor | None = None
        self._sure: Tensor | None = None

    @contextmanager
    def watching(self, transformer: nn.Module, head: nn.Module, words: nn.Module) -> Iterator[None]:
        """Hooks on the three parts while the context is open."""
        handles = [
            transformer.register_forward_pre_hook(self._before, with_kwargs=True),
            head.register_forward_hook(self._after),
            words.register_forward_hook(self._embedded),
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _before(self, _module: nn.Module, _args: Any, kwargs: dict[str, Any]) -> None:
        embeds = kwargs["inputs_embeds"][:1]
        width, length = self.canvas.shape[1], embeds.shape[1]
        start = self.prefix + width - length
        seen = min(width, length)
        now = embeds[:, -seen:].clone()  # changed in place afterwards
        if self._embeds is not None:
            moved = (now != self._embeds[:, -seen:]).any(-1)
            self._commit(moved, width - seen)
            now = torch.cat((self._embeds[:, : width - seen], now), dim=1)
        self._embeds = now
        self.steps.append(Step(self.canvas.clone(), start, length))

    def _after(self, _module: nn.Module, _args: Any, output: Tensor) -> None:
        seen = min(self.canvas.shape[1], output.shape[1])
        rows = output[:, -seen:].float()
        if self.guidance > 0:
            conditional, blind = rows.chunk(2)
            rows = blind + (self.guidance + 1) * (conditional - blind)
        rows = rows[:1].clone()  # the decoder writes into its logits
        masked = self.canvas[:, -seen:] == self.mask_id
        for token in self.forbidden:
            rows[:, :, token].masked_fill_(masked, -torch.inf)
        self._logits = rows

    def _embedded(self, _module: nn.Module, args: tuple[Any, ...], _output: Tensor) -> None:
        if self._logits is None:
            return
        seen = self._logits.shape[1]
        self._chosen = args[0][:, -seen:].clone()
        probability = self._logits.double().softmax(-1).gather(-1, self._chosen[..., None])
        self._sure, self._logits = probability[..., 0].float(), None

    def _commit(self, moved: Tensor, offset: int) -> None:
        """Take the last step's candidates where ``moved`` (1, seen) from position ``offset`` on."""
        assert self._chosen is not None and self._sure is not None
        where = torch.zeros_like(self.canvas, dtype=torch.bool)
        where[:, offset:] = moved
        width = self.canvas.shape[1] - self._chosen.shape[1]
        chosen = nn.functional.pad(self._chosen, (width, 0))
        sure = nn.functional.pad(self._sure, (width, 0))
        self.canvas = torch.where(where, chosen, self.canvas)
        self.confidence = torch.where(where, sure, self.confidence)
        self.commit_step[where] = len(self.steps) - 1

    def finish(self, answer: Tensor) -> None:
        """Take what the last step committed from the decoder's result (1, N), N <= W."""
        moved = self.canvas[:, : answer.shape[1]] != answer
        width = self.canvas.shape[1]
        assert self._chosen is not None
        self._commit(nn.functional.pad(moved, (0, width - moved.shape[1])), 0)
        never = self.commit_step < 0
        self.commit_step[never] = len(self.steps) - 1


# -- decoders that work on token ids: masks are filled in, and what is filled stays ----------------


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
