r"""The logit lens: hidden states of image and text tokens through the model's own output head.

A :class:`Lens` reads one bound generation. It is told beforehand which token will be asked for at
which step, so that every state is computed once and only numbers are kept: with a prefix cache
one prefill serves all words, without a cache one pass a step.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from captum_dcam.errors import BudgetExhaustedError, InputTypeError, LayerError
from captum_dcam.methods.base import Attribution, AttributionTask, Method
from captum_dcam.model.adapter import Adapter
from captum_dcam.model.forward import DenoisingForward
from captum_dcam.model.sequence import (
    check_whole,
    image_positions,
    outputs_of,
    padded,
    text_tokens,
    unkept,
)
from captum_dcam.model.words import Target

#: so many logits are held at once: 2 ** 24 float32 are 64 MiB
LOGITS_AT_ONCE = 2**24

ORDERS = ("commit", "position")


def logits_in_chunks(adapter: Adapter, hidden: Tensor) -> Iterator[Tensor]:
    """Logits (r, V) of hidden states (R, D), few rows at a time, in float32 or wider."""
    rows = max(1, LOGITS_AT_ONCE // adapter.vocabulary)
    for part in hidden.split(rows):
        logits = adapter.unembed(part)
        yield logits if logits.dtype == torch.float64 else logits.float()


def lens_logits(adapter: Adapter, hidden: Tensor, ids: Sequence[int]) -> Tensor:
    r"""Logits of chosen tokens at hidden states.

    Args:
        adapter (Adapter): whose final norm and output head are used.
        hidden (Tensor): (R, D).
        ids (sequence of int): I token ids.

    Returns:
        Tensor: (I, R) on the CPU, float32 or wider.
    """
    index = torch.tensor(list(ids), dtype=torch.long, device=hidden.device)
    return torch.cat([part[:, index] for part in logits_in_chunks(adapter, hidden)]).T.cpu()


def check_block(adapter: Adapter, block: int) -> int:
    """A block's index from 0; unlike the tapped one, the last block may be read."""
    count = len(adapter.blocks)
    if isinstance(block, bool) or not isinstance(block, int):
        raise InputTypeError(f"block is {block!r}: expected a block's number, 0 to {count - 1}")
    if not -count <= block < count:
        raise LayerError(
            f"block {block} is not in the model: {adapter.family} has {count} blocks, 0 to "
            f"{count - 1}, or -1 for the last"
        )
    return block % count


class Lens:
    r"""Logits that image and text tokens of one example would give to chosen tokens.

    Args:
        forward (DenoisingForward): bound, batch 1.
        wanted (iterable of (int, int)): every (step, token id) that will be asked for.
        block (int, optional): whose output is read. Default: the last
        base (bool, optional): also find the map of the token with the least activation.
    """

    def __init__(
        self,
        forward: DenoisingForward,
        wanted: Iterable[tuple[int, int]],
        block: int = -1,
        *,
        base: bool = False,
    ) -> None:
        self._forward = unkept(forward)
        self._adapter = forward.adapter
        self._block = check_block(forward.adapter, block)
        self._shared = forward.trajectory.cache == "prefix"
        self._base = base
        self._wanted: dict[int, list[int]] = {}
        for step, token in sorted(set(wanted)):
            self._wanted.setdefault(self._state(step), []).append(token)
        request = self._forward.request
        self.tokens = text_tokens(forward)
        self._image_at = image_positions(forward)
        answer = range(forward.trajectory.tokens.shape[1])
        self._length = request.layout.prefix_length + len(answer)
        queries = [forward.adapter.query_position(request.layout, t) for t in answer]
        self._prompt_at = self.tokens.positions[: self.tokens.prompt]
        self._answer_at = torch.tensor(queries)
        self._prefill: tuple[Any, Tensor] | None = None
        self._maps: dict[tuple[int, int], Tensor] = {}
        self._bases: dict[int, Tensor] = {}
        self._text: dict[int, Tensor] = {}
        self._ranks: dict[tuple[int, int], Tensor] = {}

    def _state(self, step: int) -> int:
        """What image states depend on: behind a cached prefix, on no step."""
        return 0 if self._shared else step

    @torch.no_grad()
    def image(self, step: int, token: int) -> Tensor:
        """(N,) logits of a token at all image tokens (TAM Eq. 1 without its positive part)."""
        if (self._state(step), token) not in self._maps:
            self._see(step)
        return self._maps[self._state(step), token]

    @torch.no_grad()
    def text(self, step: int, token: int) -> Tensor:
        """(K,) logits of a token at the text tokens: at a prompt token's own position, and in the
        row that predicts an answer token."""
        return lens_logits(self._adapter, self._text_states(step), [token])[0]

    @torch.no_grad()
    def rankings(self, step: int, k: int) -> Tensor:
        """(K, k) ids of the tokens that every text token predicts, best first."""
        k = min(k, self._adapter.vocabulary)
        if (step, k) not in self._ranks:
            parts = logits_in_chunks(self._adapter, self._text_states(step))
            self._ranks[step, k] = torch.cat([logits.topk(k).indices.cpu() for logits in parts])
        return self._ranks[step, k]

    @torch.no_grad()
    def least(self, step: int) -> Tensor:
        """(N,) logits of the token that is activated least by the image as a whole."""
        assert self._base, "a lens without base=True does not look for it"
        if self._state(step) not in self._bases:
            self._see(step)
        return self._bases[self._state(step)]

    # -- states ---------------------------------------------------------------------------------

    def _see(self, step: int) -> None:
        """Compute the state whose image tokens the step sees, and keep what was wanted of it."""
        if self._shared:
            self._keep_maps(0, self._prefilled()[1])
        else:
            self._text_states(step)

    def _text_states(self, step: int) -> Tensor:
        """(K, D) hidden states of the text tokens; without a cache of the whole pass."""
        if step in self._text:
            return self._text[step]
        blocks = {self._block: self._adapter.blocks[self._block]}
        zero, at = torch.tensor([0]), torch.tensor([step])
        if self._shared:
            memory, prefix = self._prefilled()
            # select() copies: a cache that grows in place would grow with every step
            own = self._adapter.select(memory, zero.to(prefix.device))
            twins = self._adapter.step_blocks
            with outputs_of(blocks, twins=twins) as found:
                self._forward.step(own, zero, at)
            parts = found[self._block] if twins else found[self._block][-1:]
            hidden = torch.cat((prefix, *(h[0] for h in parts)))
            hidden = padded(hidden, self._length) if twins else hidden
        else:
            with outputs_of(blocks) as found:
                self._forward.replay(zero, at)
            hidden = found[self._block][-1][0]
            check_whole(len(hidden), self._length)
            self._keep_maps(step, hidden)
        rows = torch.cat((self._prompt_at, self._answer_at)).to(hidden.device)
        self._text[step] = hidden[rows]
        return self._text[step]

    def _prefilled(self) -> tuple[Any, Tensor]:
        """The prefix's memory and the block's output (P, D), computed once."""
        if self._prefill is None:
            blocks = {self._block: self._adapter.blocks[self._block]}
            with outputs_of(blocks) as found:
                memory = self._forward.prefill()
            self._prefill = memory, found[self._block][-1][0]
        return self._prefill

    def _keep_maps(self, state: int, hidden: Tensor) -> None:
        """Read the image tokens: wanted tokens and, if asked for, the least activated one."""
        hidden = hidden[self._image_at.to(hidden.device)]
        ids = self._wanted.get(state, [])
        maps = lens_logits(self._adapter, hidden, ids)
        self._maps.update({(state, t): m for t, m in zip(ids, maps, strict=True)})
        if self._base:
            total = torch.zeros(self._adapter.vocabulary, dtype=torch.float64)
            for part in logits_in_chunks(self._adapter, hidden):
                total += part.sum(0).cpu()
            self._bases[state] = lens_logits(self._adapter, hidden, [int(total.argmin())])[0]


# -- context -------------------------------------------------------------------------------------


def own_steps(task: AttributionTask) -> list[int]:
    r"""The step at which each of the K text tokens' own map is read.

    Answer tokens: the task's score. Prompt tokens are there from the start: the first step, or
    the score's one step where it reads all tokens at the same.
    """
    answer = [task.step(p) for p in range(task.forward.trajectory.tokens.shape[1])]
    prompt = _prompt_length(task)
    return [0 if task.score == "commit" else answer[0]] * prompt + answer


def _prompt_length(task: AttributionTask) -> int:
    return len(task.forward.adapter.prompt_tokens(task.forward.request)[0])


def context_of(task: AttributionTask, position: int, order: str) -> Tensor:
    r"""Which of the K text tokens are context of a response position.

    All prompt tokens, and the answer tokens before it: committed at an earlier step (``commit``,
    for models that denoise), or further to the left (``position``, for autoregressive ones). Stop
    tokens never are: in an autoregressive answer nothing follows them.

    Returns:
        Tensor: (C,) int64, indices into :func:`captum_dcam.model.sequence.text_tokens`.
    """
    trajectory = task.forward.trajectory
    rank = trajectory.commit_step[0].cpu()
    if order == "position":
        rank = torch.arange(len(rank))
    stops = torch.tensor(sorted(task.forward.adapter.stop_ids), dtype=torch.long)
    answer = (rank < rank[position]) & ~torch.isin(trajectory.tokens[0].cpu(), stops)
    prompt = torch.ones(_prompt_length(task), dtype=torch.bool)
    return torch.cat((prompt, answer)).nonzero()[:, 0]


def reads(task: AttributionTask, order: str | None = None) -> set[tuple[int, int]]:
    """Every (step, token id) that a task's words need, with their context's if an order is
    given."""
    pairs = [
        (p, token) for t in task.targets for p, token in zip(t.positions, t.token_ids, strict=True)
    ]
    wanted = {(task.step(p), token) for p, token in pairs}
    if order is not None:
        steps, ids = own_steps(task), text_tokens(task.forward).ids.tolist()
        context = {int(k) for p, _ in pairs for k in context_of(task, p, order)}
        wanted |= {(steps[k], ids[k]) for k in context}
    return wanted


class PerWord(Method):
    r"""A method whose words share what was read of the model.

    A budget that ends inside a word leaves the words before it.
    """

    @abstractmethod
    def reader(self, task: AttributionTask) -> Any:
        """What all words share, filled as they need it."""

    @abstractmethod
    def word(self, reader: Any, target: Target) -> tuple[tuple[Tensor, ...], Tensor | None]:
        """Maps (h, w) of a word, one a grid, and the relevance (K,) of text tokens, if any."""

    def attribute(self, task: AttributionTask) -> Attribution:
        maps, reader = task.empty(), self.reader(task)
        done = torch.zeros(len(task.targets), dtype=torch.bool)
        text: Tensor | None = None
        if self.facts.text:
            text = torch.zeros(len(task.targets), len(text_tokens(task.forward)))
        for n, target in enumerate(task.targets):
            try:
                found, relevance = self.word(reader, target)
            except BudgetExhaustedError as error:
                return Attribution(maps, done, text, str(error))
            for whole, own in zip(maps, found, strict=True):
                whole[n] = own
            if text is not None and relevance is not None:
                text[n] = relevance
            done[n] = True
        return Attribution(maps, done, text)
