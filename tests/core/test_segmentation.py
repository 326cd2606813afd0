"""Words of a text by Unicode's rules, and which tokens are theirs, however the text is split."""

from itertools import pairwise

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from captum_dcam.adapters.common.text import Words
from captum_dcam.errors import TargetError
from captum_dcam.model.segmentation import word_spans
from captum_dcam.model.words import resolve, words_of

#: what people write, and the words in it
WRITTEN = {
    "a red circle and two stars .": "a red circle and two stars",
    "The cat's t-shirt doesn't fit.": "The|cat's|t-shirt|doesn't|fit",
    "It costs 3.50, or 1,000 at 5°.": "It costs 3.50 or 1,000 at 5",
    "up-to-date rock 'n' roll, a well\u2010known high\u2011end": (
        "up-to-date rock n roll a well\u2010known high\u2011end"
    ),
    "- one -two three- four--five 6-": "one two three four five 6",
    "snake_case (blue) red/green #1": "snake_case blue red green 1",
    "l\u2019eau d'Anna": "l\u2019eau d'Anna",
    "naïve cafe\u0301 Straße": "naïve cafe\u0301 Straße",
    "一只猫坐在沙发上。": "一 只 猫 坐 在 沙 发 上",
    "猫cat猫-dog": "猫 cat 猫 dog",
    "ソファに座る": "ソ フ ァ に 座 る",
    "か\u3099 が": "か\u3099 が",
    "แมวนั่ง กำ": "แ ม ว นั่ ง กำ",
    "고양이가 소파에": "고양이가 소파에",
    "नमस्ते दुनिया": "नमस्ते दुनिया",
    "кошка на диване": "кошка на диване",
    "שלום עולם": "שלום עולם",
    "👩‍👩‍👧 a🙂b 🇩🇪": "a b",
    "a\nb\r\n\tc\u3000d": "a b c d",
    " . , ! — …": "",
    "": "",
}


@pytest.mark.parametrize("text", WRITTEN)
def test_words_as_people_write_them(text):
    words = WRITTEN[text]
    expected = words.split("|") if "|" in words else words.split()
    spans = word_spans(text)
    assert [text[a:b] for a, b in spans] == expected
    assert spans == sorted(spans)


# -- tokens ----------------------------------------------------------------------------------------


class Bytes:
    """A tokenizer whose tokens are any runs of bytes, as those of byte-level vocabularies are."""

    def __init__(self, *tokens):
        self.tokens = [b"a", *tokens]

    def __call__(self, _text, add_special_tokens):
        return {"input_ids": [0]}

    def decode(self, ids, **_):
        return b"".join(self.tokens[i] for i in ids).decode("utf-8", errors="replace")


class Made:
    """What words ask of an adapter."""

    vocabulary = 10**6

    def __init__(self, *tokens, stops=()):
        self.tokens = [t.encode() if isinstance(t, str) else t for t in tokens]
        self.ids = list(range(1, len(tokens) + 1))
        self.stop_ids = frozenset(i + 1 for i in stops)
        self.token_texts = Words(Bytes(*self.tokens)).token_texts

    def positions(self, start, end):
        """Which tokens hold bytes of the text from ``start`` to ``end``, by counting."""
        found, at = [], 0
        for position, token in enumerate(self.tokens):
            if at < end and at + len(token) > start:
                found.append(position)
            at += len(token)
        return tuple(found)


def texts(words):
    return [w.text for w in words]


def cut(whole, places):
    """A sequence in parts."""
    ends = [0, *sorted(p % (len(whole) + 1) for p in places), len(whole)]
    return [whole[a:b] for a, b in pairwise(ends) if a < b]


SIGNS = "aB'\u2019- .,1_é\u0301ßж猫犬カーひแำ한नि🙂👩\u200d\n\u3000\u2010"
LETTERS = st.text(st.sampled_from(SIGNS) | st.characters(), max_size=16)
PLACES = st.lists(st.integers(0, 200), max_size=12)


@given(LETTERS, PLACES)
def test_words_do_not_depend_on_the_tokens(text, places):
    """Any split, also inside a character; every word has the tokens that hold a byte of it."""
    text = text.encode("utf-8", "ignore").decode().replace("\ufffd", "")
    made = Made(*cut(text.encode(), places))
    found = words_of(made, made.ids)
    spans = word_spans(text)
    assert texts(found) == [text[a:b] for a, b in spans]
    for word, (a, b) in zip(found, spans, strict=True):
        start = len(text[:a].encode())
        assert word.positions == made.positions(start, start + len(text[a:b].encode()))
        assert word.token_ids == tuple(p + 1 for p in word.positions)


@given(LETTERS, PLACES, st.integers(0, 99), st.integers(1, 9))
def test_any_part_of_the_answer_is_a_target(text, places, first, length):
    """The tokens of every letter of the part are explained, wherever it stands."""
    text = text.encode("utf-8", "ignore").decode().replace("\ufffd", "")
    part = text[first % (len(text) or 1) :][:length].strip()
    assume(part and part not in ("all", "nouns"))
    made = Made(*cut(text.encode(), places))
    words = {w.text.casefold() for w in words_of(made, made.ids)}
    assume(part.split()[0].casefold() not in words)  # words in a row come first
    found = resolve(made, made.ids, part)
    start = len(text[: text.index(part)].encode())
    held = {p for target in found for p in target.positions}
    for i, sign in enumerate(part):
        own = start + len(part[:i].encode())
        if sign.isalnum():
            assert held >= set(made.positions(own, own + len(sign.encode())))


def test_a_word_of_many_tokens_and_a_token_of_many_words():
    made = Made("一只", b"\xe7\x8c", b"\xab", "坐在沙发上", "。", " the", " c", "at")
    found = words_of(made, made.ids)
    assert texts(found) == [*"一只猫坐在沙发上", "the", "cat"]
    assert [w.positions for w in found[:4]] == [(0,), (0,), (1, 2), (3,)]
    assert [w.positions for w in found[-2:]] == [(5,), (6, 7)]
    (sofa,) = resolve(made, made.ids, "沙发")
    assert (sofa.text, sofa.positions) == ("沙发", (3,))
    (over,) = resolve(made, made.ids, "猫坐")
    assert over.positions == (1, 2, 3)


def test_bytes_of_two_characters_in_one_token():
    raw = "é漢".encode()
    made = Made(raw[:3], raw[3:4], raw[4:])  # é and the first byte of 漢
    found = words_of(made, made.ids)
    assert [(w.text, w.positions) for w in found] == [("é", (0,)), ("漢", (0, 1, 2))]
    assert resolve(made, made.ids, "é")[0].positions == (0,)
    assert resolve(made, made.ids, "漢")[0].positions == (0, 1, 2)


def test_parts_of_words_signs_and_blanks():
    made = Made("The", " don", "'t", " t", "-", "shirt", ",", " well\u2019s", "\n", "CATS", "!")
    assert texts(words_of(made, made.ids)) == ["The", "don't", "t-shirt", "well\u2019s", "CATS"]

    def at(phrase):
        return [t.positions for t in resolve(made, made.ids, phrase)]

    assert at("don't") == at("DON\u2019T") == [(1, 2)]
    assert at("t-shirt") == at("T\u2011SHIRT") == [(3, 4, 5)]
    assert at("t-shirt,") == [(3, 4, 5, 6)] and at(",") == [(6,)] and at("shirt") == [(5,)]
    assert at("well's") == [(7,)] and at("well's cats") == [(7, 9)]
    assert at("well's cats!") == [(7, 8, 9, 10)]  # the text, with what stands between
    assert at("cat") == [(9,)] and at("e don") == [(0, 1)]
    with pytest.raises(TargetError, match=r"'dog' is not in the answer. Its words: The don't"):
        at("dog")
    with pytest.raises(TargetError, match="is not in the answer"):
        at(" \n")


def test_every_occurrence_and_each_token_once():
    made = Made("a cat", " and", " a cat", " 猫猫")
    assert [t.positions for t in resolve(made, made.ids, "cat")] == [(0,), (2,)]
    assert [t.positions for t in resolve(made, made.ids, "猫")] == [(3,)]
    assert [t.positions for t in resolve(made, made.ids, "nd a")] == [(1, 2)]
    (first, second) = resolve(made, made.ids, "a cat")
    assert (first.positions, first.token_ids) == ((0,), (1,)) and second.positions == (2,)


def test_composed_and_decomposed_letters_are_the_same():
    made = Made("cafe\u0301", " é", " Straße")
    for word in ("café", "CAFE\u0301"):
        assert [t.positions for t in resolve(made, made.ids, word)] == [(0,)]
    assert [t.positions for t in resolve(made, made.ids, "e\u0301")] == [(1,)]
    assert [t.positions for t in resolve(made, made.ids, "STRASSE")] == [(2,)]
    assert [t.positions for t in resolve(made, made.ids, "rass")] == [(2,)]


def test_where_an_answer_ends_no_word_goes_on():
    made = Made("red", "dish", "<eos>", "dish", stops=(2,))
    assert [w.positions for w in words_of(made, made.ids)] == [(0, 1), (3,)]
    assert [t.positions for t in resolve(made, made.ids, "reddish dish")] == [(0, 1, 3)]
