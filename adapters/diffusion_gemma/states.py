r"""What the decoder is given before a step: ids, the number of the canvas, self-conditioning.

Ids (B, T) are the answer as far as it is finished, then the canvas, then a filler where nothing is
yet. Self-conditioning (B, C, D) are the words that the step before expected, zeros where there was
none.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

#: number of the canvas in the state that shows the whole answer: each is read
EVERY = -1


def states_of(
    canvases: Sequence[Tensor], signals: Sequence[Tensor], tokens: Tensor, filler: int
) -> tuple[Tensor, Tensor, Tensor]:
    r"""What the model is given before every step, over all canvases.

    Args:
        canvases (sequence of Tensor): ids (steps, B, C) of every canvas.
        signals (sequence of Tensor): self-conditioning (steps, B, C, D) of every canvas.
        tokens (Tensor): (B, T) of the finished answer.
        filler (int): id that stands where nothing is yet.

    Returns:
        tuple: ids (S, B, T), the answer as far as it is finished, then the canvas, then the filler;
        number (S, B) of the canvas; signals (S, B, C, D).
    """
    ids, numbers = [], []
    for number, steps in enumerate(canvases):
        count, batch, size = steps.shape
        whole = tokens.expand(count, *tokens.shape).clone()
        whole[:, :, number * size : (number + 1) * size] = steps
        whole[:, :, (number + 1) * size :] = filler
        ids.append(whole)
        numbers.append(torch.full((count, batch), number, device=tokens.device))
    return torch.cat(ids), torch.cat(numbers), torch.cat(list(signals))


def forced(
    tokens: Tensor, silence: Tensor, vocabulary: int, filler: int
) -> tuple[Tensor, Tensor, Tensor]:
    r"""States of a given answer (B, T), token t hidden in state t.

    Without a mask token a token is hidden as the family's sampler hides it: one drawn from the rest
    of the vocabulary stands in its place, the same at every call. The other tokens of its canvas
    and the canvases before it are visible.

    Args:
        tokens (Tensor): (B, T), whole canvases.
        silence (Tensor): (C, D) self-conditioning of a canvas's first step.
        vocabulary (int): ids to draw from.
        filler (int): id that stands where nothing is yet.
    """
    (batch, count), size = tokens.shape, len(silence)
    draws = torch.Generator().manual_seed(0)
    other = torch.randint(1, vocabulary, (count,), generator=draws).to(tokens.device)
    ids = tokens.expand(count, batch, count).clone()
    at = torch.arange(count, device=tokens.device)
    ids[at, :, at] = ((tokens + other) % vocabulary).T
    number = at // size
    ids[(number[:, None] < number)[:, None].expand_as(ids)] = filler
    return ids, number[:, None].expand(count, batch), silence.expand(count, batch, -1, -1)
