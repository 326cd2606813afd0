r"""What to explain: a position, a word, several tokens, nouns, all, or a Captum tuple.

Flexible at the boundary, one strict form inside: a tuple of :class:`Target`.
"""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

from captum_dcam.checks import as_whole
from captum_dcam.errors import InfeasibleStepError, InputError, TargetError
from captum_dcam.model.adapter import Adapter
from captum_dcam.model.segmentation import Span, Spelled, folded, spelled
from captum_dcam.model.tagging import (
    DEFAULT_LEMMATIZER,
    DEFAULT_TAGGER,
    LEMMATIZERS,
    NOUN_TAGS,
    tag,
)
from captum_dcam.model.trajectory import Score, Trajectory

#: tags of the function words whose repetition SICD removes
FUNCTION_TAGS = frozenset(("DT", "IN", "CC", "TO", "EX", "PRP", "PRP$", "MD", "WDT", "WP", "RP"))
#: tags of words that no pixel shows (TAM, Supp. E), without IN and CD, which tell where and how
#: many: another set than :data:`FUNCTION_TAGS`, SICD's
FUNCTION_WORD_TAGS = frozenset(
    ("CC", "DT", "EX", "MD", "POS", "PRP", "PRP$", "UH", "WDT", "WP", "WP$", "WRB")
)

#: strings that ask for words without naming one
GROUPS = ("all", "nouns")
#: what callers may pass as ``words``
WordsLike = str | int | tuple[int, int] | Sequence["str | int | tuple[int, int] | Target"] | None


@dataclass(frozen=True)
class Target:
    r"""Tokens of one answer that are explained together: the sum of their logits (Eq. 2).

    Args:
        text (str): how it reads.
        positions (tuple of int): response positions.
        token_ids (tuple of int): the token at each position whose logit counts.
        foil_ids (tuple of int, optional): the token at each position whose logit is subtracted:
            why this word and not that one, see :mod:`captum_dcam.model.foils`. Default: none
    """

    text: str
    positions: tuple[int, ...]
    token_ids: tuple[int, ...]
    foil_ids: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        for name in ("positions", "token_ids", "foil_ids"):
            given = getattr(self, name)
            if name == "foil_ids" and given is None:
                continue
            if isinstance(given, str) or not isinstance(given, Sequence):
                raise TargetError(f"{name} of {self.text!r} are {given!r}: expected integers")
            found = tuple(as_whole(value) for value in given)
            if None in found:
                raise TargetError(f"{name} of {self.text!r} are {given!r}: expected integers")
            object.__setattr__(self, name, found)
        if self.foil_ids is not None and len(self.foil_ids) != len(self.token_ids):
            raise TargetError(
                f"{self.text!r} has {len(self.token_ids)} token ids and {len(self.foil_ids)} foil "
                "ids: expected one foil id for each"
            )
        if self.foil_ids is not None and self.foil_ids == self.token_ids:
            raise TargetError(f"the foil of {self.text!r} is the word itself: give other ids")

    @property
    def foils(self) -> tuple[int | None, ...]:
        """The foil's token at each position, None without one."""
        return (None,) * len(self.token_ids) if self.foil_ids is None else self.foil_ids

    @property
    def terms(self) -> tuple[tuple[int, int, int], ...]:
        """(position, token id, sign) of every logit of the sum: a foil's count negatively. Where
        word and foil have the same token nothing is left of the two."""
        every = zip(self.positions, self.token_ids, self.foils, strict=True)
        out: list[tuple[int, int, int]] = []
        for position, token, foil in every:
            if foil is None:
                out.append((position, token, 1))
            elif foil != token:
                out += [(position, token, 1), (position, foil, -1)]
        return tuple(out)

    @property
    def parts(self) -> tuple[Target, ...]:
        """Its tokens one by one, each with its foil, without those that are the foil's own."""
        every = zip(self.positions, self.token_ids, self.foils, strict=True)
        return tuple(
            Target(self.text, (p,), (t,), None if foil is None else (foil,))
            for p, t, foil in every
            if t != foil
        )


def least_sure(probabilities: Sequence[float], target: Target) -> float:
    """Of the probabilities of an answer's T tokens, a word's: that of its least sure token."""
    return min(float(probabilities[p]) for p in target.positions)


def answer_token_texts(adapter: Adapter, tokens: Sequence[int]) -> tuple[str, ...]:
    """Text of every token of an answer, empty for stop tokens."""
    texts, stop = adapter.token_texts(tokens), adapter.stop_ids
    return tuple("" if t in stop else p for t, p in zip(tokens, texts, strict=True))


def answer_text(adapter: Adapter, tokens: Sequence[int]) -> str:
    """The answer as one reads it."""
    return "".join(answer_token_texts(adapter, tokens)).strip()


def words_of(adapter: Adapter, tokens: Sequence[int]) -> tuple[Target, ...]:
    """The answer's words in order, as :mod:`captum_dcam.model.segmentation` finds them in its text,
    with the tokens that each overlaps. A token that ends the answer ends a word, and is part of
    none."""
    return _words(tokens, _spelled(adapter, tokens))


def located_words(
    adapter: Adapter, tokens: Sequence[int]
) -> tuple[str, tuple[tuple[Span, Target], ...]]:
    """The answer's text, and its words as :func:`words_of` gives them, each with the characters of
    the text, (start, stop), that it is."""
    answer = _spelled(adapter, tokens)
    return answer.text, tuple(zip(answer.words, _words(tokens, answer), strict=True))


def _spelled(adapter: Adapter, tokens: Sequence[int]) -> Spelled:
    """The answer's text, and the tokens behind every character."""
    stop = adapter.stop_ids
    pairs = zip(tokens, adapter.token_texts(tokens), strict=True)
    texts = [None if token in stop else text for token, text in pairs]

    def whole(first: int, end: int) -> int:
        text = adapter.token_texts(tokens[first:end])[-1]
        return len(text.rstrip("\N{REPLACEMENT CHARACTER}"))

    return spelled(texts, whole)


def _words(tokens: Sequence[int], answer: Spelled) -> tuple[Target, ...]:
    return tuple(_target(tokens, answer, span) for span in answer.words)


def _target(tokens: Sequence[int], answer: Spelled, span: Span, text: str | None = None) -> Target:
    positions = answer.tokens(span)
    ids = tuple(int(tokens[p]) for p in positions)
    return Target(answer.text[slice(*span)] if text is None else text, positions, ids)


def asked(
    adapter: Adapter,
    trajectory: Trajectory,
    example: int,
    words: WordsLike,
    tagger: str = DEFAULT_TAGGER,
    score: Score = "commit",
) -> tuple[Target, ...]:
    r"""What a caller wants explained of one example of a generation, see :func:`resolve`. Of an
    answer with holes every word, or every noun, is every one that the model filled.

    Raises:
        TargetError: as :func:`resolve`; nothing that was filled is a word.
        InfeasibleStepError: a given word at its commit: it has none.
    """
    tokens = trajectory.tokens[example].tolist()
    found = resolve(adapter, tokens, words, tagger)
    found = settled(trajectory, example, found, words, score)
    if trajectory.given is None:
        return found
    free = {p for p, own in enumerate(trajectory.given[example].tolist()) if not own}
    if words is None or words in ("all", "nouns"):
        own = [_only(target, free) for target in found if free.intersection(target.positions)]
        if not own:
            raise TargetError(
                f"none of the {'nouns' if words == 'nouns' else 'words'} of "
                f"{answer_text(adapter, tokens)!r} was filled by the model: name what to explain"
            )
        return tuple(own)
    for target in found:
        if score == "commit" and not free.issuperset(target.positions):
            raise InfeasibleStepError(
                f"{target.text!r} was given, so no step committed it: explain words that were "
                "filled, or choose a state that it is read at, score='final', 'teacher' or a "
                f"step's number; or explain answer={answer_text(adapter, tokens)!r}, in which each "
                "word is read with all others visible"
            )
    return found


def _only(target: Target, places: Collection[int]) -> Target:
    """A word without its tokens elsewhere."""
    pairs = zip(target.positions, target.token_ids, strict=True)
    positions, ids = zip(*((p, i) for p, i in pairs if p in places), strict=True)
    return Target(target.text, positions, ids)


def resolve(
    adapter: Adapter, tokens: Sequence[int], words: WordsLike, tagger: str = DEFAULT_TAGGER
) -> tuple[Target, ...]:
    r"""Turn what a caller wrote into targets.

    Args:
        adapter (Adapter): knows the tokens' text.
        tokens (sequence of int): the answer's ids, length T.
        words: ``None`` or ``"all"``: every word; ``"nouns"``: nouns by the tagger; any other
            string: one or several words in a row, or else any part of the answer's text, which
            means the tokens that it overlaps; every occurrence is a target of its own; an
            int: a position; a pair: Captum's ``(position, token_id)``; or a sequence of these.
        tagger (str, optional): who says what a noun is, see
            :func:`captum_dcam.model.tagging.tag`. Default: ``"phrases"``

    Raises:
        TargetError: the answer has no word, or does not contain what was asked for (lists its
            words).
    """
    answer = _spelled(adapter, tokens)
    found = _words(tokens, answer)
    if words is None or words == "all":
        if not found:
            raise TargetError(f"there is no word to explain: {_wordless(answer)}")
        return found
    if isinstance(words, str) and words == "nouns":
        if not found:
            raise TargetError(f"there is no noun to explain: {_wordless(answer)}")
        return nouns(found, tagger)
    if isinstance(words, tuple) and len(words) == 2 and None not in map(as_whole, words):
        return (_pair(adapter, tokens, words),)
    if isinstance(words, str | Target) or as_whole(words) is not None:
        words = [words]  # type: ignore[list-item]
    if not isinstance(words, Sequence) or not words:
        raise TargetError(
            f"words is {words!r}: expected words, positions or pairs (position, token_id), 'all', "
            "'nouns', or None for every word"
        )
    out: list[Target] = []
    for word in words:
        position = as_whole(word)
        if isinstance(word, Target):
            for position_, token, _sign in word.terms:
                _pair(adapter, tokens, (position_, token))
            out.append(word)
        elif isinstance(word, str):
            out.extend(_occurrences(tokens, answer, found, word))
        elif position is not None:
            _check_position(position, tokens)
            out.append(_pair(adapter, tokens, (position, int(tokens[position]))))
        elif isinstance(word, tuple):
            out.append(_pair(adapter, tokens, word))
        else:
            raise TargetError(
                f"target {word!r} is a {type(word).__name__}: expected a word, a position, or "
                "(position, token_id)"
            )
    return tuple(out)


def settled(
    trajectory: Trajectory,
    example: int,
    targets: tuple[Target, ...],
    asked: WordsLike,
    score: Score,
) -> tuple[Target, ...]:
    r"""The targets of an answer that a decoder has edited, less the words that never settled.

    They are left out, with a warning that names them, where ``asked`` named no single word; the
    ``commit`` of one that was named is refused where it is read, see
    :meth:`~captum_dcam.model.trajectory.Trajectory.step_of`.

    Raises:
        TargetError: no word settled.
    """
    if score != "commit" or not (asked is None or (isinstance(asked, str) and asked in GROUPS)):
        return targets
    kept = tuple(t for t in targets if trajectory.settled(example, t.positions))
    if len(kept) < len(targets):
        others = _listed([t for t in targets if t not in kept])
        what = f"words that the last step still edited have no commit: {others}; score='final'"
        if not kept:
            raise TargetError(f"there is no word to explain: {what} reads them all the same")
        warnings.warn(f"left out, as {what} explains them too", stacklevel=3)
    return kept


def _check_position(position: int, tokens: Sequence[int]) -> None:
    if not 0 <= position < len(tokens):
        raise TargetError(
            f"token index {position} is out of range: the answer has {len(tokens)} positions, "
            f"0 to {len(tokens) - 1}"
        )


def _pair(adapter: Adapter, tokens: Sequence[int], pair: tuple) -> Target:
    found = [as_whole(value) for value in pair]
    if len(found) != 2 or found[0] is None or found[1] is None:
        raise TargetError(f"target {pair!r} is not (position, token_id): two integers are expected")
    position, token = found[0], found[1]
    _check_position(position, tokens)
    if not 0 <= token < adapter.vocabulary:
        raise TargetError(
            f"token id {token} is out of range: the model has {adapter.vocabulary}, 0 to "
            f"{adapter.vocabulary - 1}"
        )
    return Target(adapter.token_texts([token])[0].strip(), (position,), (token,))


def _occurrences(
    tokens: Sequence[int], answer: Spelled, found: tuple[Target, ...], phrase: str
) -> list[Target]:
    """Words in a row; where there are none, the tokens that this part of the text overlaps."""
    wanted = [folded(w) for w in phrase.split()]
    texts = [folded(w.text) for w in found]
    hits = [i for i in range(len(texts)) if wanted and texts[i : i + len(wanted)] == wanted]
    if hits:
        parts = [merge(phrase, found[i : i + len(wanted)]) for i in hits]
    else:
        parts = [_target(tokens, answer, span, phrase) for span in answer.find(phrase)]
    if not parts:
        has = f". Its words: {_listed(found)}" if found else f": {_wordless(answer)}"
        raise TargetError(f"word {phrase!r} is not in the answer{has}")
    return list(dict.fromkeys(parts))  # characters of one token are one target


def _wordless(answer: Spelled) -> str:
    """Why an answer has no word, and what to do."""
    if text := answer.text.strip():
        return f"the answer is {text!r}, without a letter or digit: ask for a part of it as it is"
    return "the answer is empty; ask something else, or give a longer gen_length"


def _listed(words: Sequence[Target]) -> str:
    return " ".join(w.text for w in words)


def merge(text: str, parts: Sequence[Target]) -> Target:
    """Several targets as one; a token that several of them have counts once."""
    pairs = [pair for part in parts for pair in zip(part.positions, part.token_ids, strict=True)]
    positions, ids = zip(*dict.fromkeys(pairs), strict=True)
    return Target(text, positions, ids)


def nouns(found: tuple[Target, ...], tagger: str = DEFAULT_TAGGER) -> tuple[Target, ...]:
    """Words that the tagger calls nouns."""
    tags = tag([w.text for w in found], tagger)
    chosen = tuple(w for w, t in zip(found, tags, strict=True) if t in NOUN_TAGS)
    if not chosen:
        raise TargetError(
            f"no noun in the answer (tagger {tagger!r}, which knows English): name its words, or "
            f"take all. They are: {_listed(found)}"
        )
    return chosen


def repeated_function_words(
    found: tuple[Target, ...], tagger: str = DEFAULT_TAGGER
) -> tuple[Target, ...]:
    """Occurrences of function words that the answer holds more than once (for SICD)."""
    tags = tag([w.text for w in found], tagger)
    counts = Counter(w.text.lower() for w in found)
    return tuple(
        w
        for w, t in zip(found, tags, strict=True)
        if t in FUNCTION_TAGS and counts[w.text.lower()] > 1
    )


@dataclass(frozen=True)
class WordMatch:
    r"""Words that name a masked object.

    Args:
        words (tuple of int): indices of consecutive words, as many as the name has.
        masks (tuple of int): indices of all masks of that name (its instances).
        name (str): of the masks.
    """

    words: tuple[int, ...]
    masks: tuple[int, ...]
    name: str


@dataclass(frozen=True)
class WordMatches:
    """The result of :func:`match_words_to_masks`, and the name of the lemmatizer that it used."""

    matches: tuple[WordMatch, ...]
    lemmatizer: str


def match_words_to_masks(
    words: Sequence[str],
    tags: Sequence[str],
    names: Sequence[str],
    lemmatizer: str = DEFAULT_LEMMATIZER,
) -> WordMatches:
    r"""Which words name which masks: nouns whose lemma is that of a mask's name.

    A name of several words ("traffic light") needs all of them in a row. The longest name wins, and
    no word is used twice. Case does not matter. Two words are equal when the form or lemma of one
    is that of the other, because a lemmatizer may shorten a singular ("glass") as well.

    Args:
        words (sequence of str): of an answer, in order.
        tags (sequence of str): their Penn Treebank tags, see
            :func:`captum_dcam.model.tagging.tag`; the last word of a match must be a noun.
        names (sequence of str): one per mask; equal names are instances of one object.
        lemmatizer (str, optional): ``textblob``, whose rules ship with its package, or
            ``wordnet``, NLTK's with its data, the authors'. Default: ``"textblob"``

    Returns:
        WordMatches: in the order of the words.

    Raises:
        MissingPackageError: ``wordnet`` without its data; says how to get it.

    Source:
        TAM section 4.1 and Supp. E.
    """
    if len(words) != len(tags):
        raise InputError(f"{len(words)} words and {len(tags)} tags: expected one tag per word")
    lemma = LEMMATIZERS.get(lemmatizer)
    forms = [_forms(word, lemma) for word in words]
    wanted: dict[str, list[int]] = {}
    for index, name in enumerate(names):
        wanted.setdefault(" ".join(name.lower().split()), []).append(index)
    parts = {name: [_forms(part, lemma) for part in name.split()] for name in wanted if name}
    longest_first = sorted(parts, key=lambda name: -len(parts[name]))
    found: list[WordMatch] = []
    start = 0
    while start < len(words):
        for name in longest_first:
            end = start + len(parts[name])
            run = forms[start:end]
            if len(run) < len(parts[name]) or tags[end - 1] not in NOUN_TAGS:
                continue
            if all(a & b for a, b in zip(run, parts[name], strict=True)):
                found.append(WordMatch(tuple(range(start, end)), tuple(wanted[name]), name))
                start = end - 1
                break
        start += 1
    return WordMatches(tuple(found), lemmatizer)


def _forms(word: str, lemma: Callable[[str], str]) -> frozenset[str]:
    lower = word.lower()
    return frozenset((lower, str(lemma(lower))))
