r"""The words of an answer that are measured, and the masks of what they name."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from captum_dcam.data.common import LABELS, Span
from captum_dcam.errors import InputError
from captum_dcam.model.forward import DenoisingForward
from captum_dcam.model.tagging import DEFAULT_TAGGER, NOUN_TAGS, tag
from captum_dcam.model.words import (
    FUNCTION_WORD_TAGS,
    Target,
    located_words,
    match_words_to_masks,
)

if TYPE_CHECKING:
    from captum_dcam.data import ObjectMask

#: the last word of a masked object's name; the words before it ("traffic"); nouns without a mask;
#: words that no pixel shows (TAM, Supp. E); the rest; and, where it is asked for, words of which
#: the data set knows whether they are so, whatever else they are
KINDS = ("object", "modifier", "noun", "function", "other", "labelled")


@dataclass(frozen=True)
class Word:
    r"""A word of an answer.

    Args:
        target (Target): its tokens.
        tag (str): Penn Treebank's, as the tagger gave it.
        kind (str): one of :data:`KINDS`.
        name (str or None): what it names, or helps to name.
        objects (tuple of str): the data set's objects of that name.
        phrase (int or None): words of one name share a number.
        label (str or None): of a labelled word: ``"true"`` or ``"invented"``.
        span (int or None): labelled words of one span share a number.
    """

    target: Target
    tag: str
    kind: str
    name: str | None = None
    objects: tuple[str, ...] = ()
    phrase: int | None = None
    label: str | None = None
    span: int | None = None


@dataclass(frozen=True)
class Answer:
    """All words of an answer, and whose tags and lemmas these are."""

    words: tuple[Word, ...]
    tagger: str
    lemmatizer: str


def read_answer(
    forward: DenoisingForward,
    objects: Sequence[ObjectMask],
    judge: Callable[[str], Sequence[Span]] | None = None,
) -> Answer:
    r"""Tag the words of the bound answer (one example) and find what they name.

    A word that ends a name of several words counts as a noun whatever its tag. ``judge`` says which
    parts of the answer's text are true and which are invented.
    """
    text, located = located_words(forward.adapter, forward.trajectory.tokens[0].tolist())
    found = [word for _, word in located]
    texts = [w.text for w in found]
    tags = tag(texts)
    owners = [(name, item.name) for item in objects for name in dict.fromkeys(item.names)]
    names = [name for name, _ in owners]
    phrases = [name for name in names if len(name.split()) > 1]
    heads = {m.words[-1] for m in match_words_to_masks(texts, ["NN"] * len(texts), phrases).matches}
    nouns = ["NN" if i in heads else t for i, t in enumerate(tags)]
    matched = match_words_to_masks(texts, nouns, names)
    kinds = dict.fromkeys(NOUN_TAGS, "noun") | dict.fromkeys(FUNCTION_WORD_TAGS, "function")
    words = [Word(w, t, kinds.get(t, "other")) for w, t in zip(found, tags, strict=True)]
    for number, match in enumerate(matched.matches):
        own = tuple(dict.fromkeys(owners[i][1] for i in match.masks))
        for i in match.words:
            kind = "object" if i == match.words[-1] else "modifier"
            words[i] = Word(found[i], tags[i], kind, match.name, own, number)
    spans = () if judge is None else judge(text)
    # where spans overlap, a word of an invented one is not true by another
    order = sorted(range(len(spans)), key=lambda n: spans[n].label != LABELS[1])
    for i, ((start, stop), word) in enumerate(located):
        own_span = next((n for n in order if spans[n].start < stop and start < spans[n].stop), None)
        if own_span is not None:
            label = spans[own_span].label
            words[i] = Word(word, tags[i], "labelled", label=label, span=own_span)
    return Answer(tuple(words), DEFAULT_TAGGER, matched.lemmatizer)


def read_masks(
    words: Collection[Word], objects: Sequence[ObjectMask], size: tuple[int, int]
) -> dict[str, Tensor]:
    r"""Masks (H, W) bool of the objects that words name; the others stay unread.

    Raises:
        ValueError: a mask that is not boolean or of another size than the image.
        OSError, ValueError: whatever reading it raises.
    """
    named = {name for word in words for name in word.objects}
    out = {}
    for item in objects:
        if item.name in named:
            mask = np.asarray(item.mask())
            if mask.dtype != bool or mask.shape != size:
                raise InputError(
                    f"the mask of {item.name!r} is {mask.dtype} {mask.shape}: expected bool "
                    f"{size}, the image's height and width"
                )
            out[item.name] = torch.from_numpy(np.ascontiguousarray(mask))
    return out


def stacked(words: Sequence[Word], masks: dict[str, Tensor]) -> Tensor:
    """(N, C, H, W) masks of N words that name objects; words with fewer get empty ones."""
    rows = [torch.stack([masks[name] for name in w.objects]) for w in words]
    return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
