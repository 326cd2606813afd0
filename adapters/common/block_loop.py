r"""Decoding of block diffusion where it is a script of the authors and no part of the model.

SDAR's ``generate.py``, which several families have: a step commits tokens by their probability, or
from left to right.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from captum_dcam.adapters.common.block import BlockLog, left
from captum_dcam.adapters.common.settings import (
    TEMPERATURE,
    Setting,
    count,
    length,
    one_of,
    share,
)

STATIC, DYNAMIC, SEQUENTIAL = "low_confidence_static", "low_confidence_dynamic", "sequential"
#: settings of the loop
LOOP = {
    "gen_length": Setting(128, length, also="max_new_tokens"),
    "denoising_steps": Setting(None, count, also="steps"),
    **TEMPERATURE,
    "top_k": Setting(None, count),
    "top_p": Setting(1.0, share),
    "remasking_strategy": Setting(DYNAMIC, one_of(STATIC, DYNAMIC, SEQUENTIAL)),
    "confidence_threshold": Setting(0.9, share),
}
#: copies of what an answer ends with, at which the script stops
REPEATS = 20

#: ``run(number, ids, store)``: logits (1, n, V) of block ``number``, whose ids are (1, n) without
#: the prompt's tail
Run = Callable[[int, Tensor, bool], Tensor]


def written(log: BlockLog, run: Run, made: Mapping[str, Any], stops: frozenset[int]) -> Tensor:
    r"""Write block after block, and record it.

    Args:
        log (BlockLog): of the answer.
        run (callable): see :data:`Run`; where it stores, its logits are not read.
        made (mapping): checked settings, with ``denoising_steps``.
        stops (frozenset of int): ids that end the answer with their block.

    Returns:
        Tensor: (1, T) the answer.
    """
    steps, size, number = made["denoising_steps"], log.blocks.length, 0
    least = [size // steps + (step < size % steps) for step in range(steps)]
    while log.blocks.span(number)[0] < log.total:
        first, last = log.blocks.span(number)
        own = log.begun(number)
        for at_least in least:
            masked = own == log.mask_id
            if not bool(masked.any()):
                break
            log.step(number, own)
            logits = run(number, own, False)
            log.scored(logits)
            ids, sure = (x[:, first - last :] for x in chosen(logits, made))
            own = torch.where(transferred(masked, sure, at_least, made), ids, own)
        if bool((own == log.mask_id).any()):
            raise left(last)
        run(number, own, True)
        log.stored(number, own)
        said = log.canvas[0, :last].tolist()
        if repeated(said) or not stops.isdisjoint(said):
            break
        number += 1
    return log.canvas


def transferred(masked: Tensor, sure: Tensor, least: int, made: Mapping[str, Any]) -> Tensor:
    """(1, n) bool: where a step writes, ``least`` tokens or more. Where fewer are masked, visible
    ones are among them."""
    if made["remasking_strategy"] == SEQUENTIAL:
        at = int(masked[0].nonzero()[0])
        place = torch.arange(masked.shape[1], device=masked.device)[None]
        return (place >= at) & (place < at + least)
    sure = sure.where(masked, -torch.inf)
    high = sure > made["confidence_threshold"]
    if made["remasking_strategy"] == DYNAMIC and int(high.sum()) >= least:
        return high
    best = sure[0].topk(least).indices
    return torch.zeros_like(masked).index_fill(1, best, True)


def chosen(logits: Tensor, made: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
    """Tokens (1, n), and their probabilities before any of them was ruled out."""
    if made["temperature"] == 0:
        sure = logits.softmax(-1)
        ids = logits.argmax(-1)
        return ids, sure.gather(-1, ids[..., None])[..., 0]
    logits = logits[0] / made["temperature"]
    sure = logits.softmax(-1)
    if made["top_k"] is not None:
        least = logits.topk(made["top_k"]).values[:, -1:]
        logits = logits.masked_fill(logits < least, -torch.inf)
    if made["top_p"] < 1:
        ordered, order = logits.sort(descending=True)
        late = ordered.softmax(-1).cumsum(-1) > made["top_p"]
        late[:, 1:] = late[:, :-1].clone()  # the token that goes over it is kept
        late[:, 0] = False
        ruled_out = torch.zeros_like(late).scatter(-1, order, late)
        logits = logits.masked_fill(ruled_out, -torch.inf)
    drawn = torch.multinomial(logits.softmax(-1), 1)
    return drawn[None, :, 0], sure.gather(-1, drawn)[None, :, 0]


def repeated(ids: list[int]) -> bool:
    """Whether an answer ends in many copies of one piece."""
    for width in range(1, len(ids) // REPEATS + 1):
        end = ids[-width * REPEATS :]
        if end == end[:width] * REPEATS:
            return True
    return False
