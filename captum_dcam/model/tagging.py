r"""Parts of speech and lemmas of an answer's words: the same on every machine, NLTK's by choice.

The default tagger is TextBlob's lexicon, which ships with its package, and the words of the
embedded model, corrected by what a phrase of a description must hold. NLTK's perceptron tagger,
which the papers use, needs data that no package ships. Both know English alone.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import lru_cache
from threading import Lock
from typing import Any

import regex

from captum_dcam.errors import MissingPackageError
from captum_dcam.registry import Registry

#: Penn Treebank tags of nouns: words that are scored on masks (TAM, Supp. E)
NOUN_TAGS = frozenset(("NN", "NNS", "NNP", "NNPS"))
#: what a word is tagged that is not in Latin letters
FOREIGN = "FW"

TAGGERS: Registry[Callable[[list[str]], list[str]]] = Registry("tagger", given=1)
LEMMATIZERS: Registry[Callable[[], Callable[[str], str]]] = Registry("lemmatizer")
DEFAULT_TAGGER, DEFAULT_LEMMATIZER = "phrases", "textblob"


def tag(words: Sequence[str], tagger: str = DEFAULT_TAGGER) -> list[str]:
    r"""Penn Treebank tags of the words of an answer.

    Args:
        words (sequence of str): in order; punctuation may be left out.
        tagger (str, optional): ``phrases``, or ``nltk`` where its data is installed.
            Default: ``"phrases"``

    Returns:
        list of str: one tag per word; ``FW`` for a word in other letters than Latin ones.

    Raises:
        UnknownNameError: no such tagger.
        MissingPackageError: ``nltk`` without its data; says how to get it.

    Examples::

        >>> tag("a green cross beside the stop sign".split())
        ['DT', 'JJ', 'NN', 'IN', 'DT', 'NN', 'NN']
    """
    if not words:
        TAGGERS.check(tagger, {})
        return []
    # no word is empty or holds a blank: a tagger would drop or split it
    tags = TAGGERS[tagger](["".join(w.split()) or "-" for w in words])
    return [FOREIGN if _foreign(w) else t for w, t in zip(words, tags, strict=True)]


def check_tagger(name: str) -> None:
    """Raise as :func:`tag` where a tagger cannot run here."""
    tag(["a"], name)


def first_tagger(names: Sequence[str]) -> str:
    """The first of these taggers that can run here, or else the default."""
    for name in names:
        with suppress(MissingPackageError):
            check_tagger(name)
            return name
    return DEFAULT_TAGGER


def _foreign(word: str) -> bool:
    return bool(regex.search(r"[^\W\d_\p{Latin}]", word))


# -- NLTK's ----------------------------------------------------------------------------------------


@TAGGERS.register("nltk")
def perceptron(words: list[str]) -> list[str]:
    """NLTK's averaged perceptron, the papers'."""
    return [tag for _, tag in _perceptron().tag(words)]


@lru_cache(maxsize=1)
def _perceptron() -> Any:
    from nltk.tag.perceptron import PerceptronTagger

    found = _apart(PerceptronTagger)
    if found is None:
        raise MissingPackageError(
            "the data of NLTK's tagger is not installed: python -m nltk.downloader "
            f"averaged_perceptron_tagger_eng gets it; or leave the tagger at {DEFAULT_TAGGER!r}"
        )
    return found


def _apart(load: Callable[[], Any]) -> Any:
    """What ``load`` gives, or None where NLTK does not find its data.

    In a thread: the error that NLTK raises and catches there is part of a reference cycle, whose
    frames would keep all frames below them alive, and with them forwards and activations.
    """

    def found() -> Any:
        try:
            return load()
        except LookupError:
            return None

    with ThreadPoolExecutor(1) as pool:
        return pool.submit(found).result()


# -- the default -----------------------------------------------------------------------------------

#: what the embedded model can say: each of its words has one part of speech
_EMBEDDED = {
    "CC": "and",
    "CD": "zero one two three four five six",
    "DT": "a an the this no",
    "EX": "there",
    "IN": "of in with above below",
    "JJ": "red orange yellow green cyan blue purple pink many",
    "NN": "circle square triangle star cross ring heart moon color shape object image picture "
    "detail",
    "NNS": "circles squares triangles stars crosses rings hearts moons objects",
    "RB": "left right",
    "TO": "to",
    "UH": "yes",
    "VB": "describe list",
    "VBP": "are",
    "VBZ": "is",
    "WP": "what",
    "WRB": "how where",
}
EMBEDDED = {word: tag for tag, words in _EMBEDDED.items() for word in words.split()}
#: words that are adjectives wherever a noun follows them, and never verbs
COLORS = frozenset(
    "black white gray grey red orange yellow green cyan blue purple violet pink brown beige".split()
)
#: words behind which a noun phrase must end in a noun
OPENERS = frozenset("a an the every each another no".split())
#: of these, those whose noun is singular, unless it is a quantity
SINGULAR = frozenset("a an every each another".split())
QUANTITIES = frozenset("few many couple pair dozen bunch hundred thousand million".split())
#: places that are nouns behind a determiner or a preposition ("on top of", "the back")
PLACES = frozenset("back front top bottom inside outside left right middle".split())
#: adjectives that stand for a noun by themselves
ALONE = frozenset("other same first second third last latter former one most more".split())
AUXILIARIES = frozenset(
    "am are be been being can could did do does had has have is may might must shall should was "
    "were will would".split()
)
#: TextBlob reads its lexicon at the first use: another thread would find a part of it
_LEXICON = Lock()
_VERBS = frozenset(("VB", "VBP", "VBZ"))
_MODIFIERS = frozenset(("JJ", "JJR", "JJS", "CD", "RB", "RBS", "VBN", "VBG"))


@TAGGERS.register("phrases")
def phrases(words: list[str]) -> list[str]:
    r"""TextBlob's lexicon and rules, and ours for noun phrases.

    A lexicon that knows one tag per word takes "stop" in "a stop sign" and "cross" in "a green
    cross" for verbs. What follows a determiner is read as one phrase instead: it ends in a noun,
    which is no plural behind "a".
    """
    low = [w.lower() for w in words]
    if all(w in EMBEDDED for w in low):
        return [EMBEDDED[w] for w in low]
    from textblob.en import parser

    with _LEXICON:
        tags = [str(tag) for _, tag in parser.find_tags(words)]
    for i, word in enumerate(low):
        if word in COLORS:
            tags[i] = "JJ"
        elif word in PLACES and i and _opens(low, tags, i - 1, "IN"):
            tags[i] = tags[i] if _noun_from(tags, i + 1) else "NN"
    end = 0
    for i in range(len(tags)):
        if _opens(low, tags, i):
            end = _close(low, tags, i, whole=True)
        elif i >= end and (low[i] in COLORS or (tags[i] == "CD" and low[i] != "one")):
            end = _close(low, tags, i, whole=False)
    return tags


def _opens(low: Sequence[str], tags: Sequence[str], i: int, *more: str) -> bool:
    return low[i] in OPENERS or tags[i] == "PRP$" or tags[i] in more


def _noun_from(tags: Sequence[str], i: int) -> bool:
    """Whether a noun, or an adjective with its noun, begins here."""
    here, after = [*tags[i : i + 2], "", ""][:2]
    return here in NOUN_TAGS or (here == "JJ" and after in NOUN_TAGS)


def _close(low: list[str], tags: list[str], start: int, whole: bool) -> int:
    r"""Make the phrase that begins behind ``start`` end in a noun.

    Args:
        low (list of str): all words in lower case.
        tags (list of str): theirs, changed in place.
        start (int): a determiner, or a number or colour.
        whole (bool): it is a determiner, so that an adjective at the end must be a noun too.

    Returns:
        int: the first word behind the phrase.
    """
    end = start + 1
    while end < len(tags) and (tags[end] in _MODIFIERS or tags[end] in NOUN_TAGS):
        end += 1
    talks = _plural_is_verb(low, tags, start, end)
    if talks:
        end -= 1
        tags[end] = "VBZ"
    if any(t in NOUN_TAGS for t in tags[start + 1 : end]) or low[end - 1] in ALONE:
        return end
    after = tags[end] if end < len(tags) else ""
    talks = talks or (after == "VBZ" and low[start] in SINGULAR)  # no plural behind "a"
    clothed = low[start] in COLORS and start > 0 and low[start - 1] == "in"  # "in red stands"
    if after in _VERBS and not talks and not clothed and low[end] not in AUXILIARIES:
        tags[end] = "NNS" if after == "VBZ" else "NN"
        return end + 1
    linked = after == "CC" and tags[end + 1 : end + 2] == ["JJ"]  # "a yellow and black bowl"
    if whole and end > start + 1 and tags[end - 1] not in ("CD", "VBN") and not linked:
        tags[end - 1] = "NN"
    return end


def _plural_is_verb(low: list[str], tags: list[str], start: int, end: int) -> bool:
    """Whether a phrase such as "a man talks" ends in what looks like a plural."""
    if low[start] not in SINGULAR or end < start + 3 or tags[end - 1] != "NNS":
        return False
    behind = tags[end - 2] in NOUN_TAGS or "-" in low[end - 2]
    return behind and not QUANTITIES.intersection(low[start:end])


# -- lemmas ----------------------------------------------------------------------------------------


@LEMMATIZERS.register("textblob")
def singular() -> Callable[[str], str]:
    """TextBlob's rules for singulars, which ship with its package."""
    from textblob.inflect import singularize

    return singularize


@LEMMATIZERS.register("wordnet")
def wordnet() -> Callable[[str], str]:
    """NLTK's noun lemmatizer, the authors'; needs WordNet."""
    import nltk

    made = nltk.stem.WordNetLemmatizer()
    if _apart(lambda: made.lemmatize("words")) is None:
        raise MissingPackageError(
            "WordNet is not installed: python -m nltk.downloader wordnet gets it; or leave the "
            f"lemmatizer at {DEFAULT_LEMMATIZER!r}"
        )
    return made.lemmatize  # of nouns, by default
