r"""What if the answer had said another word? Maps before and after, and how far they moved."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from captum_dcam.errors import InputError, TargetError
from captum_dcam.explaining import explain_generation
from captum_dcam.faithfulness.sanity import rank_correlation
from captum_dcam.metrics.otsu import otsu_region
from captum_dcam.model.adapter import Adapter
from captum_dcam.model.answers import AnswerLike, bind_answer, check_answer, force
from captum_dcam.model.forward import DenoisingForward
from captum_dcam.model.prompts import Pictures, Prompt, pictures_of
from captum_dcam.model.words import Target, WordsLike, resolve
from captum_dcam.presets import preset
from captum_dcam.results.edit import Edit
from captum_dcam.results.explanation import Explanation


def exchange_word(
    adapter: Adapter,
    image: Pictures,
    prompt: Prompt,
    word: str,
    other: str,
    words: WordsLike = None,
    *,
    answer: AnswerLike = None,
    layer: int | None = None,
    generator: torch.Generator | None = None,
    generation: dict[str, Any] | None = None,
    **how: Any,
) -> Edit:
    r"""Exchange a word of an answer, and explain both answers in the same way.

    Both are given answers (:func:`captum_dcam.model.answers.force`): every word is read with all
    others visible, so that nothing differs but the word.

    Args:
        adapter (Adapter), image, prompt: as in :func:`captum_dcam.explain`.
        word (str): what is exchanged; it stands in the answer once. A longer part of the text says
            which, where there are several.
        other (str): what stands there instead; of any number of tokens.
        words (optional): of the answer before, to explain in both, see
            :func:`captum_dcam.model.words.resolve`. Default: every word
        answer (str or sequence of int, optional): the answer before; ``[MASK]`` is filled first.
            Default: what the model writes
        layer (int, optional), **how: as in :func:`captum_dcam.explain_generation`.
        generator (torch.Generator, optional), generation (dict, optional): of decoding, where the
            model writes. Default: the family's settings

    Returns:
        Edit: both explanations, and how far each word's map moved.

    Raises:
        TargetError: the word is not in the answer, or several times; or the other has no token.
        InputError: they are the same.

    Examples::

        >>> from captum_dcam.data.scenes import make_scene
        >>> adapter, image = captum_dcam.load("mini"), make_scene(0, 3).image
        >>> found = exchange_word(
        ...     adapter, image, "describe the image .", "purple", "red", answer="a purple ring ."
        ... )
        >>> found.before.words, found.after.words, found.exchanged
        (('a', 'purple', 'ring'), ('a', 'red', 'ring'), (False, True, False))
        >>> bool((found.correlation <= 1).all())
        True
    """
    for name, text in (("word", word), ("other", other)):
        if not isinstance(text, str) or not text.strip():
            raise TargetError(f"{name} is {text!r}: expected a text")
    if word.split() == other.split():
        raise InputError(f"word and other are both {word!r}: give another word in its place")
    settings = generation or {}
    chosen = preset(how.get("preset", "default"))
    reading = chosen.reading(score=how.get("score"), tagger=how.get("tagger"))
    check_answer(answer, reading.score, generator, settings, adapter)
    images = pictures_of(image)
    forward = DenoisingForward(adapter, chosen.layer if layer is None else layer)
    request = adapter.prepare([images], [prompt])
    with forward.held():
        bind_answer(forward, request, answer, generator, settings)
        before = _said(forward)
        old = _place(adapter, before, word)
        first, end = old.positions[0], old.positions[-1] + 1
        blank = adapter.token_texts([before[first]])[0][:1].isspace()
        new = adapter.encode(f" {other.strip()}" if blank else other.strip())
        if not new:
            raise TargetError(f"other is {other!r}: {adapter.family} makes no token of it")
        after = [*before[:first], *new, *before[end:]]
        targets = resolve(adapter, before, words, reading.tagger)
        moved = [_moved(t, after, first, end, len(new), (word, other)) for t in targets]
        found = []
        for ids, own in ((before, list(targets)), (after, moved)):
            force(forward, ids, request)
            found.append(explain_generation(forward, own, **how))
    one, two = found
    exchanged = tuple(any(first <= p < end for p in t.positions) for t in targets)
    return Edit(one, two, exchanged, *_distances(one, two))


def _said(forward: DenoisingForward) -> list[int]:
    """Ids of the bound answer without the stop tokens at its end."""
    ids: list[int] = forward.trajectory.tokens[0].tolist()
    while ids and ids[-1] in forward.adapter.stop_ids:
        ids.pop()
    return ids


def _place(adapter: Adapter, ids: Sequence[int], word: str) -> Target:
    """Where the word stands, as whole tokens."""
    found = resolve(adapter, ids, word)
    if len(found) > 1:
        raise TargetError(
            f"{word!r} stands in the answer {len(found)} times: give more of the text around the "
            "one to exchange, such as two words in a row"
        )
    places = found[0].positions
    text = "".join(adapter.token_texts(ids)[places[0] : places[-1] + 1]).strip()
    if text.casefold().split() != word.casefold().split():
        raise TargetError(f"the tokens of {word!r} read {text!r}: exchange all of that")
    return found[0]


def _moved(
    target: Target, ids: Sequence[int], first: int, end: int, new: int, texts: tuple[str, str]
) -> Target:
    """A word of the answer before, in the answer after, whose tokens ``ids`` are."""
    places: list[int] = []
    for p in target.positions:
        if first <= p < end:
            places += [one for one in range(first, first + new) if one not in places]
        else:
            places.append(p if p < first else p + new - (end - first))
    inside = any(first <= p < end for p in target.positions)
    text = target.text.replace(*texts) if inside and texts[0] in target.text else target.text
    if inside and text == target.text:
        text = texts[1]  # a part of what was exchanged
    return Target(text, tuple(places), tuple(ids[p] for p in places))


def _distances(one: Explanation, other: Explanation) -> tuple[Tensor, Tensor, Tensor]:
    """Rank correlation, distance of peaks, and overlap of every word's two maps."""
    both = [torch.cat([m.flatten(1) for m in e.maps], 1).double() for e in (one, other)]
    regions = [otsu_region(rows[:, None])[:, 0] for rows in both]
    union = (regions[0] | regions[1]).sum(1)
    shared = (regions[0] & regions[1]).sum(1).double()
    overlap = torch.where(union > 0, shared / union.clamp_min(1), torch.ones_like(shared))
    apart = [_apart(_peak(one, n), _peak(other, n)) for n in range(len(both[0]))]
    return rank_correlation(*both), torch.tensor(apart, dtype=torch.float64), overlap


def _peak(explanation: Explanation, number: int) -> tuple[int, float, float, float] | None:
    """Image, x, y of a word's highest token, and the image's diagonal, in pixels."""
    grids = explanation.layout.grids
    best = max(range(len(grids)), key=lambda i: float(explanation.maps[i][number].max()))
    box = explanation.focus(number, best)["peak"]
    if box is None:
        return None
    height, width = grids[best].image_size
    diagonal = float((height**2 + width**2) ** 0.5)
    return grids[best].image, (box[0] + box[2]) / 2, (box[1] + box[3]) / 2, diagonal


def _apart(one: Any, other: Any) -> float:
    if one is None or other is None or one[0] != other[0]:
        return float("nan")
    return float(((one[1] - other[1]) ** 2 + (one[2] - other[2]) ** 2) ** 0.5 / one[3])
