r"""What to explain: a position, a word, several tokens, nouns, all, or a Captum tuple.

Flexible at the boundary, one strict form inside: a tuple of :class:`Target`.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass

from captum_dcam.errors import InputError, TargetError
from captum_dcam.model.adapter import Adapter

FUNCTION_TAGS = frozenset(("DT", "IN", "CC", "TO", "EX", "PRP", "PRP$", "MD", "WDT", "WP", "RP"))

#: what callers may pass as ``words``
WordsLike = str | int | tuple[int, int] | Sequence["str | int | tuple[int, int] | Target"] | None


@dataclass(frozen=True)
class Target:
    r"""Tokens of one answer that are explained together: the sum of their logits (Eq. 2).

    Args:
        text (str): how it reads.
        positions (tuple of int): response positions.
        token_ids (tuple of int): the token at each position whose logit counts.
    """

    text: str
    positions: tuple[int, ...]
    token_ids: tuple[int, ...]


def answer_token_texts(adapter: Adapter, tokens: Sequence[int]) -> tuple[str, ...]:
    """Text of every token of an answer, empty for stop tokens."""
    texts, stop = adapter.token_texts(tokens), adapter.stop_ids
    return tuple("" if t in stop else p for t, p in zip(tokens, texts, strict=True))


def answer_text(adapter: Adapter, tokens: Sequence[int]) -> str:
    """The answer as one reads it."""
    return "".join(answer_token_texts(adapter, tokens)).strip()


def words_of(adapter: Adapter, tokens: Sequence[int]) -> tuple[Target, ...]:
    """The answer's words in order. A token without a leading blank continues the word before it,
    unless that ends with a blank, a newline or a sign.

    Stop tokens end nothing and are never part of a word. Words without a letter or digit
    (punctuation) are left out.
    """
    token_texts = adapter.token_texts(tokens)
    groups: list[list[int]] = []
    for position, (token, text) in enumerate(zip(tokens, token_texts, strict=True)):
        if token in adapter.stop_ids:
            continue
        before = token_texts[position - 1] if groups and groups[-1][-1] == position - 1 else " "
        # a token in the middle of a character writes nothing
        open_end = before == "" or before[-1].isalnum()
        goes_on = text == "" or (not text[0].isspace() and text.strip().isalnum())
        if open_end and goes_on:
            groups[-1].append(position)
        else:
            groups.append([position])
    words = (
        Target(
            "".join(token_texts[p] for p in group).strip(),
            tuple(group),
            tuple(int(tokens[p]) for p in group),
        )
        for group in groups
    )
    return tuple(word for word in words if re.search(r"\w", word.text))


def resolve(adapter: Adapter, tokens: Sequence[int], words: WordsLike) -> tuple[Target, ...]:
    r"""Turn what a caller wrote into targets.

    Args:
        adapter (Adapter): knows the tokens' text.
        tokens (sequence of int): the answer's ids, length T.
        words: ``None`` or ``"all"``: every word; ``"nouns"``: nouns by the tagger; any other
            string: one or several words in a row, every occurrence a target of its own; an
            int: a position; a pair: Captum's ``(position, token_id)``; or a sequence of these.

    Raises:
        TargetError: the answer is empty, or does not contain what was asked for (lists its words).
    """
    found = words_of(adapter, tokens)
    if words is None or words == "all":
        if not found:
            raise TargetError(
                "the answer is empty: there is no word to explain; ask something else, or give a "
                "longer gen_length"
            )
        return found
    if isinstance(words, str) and words == "nouns":
        return nouns(found)
    if isinstance(words, tuple) and len(words) == 2 and all(isinstance(w, int) for w in words):
        return (_pair(adapter, tokens, words),)
    if isinstance(words, str | int | Target):
        words = [words]
    out: list[Target] = []
    for word in words:
        if isinstance(word, Target):
            for pair in zip(word.positions, word.token_ids, strict=True):
                _pair(adapter, tokens, pair)
            out.append(word)
        elif isinstance(word, str):
            out.extend(_occurrences(found, word))
        elif isinstance(word, int) and not isinstance(word, bool):
            _check_position(word, tokens)
            out.append(_pair(adapter, tokens, (word, int(tokens[word]))))
        elif isinstance(word, tuple):
            out.append(_pair(adapter, tokens, word))
        else:
            raise TargetError(
                f"target {word!r} is a {type(word).__name__}: expected a word, a position, or "
                "(position, token_id)"
            )
    return tuple(out)


def _check_position(position: int, tokens: Sequence[int]) -> None:
    if not 0 <= position < len(tokens):
        raise TargetError(
            f"token index {position} is out of range: the answer has {len(tokens)} positions, "
            f"0 to {len(tokens) - 1}"
        )


def _pair(adapter: Adapter, tokens: Sequence[int], pair: tuple) -> Target:
    if len(pair) != 2 or any(isinstance(v, bool) or not isinstance(v, int) for v in pair):
        raise TargetError(f"target {pair!r} is not (position, token_id): two integers are expected")
    position, token = pair
    _check_position(position, tokens)
    if not 0 <= token < adapter.vocabulary:
        raise TargetError(
            f"token id {token} is out of range: the model has {adapter.vocabulary}, 0 to "
            f"{adapter.vocabulary - 1}"
        )
    return Target(adapter.token_texts([token])[0].strip(), (position,), (token,))


def _occurrences(found: tuple[Target, ...], phrase: str) -> list[Target]:
    wanted = phrase.lower().split()
    texts = [w.text.lower() for w in found]
    hits = [i for i in range(len(texts)) if texts[i : i + len(wanted)] == wanted]
    if not wanted or not hits:
        raise TargetError(f"word {phrase!r} is not in the answer. Its words: {_listed(found)}")
    return [merge(phrase, found[i : i + len(wanted)]) for i in hits]


def _listed(words: Sequence[Target]) -> str:
    return " ".join(w.text for w in words) or "(none: the answer is empty)"


def merge(text: str, parts: Sequence[Target]) -> Target:
    """Several targets as one."""
    return Target(
        text,
        tuple(p for part in parts for p in part.positions),
        tuple(t for part in parts for t in part.token_ids),
    )


def nouns(found: tuple[Target, ...]) -> tuple[Target, ...]:
    """Words that the tagger calls nouns."""
    tags, tagger = tag([w.text for w in found])
    chosen = tuple(w for w, t in zip(found, tags, strict=True) if t.startswith("NN"))
    if not chosen:
        raise TargetError(f"no noun in the answer ({tagger} tags). Its words: {_listed(found)}")
    return chosen


def repeated_function_words(found: tuple[Target, ...]) -> tuple[Target, ...]:
    """Occurrences of function words that the answer holds more than once (for SICD)."""
    tags, _ = tag([w.text for w in found])
    counts = Counter(w.text.lower() for w in found)
    return tuple(
        w
        for w, t in zip(found, tags, strict=True)
        if t in FUNCTION_TAGS and counts[w.text.lower()] > 1
    )


def tag(words: Sequence[str]) -> tuple[list[str], str]:
    """Penn Treebank tags and the tagger's name.

    NLTK's perceptron tagger (the papers') where its data is installed; else TextBlob's lexicon,
    which ships with its package.
    """
    import nltk

    if _has_data("taggers/averaged_perceptron_tagger_eng"):
        return [t for _, t in nltk.pos_tag(list(words))], "nltk"
    from textblob.en import tag as lexicon

    # one tag per word, also where a token's text holds a line break or nothing
    line = " ".join("".join(w.split()) or "-" for w in words)
    return [t for _, t in lexicon(line, tokenize=False)], "textblob"


def _has_data(*resources: str) -> bool:
    """Whether NLTK finds one of its data files."""
    import nltk

    for resource in resources:
        with suppress(LookupError):
            nltk.data.find(resource)
            return True
    return False


#: Penn Treebank tags of words that are scored on masks (Supp. E)
OBJECT_WORD_TAGS = frozenset(("NN", "NNS", "NNP", "NNPS"))
#: tags of words that no pixel shows (Supp. E), without IN and CD, which tell where and how many.
#: (:data:`captum_dcam.model.words.FUNCTION_TAGS` is another set, that of SICD.)
FUNCTION_WORD_TAGS = frozenset(
    ("CC", "DT", "EX", "MD", "POS", "PRP", "PRP$", "UH", "WDT", "WP", "WP$", "WRB")
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
    words: Sequence[str], tags: Sequence[str], names: Sequence[str]
) -> WordMatches:
    r"""Which words name which masks: nouns whose lemma is that of a mask's name.

    A name of several words ("traffic light") needs all of them in a row. The longest name wins, and
    no word is used twice. Case does not matter. Two words are equal when the form or lemma of one
    is that of the other, because a lemmatizer may shorten a singular ("glass") as well.

    Args:
        words (sequence of str): of an answer, in order.
        tags (sequence of str): their Penn Treebank tags, see :func:`tag`; the last
            word of a match must have one of :data:`OBJECT_WORD_TAGS`.
        names (sequence of str): one per mask; equal names are instances of one object.

    Returns:
        WordMatches: in the order of the words, and ``"wordnet"`` (NLTK's lemmatizer, the
        authors', where its data is installed) or ``"textblob"`` (whose rules ship with it).

    Source:
        TAM section 4.1 and Supp. E.
    """
    if len(words) != len(tags):
        raise InputError(f"{len(words)} words and {len(tags)} tags: expected one tag per word")
    lemma, source = _lemmatizer()
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
            if len(run) < len(parts[name]) or tags[end - 1] not in OBJECT_WORD_TAGS:
                continue
            if all(a & b for a, b in zip(run, parts[name], strict=True)):
                found.append(WordMatch(tuple(range(start, end)), tuple(wanted[name]), name))
                start = end - 1
                break
        start += 1
    return WordMatches(tuple(found), source)


def _forms(word: str, lemma: Callable[[str], str]) -> frozenset[str]:
    lower = word.lower()
    return frozenset((lower, str(lemma(lower))))


def _lemmatizer() -> tuple[Callable[[str], str], str]:
    r"""NLTK's noun lemmatizer where WordNet is installed, else TextBlob's singular."""
    import nltk

    if _has_data("corpora/wordnet", "corpora/wordnet.zip"):
        return nltk.stem.WordNetLemmatizer().lemmatize, "wordnet"  # of nouns, by default
    from textblob.inflect import singularize

    return singularize, "textblob"
