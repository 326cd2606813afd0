r"""The logit lens: hidden states of image and text tokens through the model's own output head.

A :class:`Lens` reads one bound generation. It is told beforehand which token will be asked for at
which step, so that every state is computed once and only numbers are kept: with a prefix cache
one prefill serves all words, without a cache there is one pass per step.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from functools import partial

import torch
from torch import Tensor

from captum_dcam.methods.base import (
    AttributionTask,
    PerWord,
    Replays,
    WordMaps,
    check_block,
    entered,
    pairs_of,
)
from captum_dcam.model.adapter import Adapter
from captum_dcam.model.forward import DenoisingForward
from captum_dcam.model.sequence import (
    check_whole,
    image_positions,
    outputs_of,
    padded,
    prompt_dialogue,
    split_grids,
    text_tokens,
)
from captum_dcam.model.tap import wide
from captum_dcam.model.words import Target

#: number of logits held at once: 2 ** 24 float32 are 64 MiB
LOGITS_AT_ONCE = 2**24

ORDERS = ("commit", "position")


def logits_in_chunks(adapter: Adapter, hidden: Tensor) -> Iterator[Tensor]:
    """Logits (r, V) of hidden states (R, D), a few rows at a time, in float32 or wider."""
    rows = max(1, LOGITS_AT_ONCE // adapter.vocabulary)
    for part in hidden.split(rows):
        yield wide(adapter.unembed(part))


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
        self._adapter, self._block = forward.adapter, check_block(forward.adapter, block)
        blocks = {self._block: forward.adapter.blocks[self._block]}
        watch = partial(outputs_of, blocks, twins=forward.adapter.step_blocks)
        self._reading = Replays(forward, watch)
        self._shared = forward.trajectory.cache == "prefix"
        self._base = base
        self._wanted: dict[int, list[int]] = {}
        for step, token in sorted(set(wanted)):
            self._wanted.setdefault(self._state(step), []).append(token)
        self.tokens = text_tokens(forward)
        self._image_at = image_positions(forward)
        layout, answer = forward.request.layout, range(forward.trajectory.tokens.shape[1])
        self._length = layout.prefix_length + len(answer)
        queries = [forward.adapter.query_position(layout, t) for t in answer]
        prompt = self.tokens.positions[: self.tokens.prompt]
        self._text_at = torch.cat((prompt, torch.tensor(queries)))
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
            self._keep_maps(0, self._prefix())
        else:
            self._text_states(step)

    def _text_states(self, step: int) -> Tensor:
        """(K, D) hidden states of the text tokens; without a cache of the whole pass."""
        if step in self._text:
            return self._text[step]
        found = self._reading.step(step)[1][self._block]
        if self._shared:
            twins = self._adapter.step_blocks
            parts = found if twins else found[-1:]
            hidden = torch.cat((self._prefix(), *(h[0] for h in parts)))
            hidden = padded(hidden, self._length) if twins else hidden
        else:
            hidden = found[-1][0]
            check_whole(len(hidden), self._length)
            self._keep_maps(step, hidden)
        self._text[step] = hidden[self._text_at.to(hidden.device)]
        return self._text[step]

    def _prefix(self) -> Tensor:
        """The block's output (P, D) in the prefill."""
        return self._reading.prefix()[1][self._block][-1][0]

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
    the score's one step where it reads all tokens at the same. Given tokens of an answer with
    holes, which no step committed, are not read at ``commit``: 0 stands there.
    """
    trajectory = task.forward.trajectory
    positions = range(trajectory.tokens.shape[1])
    skipped = {p for p in positions if task.score == "commit" and trajectory.gave(0, p)}
    answer = [0 if p in skipped else task.step(p) for p in positions]
    prompt = len(prompt_dialogue(task.forward))
    return [0 if task.score == "commit" else answer[0]] * prompt + answer


def context_of(task: AttributionTask, position: int, order: str) -> Tensor:
    r"""Which of the K text tokens are context of a response position.

    The prompt's dialogue, and the answer tokens before the position: committed at an earlier step
    (``commit``, for models that denoise), or further to the left (``position``, for autoregressive
    ones). The chat template's own text is no context: TAM's authors take what lies between the
    image and the end of the turn. In a conversation their marks span everything from the first
    image to the end of the last turn; here it is what users and assistants said in all turns,
    without roles, marks and later images, wherever images lie. Stop tokens never are context: in
    an autoregressive answer nothing follows them. Nor are given tokens of an answer with holes,
    which have no step of their own to be read at.

    Returns:
        Tensor: (C,) int64, indices into :func:`captum_dcam.model.sequence.text_tokens`.
    """
    trajectory = task.forward.trajectory
    rank = trajectory.commit_step[0].cpu()
    if order == "position":
        rank = torch.arange(len(rank))
    stops = torch.tensor(sorted(task.forward.adapter.stop_ids), dtype=torch.long)
    answer = (rank < rank[position]) & ~torch.isin(trajectory.tokens[0].cpu(), stops)
    if trajectory.given is not None:
        answer &= ~trajectory.given[0].cpu()
    return torch.cat((prompt_dialogue(task.forward), answer)).nonzero()[:, 0]


def reads(task: AttributionTask, order: str | None = None) -> set[tuple[int, int]]:
    """Every (step, token id) that a task's words need, with their context's if an order is
    given."""
    pairs = [pair for target in task.targets for pair in pairs_of(target)]
    wanted = {(task.step(p), token) for p, token in pairs}
    if order is not None:
        steps, ids = own_steps(task), text_tokens(task.forward).ids.tolist()
        context = {int(k) for p, _ in pairs for k in context_of(task, p, order)}
        wanted |= {(steps[k], ids[k]) for k in context}
    return wanted


# -- the method ----------------------------------------------------------------------------------


@entered(
    "logit_lens", "CAM / logit lens", "logit lens", "TAM, Li et al. 2025, Eq. 1", "1", text=True
)
class LogitLens(PerWord):
    r"""What the output head reads at image tokens (TAM Eq. 1; MSEA+ARC Eq. 2).

    The map is the logit of the word's token at every image token, signed; Eq. 1's positive part is
    the reader's. The relevance of text is the same logit at the text tokens: at a prompt token's
    own position, and for an answer token in the row that predicts it. A word of several tokens is
    the sum of theirs.

    TAM calls this Grad-CAM as well, and CAM. At the last hidden state *that predicts the token* the
    gradient of its logit is its row of the output head, so weighing the image tokens' channels with
    it gives this map, up to the final norm. Grad-CAM as it is defined, with gradients pooled over
    the *image* tokens, is zero at the last block: no path leads from them to the answer.

    Nothing trains a masked-diffusion model to predict anything at image tokens; how much the map
    says depends on the model.

    Args:
        block (int): whose output is read, from 0; negative counts from the end. Default: -1
    """

    block: int = -1

    def check(self, task: AttributionTask) -> None:
        super().check(task)
        check_block(task.forward.adapter, self.block)

    def reader(self, task: AttributionTask) -> Lens:
        return Lens(task.forward, reads(task), self.block)

    def word(self, task: AttributionTask, reader: Lens, target: Target) -> WordMaps:
        pairs = [(task.step(position), token) for position, token in pairs_of(target)]
        image = torch.stack([reader.image(*pair) for pair in pairs])
        text = torch.stack([reader.text(*pair) for pair in pairs])
        return split_grids(image.sum(0), task.forward), text.sum(0)
