r"""Why this word and not that one: texts that might stand in the places of words.

A word with a foil is explained by the difference of logits, token by token, each pair read where
the word's token is read.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from captum_dcam.errors import InputTypeError, TargetError
from captum_dcam.model.adapter import Adapter
from captum_dcam.model.segmentation import folded
from captum_dcam.model.words import Target

#: one foil for every word, or by word
FoilLike = str | Mapping[str, str] | None


def check_foil(foil: Any) -> None:
    """Raise for what is neither a text, nor texts by word, nor None."""
    texts = [*foil, *foil.values()] if isinstance(foil, Mapping) else [foil]
    if foil is None or (texts and all(isinstance(one, str) and one.strip() for one in texts)):
        return
    raise InputTypeError(
        f"foil is {foil!r}: expected a text to stand in the word's place, or texts by word, such "
        "as {'red': 'blue'}"
    )


def with_foils(
    adapter: Adapter, tokens: Sequence[int], targets: Sequence[Target], foil: FoilLike
) -> tuple[Target, ...]:
    r"""The targets, each with its foil.

    Args:
        adapter (Adapter): whose tokenizer splits a foil as it would in the word's place.
        tokens (sequence of int): the answer's ids, length T.
        targets (sequence of Target): N words of it.
        foil (str or dict): for all of them, or by word, whatever the case; a word that is not in
            the dict keeps what it had. None: all do

    Raises:
        TargetError: a foil that has not as many tokens as its word, is the word itself, or cannot
            be written with the vocabulary; one for a word that is not explained.
    """
    check_foil(foil)
    if foil is None:
        return tuple(targets)
    words = {folded(t.text) for t in targets}
    given = {folded(w): f for w, f in foil.items()} if isinstance(foil, Mapping) else None
    if strange := sorted((given or {}).keys() - words):
        explained = ", ".join(dict.fromkeys(t.text for t in targets))
        raise TargetError(
            f"foil for {strange[0]!r}, which is not explained; explained: {explained}"
        )
    texts = adapter.token_texts(tokens)
    out = []
    for target in targets:
        own = foil if given is None else given.get(folded(target.text))
        out.append(target if own is None else _with(adapter, texts, target, str(own)))
    return tuple(out)


def _with(adapter: Adapter, texts: Sequence[str], target: Target, foil: str) -> Target:
    """One target with its foil, in whose place the blank before it and what its last token holds
    behind it stand as they do around the word."""
    word = [texts[p] for p in target.positions]
    whole = "".join(word)
    before, found, behind = whole.partition(target.text)
    if not target.text or not found:
        before, behind = whole[: len(whole) - len(whole.lstrip())], ""
    wanted = before + foil.strip() + behind
    ids = adapter.encode(wanted)
    pieces = adapter.token_texts(ids)
    if "".join(pieces) != wanted:
        raise TargetError(
            f"the foil {foil!r} reads {''.join(pieces)!r} in the vocabulary of {adapter.family}: "
            "give a text that the model could have written in the word's place"
        )
    if len(ids) != len(word):
        raise TargetError(
            f"the foil {foil!r} has {len(ids)} tokens {pieces}, the word {target.text!r} has "
            f"{len(word)} {word}: logits are compared token by token, so give one of {len(word)}"
        )
    if tuple(ids) == target.token_ids:
        raise TargetError(f"the foil {foil!r} is the word itself: give another")
    return replace(target, foil_ids=tuple(ids))
