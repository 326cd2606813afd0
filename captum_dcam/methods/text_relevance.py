r"""Which tokens of the prompt and of the answer speak for a word, on the scale of its map."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from captum_dcam.errors import InputError
from captum_dcam.methods.base import AttributionTask
from captum_dcam.methods.tam import TokenActivationMap
from captum_dcam.model.forward import DenoisingForward, single
from captum_dcam.model.sequence import (
    TextTokens,
    hidden_states,
    image_positions,
    padded,
    prompt_dialogue,
    split_grids,
    text_tokens,
)
from captum_dcam.model.tap import wide
from captum_dcam.model.trajectory import Score
from captum_dcam.model.words import Target

WAYS = ("gradient", "activation")


@dataclass(frozen=True)
class TextRelevance:
    r"""Relevance of text tokens for N words.

    Args:
        tokens (TextTokens): the K tokens, the prompt's first.
        values (Tensor): (N, K) float32, signed; NaN: the word itself, what the chat template says,
            or (``activation``) a token that is no context.
        maps (tuple of Tensor): (N, h, w) float32, one per grid: the same quantity at image tokens.
    """

    tokens: TextTokens
    values: Tensor
    maps: tuple[Tensor, ...]

    def normalised(self) -> TextRelevance:
        """Image and text of every word divided by the largest absolute value of both: -1 to 1.

        Zero stays zero and signs stay, so that what hardly counts does not seem to. Values that
        are not negative and reach 0 become what TAM's Eq. 3 makes of them.
        """
        parts = (*(m.flatten(1) for m in self.maps), self.values.nan_to_num())
        peak = torch.cat(parts, dim=1).abs().amax(1)
        peak = peak.where(peak > 0, torch.ones_like(peak))
        maps = tuple(m / peak[:, None, None] for m in self.maps)
        return replace(self, values=self.values / peak[:, None], maps=maps)


def text_relevance(
    forward: DenoisingForward,
    targets: Sequence[Target],
    example: int = 0,
    *,
    score: Score | None = None,
    by: str = "gradient",
) -> TextRelevance:
    r"""Relevance of a bound generation's dialogue and answer for words of this answer.

    ``gradient``: gradient × activation at the tapped block's output, summed over channels, at every
    token: image, what the prompt itself says, and the whole answer. Later tokens count as well, as
    they do in a model that attends both ways; a position that is masked in the state that is read
    counts as what it is there, a mask. ``activation``: TAM's positive logits (Eq. 1) at the context
    tokens, beside its causal map before normalisation and filter.

    Args:
        forward (DenoisingForward): with a bound generation.
        targets (sequence of Target): N words; of several tokens: the sum of theirs.
        example (int, optional): of the batch. Default: 0
        score (str or int, optional): state that a token is read at. Default: the forward's own
        by (str, optional): ``gradient`` or ``activation``. Default: ``"gradient"``

    Returns:
        TextRelevance: raw values; :meth:`TextRelevance.normalised` brings them to [-1, 1].
    """
    if by not in WAYS:
        raise InputError(f"by is {by!r}: expected one of {WAYS}")
    one = single(forward, example)
    task = AttributionTask(one, tuple(targets), forward.score if score is None else score)
    tokens, image_at = text_tokens(one), image_positions(one)
    values = torch.zeros(len(targets), len(tokens))
    image = torch.zeros(len(targets), len(image_at))
    tam, reader = TokenActivationMap(), None
    if by == "activation":
        tam.check_foils(task.targets)
        reader = tam.reader(task)
    for n, target in enumerate(targets):
        if reader is not None:
            image[n], values[n] = tam.activation(task, reader, target)
            continue
        for step in dict.fromkeys(task.step(position) for position, *_ in target.terms):
            here = [term for term in target.terms if task.step(term[0]) == step]
            product = gradient_times_activation(one, step, here)
            image[n] += product[image_at]
            values[n] += product[tokens.positions]
        values[n, : tokens.prompt][~prompt_dialogue(one)] = float("nan")
        values[n, [tokens.prompt + p for p in target.positions]] = float("nan")
    return TextRelevance(tokens, values, split_grids(image, one))


def gradient_times_activation(
    forward: DenoisingForward, step: int, terms: Sequence[tuple[int, int, int]]
) -> Tensor:
    r"""Gradient × activation at the tapped block, summed over channels, of the logits read there.

    Args:
        forward (DenoisingForward): bound, batch 1.
        step (int): of the generation.
        terms (sequence): (position, token id, sign) of the logits that are added up.

    Returns:
        Tensor: (L,) float32 on the CPU: every token of the sequence.
    """
    leaves: list[Tensor] = []

    def leaf(hidden: Tensor, _block: int) -> Tensor:
        leaves.append(hidden.detach().requires_grad_())
        return leaves[-1]

    with torch.enable_grad():
        _, logits = hidden_states(forward, forward.layer, step, leaf)
        positions, ids, signs = zip(*terms, strict=True)
        own = logits[list(positions), list(ids)]
        total = (own * own.new_tensor(signs)).sum()
    gradients = torch.autograd.grad(total, leaves, materialize_grads=True)
    parts = zip(gradients, leaves, strict=True)
    found = torch.cat([(wide(g) * wide(h.detach()))[0].sum(-1) for g, h in parts]).float().cpu()
    length = forward.request.layout.prefix_length + logits.shape[0]
    return padded(found, length) if forward.adapter.step_blocks else found
