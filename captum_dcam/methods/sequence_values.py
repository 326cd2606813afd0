r"""From values at every position of the sequence to a method's result."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from captum_dcam.errors import BudgetExhaustedError
from captum_dcam.methods.base import Attribution, AttributionTask
from captum_dcam.model.sequence import image_positions, split_grids, text_tokens


def sequence_length(task: AttributionTask) -> int:
    """L, tokens of the hooked sequence: the prefix and the answer."""
    forward = task.forward
    return forward.request.layout.prefix_length + forward.trajectory.tokens.shape[1]


def over_tokens(
    task: AttributionTask, values: Callable[[int, int], Tensor], text: bool = False
) -> Attribution:
    r"""Maps of words from values of their tokens; a word is the sum of its tokens (Eq. 2).

    Args:
        task (AttributionTask): whose targets are explained.
        values (callable): (position, token id) to the values (L,) of every position.
        text (bool, optional): also return the values of text tokens. Default: False

    Returns:
        Attribution: a budget that ends inside a word leaves the words before it.
    """
    forward = task.forward
    images = image_positions(forward)
    words = text_tokens(forward).positions if text else torch.zeros(0, dtype=torch.long)
    maps, relevance = task.empty(), torch.zeros(len(task.targets), len(words))
    done, note = torch.zeros(len(task.targets), dtype=torch.bool), ""
    for n, target in enumerate(task.targets):
        try:
            parts = [
                values(position, token).detach().float().cpu()
                for position, token in zip(target.positions, target.token_ids, strict=True)
            ]
        except BudgetExhaustedError as error:
            note = str(error)
            break
        total = torch.stack(parts).sum(0)
        for whole, own in zip(maps, split_grids(total[images], forward), strict=True):
            whole[n] = own
        relevance[n] = total[words]
        done[n] = True
    return Attribution(maps, done, relevance if text else None, note)
