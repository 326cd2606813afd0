r"""Token activation map: the logit lens without what context tokens explain, denoised."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from captum_dcam.errors import InputError
from captum_dcam.methods.attention import Attentions
from captum_dcam.methods.base import AttributionTask, MethodFacts, register_method
from captum_dcam.methods.causal import estimated_causal_inference, joint_min_max
from captum_dcam.methods.lens import ORDERS, Lens, PerWord, context_of, own_steps, reads
from captum_dcam.model.sequence import split_grids
from captum_dcam.model.words import Target
from captum_dcam.refine import rank_gaussian_filter

RELEVANCES = ("activation", "mean", "attention")


@dataclass(frozen=True)
class Reader:
    """A task, the lens on it, the step at which each text token's own map is read, and the
    attention weights if they are wanted."""

    task: AttributionTask
    lens: Lens
    steps: list[int]
    attentions: Attentions | None


@register_method("tam")
@dataclass(frozen=True)
class TokenActivationMap(PerWord):
    r"""TAM (Li et al. 2025, ICCV).

    The logit lens of the word (Eq. 1), minus what the maps of its context tokens explain of it
    (estimated causal inference, Eq. 2, 4, 5), brought to [0, 1] together with the relevance of the
    context tokens (Eq. 3), then the rank Gaussian filter (Eq. 6, 7): the order of the authors'
    code. So maps are not negative, and maps and text are on one scale. NaN in the text: a token
    that is no context, as the word itself.

    Every token's map is read at its own state, text relevance at the state of the word. In a model
    that denoises, "earlier" is a matter of steps (``order``). A word of several tokens is the sum
    of theirs before Eq. 3. (The authors keep tokens apart and score the best of a word.)

    Where the authors' code differs from the paper, the paper is followed: their map of the prompt's
    first token is that of the token predicted there, and their map of the answer's first token is
    that of the prompt's last.

    Args:
        relevance (str): weights of the context (Eq. 4): ``activation``, the word's positive logit
            at the context token; ``mean``, all alike; ``attention``, what the position that
            predicts the word pays to it, averaged over heads and blocks (one more pass a state;
            needs attention weights). The text shown is the activation always. Default:
            ``"activation"``
        order (str): ``commit`` (context: tokens committed at an earlier step) or ``position``
            (tokens to the left). The prompt always is. Default: ``"commit"``
        eci (bool): subtract the context. Default: True
        filter (int): odd window of the rank Gaussian filter; 0 for none. Default: 3
    """

    relevance: str = "activation"
    order: str = "commit"
    eci: bool = True
    filter: int = 3

    facts: ClassVar[MethodFacts] = MethodFacts(
        "TAM",
        "logit lens",
        "TAM, Li et al. 2025, Eq. 1–7",
        "1 (full cache: 1 a state)",
        (),
        text=True,
    )

    def __post_init__(self) -> None:
        if self.relevance not in RELEVANCES:
            raise InputError(f"relevance is {self.relevance!r}: expected one of {RELEVANCES}")
        check_order_and_filter(self.order, self.filter)

    def reader(self, task: AttributionTask) -> Reader:
        wanted = reads(task, self.order if self.eci else None)
        attentions = Attentions(task) if self.relevance == "attention" else None
        return Reader(task, Lens(task.forward, wanted), own_steps(task), attentions)

    def word(self, reader: Reader, target: Target) -> tuple[tuple[Tensor, ...], Tensor | None]:
        image, text = joint_min_max(*self.activation(reader, target))
        return filtered(split_grids(image, reader.task.forward), self.filter), text

    def activation(self, reader: Reader, target: Target) -> tuple[Tensor, Tensor]:
        r"""A word's activation before Eq. 3: image tokens (N,), and text tokens (K,) with NaN where
        they are no context."""
        pairs = zip(target.positions, target.token_ids, strict=True)
        parts = [self._token(reader, position, token) for position, token in pairs]
        image, text = (torch.stack(values) for values in zip(*parts, strict=True))
        absent = text.isnan().all(0)
        absent[[reader.lens.tokens.prompt + p for p in target.positions]] = True
        return image.sum(0), text.nansum(0).masked_fill(absent, float("nan"))

    def _token(self, reader: Reader, position: int, token: int) -> tuple[Tensor, Tensor]:
        task, lens = reader.task, reader.lens
        step = task.step(position)
        image, text = lens.image(step, token).relu(), lens.text(step, token).relu()
        context = context_of(task, position, self.order)
        if self.eci and len(context):
            ids = lens.tokens.ids[context]
            maps = [lens.image(reader.steps[k], int(i)) for k, i in zip(context, ids, strict=True)]
            weights = self._weights(reader, text, position)[context]
            image, _ = estimated_causal_inference(
                image, torch.stack(maps).relu(), weights, ids == token
            )
        shown = torch.full_like(text, float("nan"))
        shown[context] = text[context]
        return image, shown

    def _weights(self, reader: Reader, text: Tensor, position: int) -> Tensor:
        """(K,) relevance of all text tokens for the token at a response position."""
        if self.relevance == "mean":
            return torch.ones_like(text)
        if reader.attentions is None:
            return text
        blocks = range(len(reader.task.forward.adapter.blocks))
        row = reader.attentions.row(position, blocks).to(text.dtype)
        return row[reader.lens.tokens.positions]


def check_order_and_filter(order: str, window: int) -> None:
    """Settings that TAM and ARC share."""
    if order not in ORDERS:
        raise InputError(f"order is {order!r}: expected one of {ORDERS}")
    whole = isinstance(window, int) and not isinstance(window, bool)
    if not whole or window < 0 or (window and window % 2 == 0):
        raise InputError(f"filter is {window!r}: expected an odd window such as 3, or 0 for none")


def filtered(maps: tuple[Tensor, ...], window: int) -> tuple[Tensor, ...]:
    """The rank Gaussian filter (TAM Eq. 6, 7) on non-negative maps (h, w); window 0: none."""
    return tuple(rank_gaussian_filter(m, window) for m in maps) if window else maps


@dataclass(frozen=True)
class Candidate:
    """A token that the model might have written: its text, and its share among the candidates."""

    token: int
    text: str
    probability: float


def top_candidates(task: AttributionTask, position: int, k: int = 3) -> tuple[Candidate, ...]:
    r"""The k likeliest tokens of a response position, in the state that the score reads.

    Args:
        task (AttributionTask): its targets do not matter here.
        position (int): of the response.
        k (int, optional): how many; the probabilities are a softmax over these. Default: 3

    Returns:
        tuple of Candidate: likeliest first.
    """
    adapter = task.forward.adapter
    if not 1 <= k <= adapter.vocabulary:
        raise InputError(f"k is {k}: expected 1 to {adapter.vocabulary}, the vocabulary")
    with torch.no_grad():
        step = torch.tensor([task.step(position)])
        logits = task.forward.replay(torch.tensor([0]), step)[0, position].float()
    best = logits.topk(k)
    shares = best.values.softmax(0).tolist()
    ids = best.indices.tolist()
    return tuple(Candidate(*one) for one in zip(ids, adapter.token_texts(ids), shares, strict=True))
