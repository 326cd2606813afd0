r"""The words of a text by Unicode's rules, and the tokens behind its characters.

A word is what UAX #29 says (Unicode Text Segmentation, default word boundaries): letters, digits
and the signs between them, as in "don't" and "3.14". Hyphens join as well: "t-shirt". In scripts
that are written without blanks every Han character is a word, and every grapheme cluster of the
others: what is longer is asked for as a part of the text.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise

import regex

#: first and last + 1 character
Span = tuple[int, int]

#: stretches of scripts written without blanks (UAX #14 calls the class of Thai and its like SA)
_CLUSTERS = regex.compile(r"\X")
_NO_BLANKS = regex.compile(
    r"[\p{Han}\p{Hiragana}\p{Katakana}\p{Bopomofo}\p{Yi}\p{Line_Break=SA}\u30FC\uFF70]"
)
_BOUNDARIES = regex.compile(r"(?w)\b")
_WORDLIKE = regex.compile(r"[\p{L}\p{N}_]")
_HYPHENS = frozenset("-\u2010\u2011")
#: signs that people type for those that a model writes
_TYPED = str.maketrans({"\u2018": "'", "\u2019": "'", "\u02bc": "'", "\u2010": "-", "\u2011": "-"})


def word_spans(text: str) -> list[Span]:
    r"""Where the words of a text are; what has no letter or digit is no word.

    Examples::

        >>> text = "A cat's t-shirt, 猫猫!"
        >>> [text[a:b] for a, b in word_spans(text)]
        ['A', "cat's", 't-shirt', '猫', '猫']
    """
    found: list[Span] = []
    start = 0
    for cluster in _CLUSTERS.finditer(text):
        if _NO_BLANKS.match(cluster[0]):
            found += _spaced(text, start, cluster.start())
            found.append(cluster.span())
            start = cluster.end()
    found += _spaced(text, start, len(text))
    return [(a, b) for a, b in found if _WORDLIKE.search(text, a, b)]


def _spaced(text: str, start: int, end: int) -> list[Span]:
    """The segments of a stretch whose words stand between blanks, joined at hyphens."""
    part = text[start:end]
    cuts = sorted({0, len(part), *(m.start() for m in _BOUNDARIES.finditer(part))})
    out: list[Span] = []
    for a, b in pairwise(cuts):
        hyphen = a - 1
        joins = (
            len(out) > 1
            and out[-1] == (start + hyphen, start + a)
            and part[hyphen] in _HYPHENS
            and out[-2][1] == start + hyphen
            and _WORDLIKE.match(part[hyphen - 1])
            and _WORDLIKE.match(part[a])
        )
        if joins:
            out.pop()
            out[-1] = (out[-1][0], start + b)
        else:
            out.append((start + a, start + b))
    return out


def folded(text: str) -> str:
    """A text without the differences of case, composition and typed signs."""
    return unicodedata.normalize("NFC", text).translate(_TYPED).casefold()


@dataclass(frozen=True)
class Spelled:
    r"""A text and the tokens behind every character.

    Args:
        text (str): decoded.
        owners (tuple): for every character the positions of its tokens: several where it is split.
        ends (tuple of int): where a token that ends an answer stands in it: no word goes on there.
    """

    text: str
    owners: tuple[tuple[int, ...], ...]
    ends: tuple[int, ...] = ()

    def tokens(self, span: Span) -> tuple[int, ...]:
        """Positions of the tokens that a part of the text overlaps, in order."""
        return tuple(sorted({p for own in self.owners[slice(*span)] for p in own}))

    @cached_property
    def words(self) -> tuple[Span, ...]:
        """Where the words are."""
        cuts = sorted({0, *self.ends, len(self.text)})
        return tuple(
            (start + a, start + b)
            for start, end in pairwise(cuts)
            for a, b in word_spans(self.text[start:end])
        )

    def find(self, part: str) -> list[Span]:
        """Every place of a part of the text, whatever the case; blanks are one blank."""
        text, at = self._folded
        for form in ("NFC", "NFD"):
            wanted = " ".join(
                unicodedata.normalize(form, part).translate(_TYPED).casefold().split()
            )
            spans = [(at[i], at[i + len(wanted) - 1] + 1) for i in _places(text, wanted)]
            if spans:
                return spans
        return []

    @cached_property
    def _folded(self) -> tuple[str, list[int]]:
        """The text without differences of case and blanks, and where its characters come from."""
        out: list[str] = []
        at: list[int] = []
        for i, own in enumerate(self.text):
            plain = " " if own.isspace() else own.translate(_TYPED).casefold()
            if plain != " " or out[-1:] != [" "]:
                out += plain
                at += [i] * len(plain)
        return "".join(out), at


def _places(text: str, part: str) -> Iterator[int]:
    at = text.find(part) if part else -1
    while at >= 0:
        yield at
        at = text.find(part, at + len(part))


def spelled(
    token_texts: Sequence[str | None], whole: Callable[[int, int], int] = lambda _a, _b: 0
) -> Spelled:
    r"""Join the texts of tokens, and remember which token wrote what.

    Args:
        token_texts (sequence): text of every token; None where an answer ends; empty inside a
            character, whose text the token that completes it has.
        whole (callable, optional): (first, last + 1) of tokens that begin with one inside a
            character: the number of characters that they complete. Default: none
    """
    owners: list[list[int]] = []
    text = ""
    ends: list[int] = []
    open_: list[int] = []
    for position, own in enumerate(token_texts):
        if own is None:
            ends.append(len(text))
            open_ = []
        elif not own:
            open_.append(position)
        else:
            begin = len(text)
            text += own
            owners += [[] for _ in own]
            done = 0
            for p in open_:
                # the tail of a token's text may hold the first bytes of the next character
                after = min(whole(open_[0], p + 1), len(own) - 1) if len(own) > 1 else 0
                for i in range(done, after + 1):
                    owners[begin + i].append(p)
                done = after
            for i in range(done, len(own)):
                owners[begin + i].append(position)
            open_ = []
    return Spelled(text, tuple(map(tuple, owners)), tuple(ends))
