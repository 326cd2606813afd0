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
from captum_dcam.model.gradients import TargetGradients, mapped_gradients
from captum_dcam.model.sequence import (
    TextTokens,
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
            (``activation``) a token that is no context, or (``gradient``) answer tokens of a
            decoder that caches parts of its own answer.
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
    if by == "gradient":
        found = GradientText(task)
        if targets:
            mapped_gradients(
                one,
                task.targets,
                [0] * len(targets),
                [task.score] * len(targets),
                found.add,
                backward=task.backward,
                tokens=True,
            )
        return found.found()
    tokens, image_at = text_tokens(one), image_positions(one)
    values = torch.zeros(len(targets), len(tokens))
    image = torch.zeros(len(targets), len(image_at))
    tam = TokenActivationMap()
    tam.check_foils(task.targets)
    reader = tam.reader(task)
    for n, target in enumerate(targets):
        image[n], values[n] = tam.activation(task, reader, target)
    return TextRelevance(tokens, values, split_grids(image, one))


class GradientText:
    r"""Relevance by gradient × activation, from the rows of gradients that maps of words take.

    Args:
        task (AttributionTask): of the words that the rows are of.
    """

    def __init__(self, task: AttributionTask) -> None:
        count = len(task.targets)
        self._task, self._rows = task, torch.zeros(count, task.length)
        self._maps = tuple(torch.zeros(count, *shape) for shape in task.shapes)

    def add(self, row: TargetGradients) -> None:
        """Take a row, which must have the gradients of its tokens."""
        assert row.tokens is not None
        self._rows[row.target] += padded(row.tokens, self._task.length)
        for whole, f, g in zip(self._maps, row.features, row.gradients, strict=True):
            whole[row.target] += (wide(g) * wide(f)).sum(0).float().cpu()

    def found(self) -> TextRelevance:
        """What all rows together give."""
        tokens = text_tokens(self._task.forward)
        values = _without_itself(self._rows[:, tokens.positions], tokens, self._task)
        return TextRelevance(tokens, values, self._maps)


def _without_itself(values: Tensor, tokens: TextTokens, task: AttributionTask) -> Tensor:
    """Values (N, K) with NaN at each word itself, and at what the chat template says."""
    values[:, : tokens.prompt][:, ~prompt_dialogue(task.forward)] = float("nan")
    for n, target in enumerate(task.targets):
        values[n, [tokens.prompt + p for p in target.positions]] = float("nan")
    return values
