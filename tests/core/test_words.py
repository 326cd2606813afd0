"""Parts of speech, phrases and words of several tokens, on answers in which they differ."""

import awkward
import pytest

from captum_dcam.errors import TargetError
from captum_dcam.model.words import (
    FUNCTION_TAGS,
    Target,
    nouns,
    repeated_function_words,
    resolve,
    words_of,
)


def spoken(text):
    return tuple(Target(w, (i,), (100 + i,)) for i, w in enumerate(text.split()))


def texts(words):
    return [w.text for w in words]


def test_nouns_are_singular_plural_and_names():
    found = nouns(spoken("the dogs of Anna sit beside a red car in London"))
    assert texts(found) == ["dogs", "Anna", "car", "London"]
    assert [w.positions for w in found] == [(1,), (3,), (8,), (10,)]
    assert texts(nouns(spoken("two circles and three stars"))) == ["circles", "stars"]
    with pytest.raises(TargetError, match=r"no noun in the answer .*They are: is it"):
        nouns(spoken("is it"))


def test_repeated_function_words_are_every_kind_and_every_occurrence():
    """Articles, prepositions, conjunctions, pronouns; not what is there once, and no noun."""
    answer = "The cat on the mat and a dog on a mat and it can see that it is in a box"
    found = repeated_function_words(spoken(answer))
    counted = [w.lower() for w in answer.split()]
    expected = [w for w in counted if w in ("the", "on", "and", "a", "it")]
    assert [w.text.lower() for w in found] == expected
    assert [w.positions[0] for w in found] == [
        i for i, w in enumerate(counted) if w in ("the", "on", "and", "a", "it")
    ]
    assert {"DT", "IN", "CC", "PRP"} <= FUNCTION_TAGS
    assert repeated_function_words(spoken("a dog in the dog house")) == ()


@pytest.mark.parametrize(
    ("family", "example", "expected", "function"),
    [
        ("mini", 0, ["circle", "stars", "hearts"], ["a", "a"]),
        ("mini", 1, ["moons", "rings"], ["of", "the", "of", "the"]),
        ("lavida", 0, ["dogs", "mat", "cats"], ["a", "on", "a", "on"]),
        ("causal", 1, ["image", "reds"], ["the", "the"]),
    ],
)
def test_words_of_answers_with_ends_among_them(family, example, expected, function):
    forward = awkward.alone(family, "none", example)
    tokens = forward.trajectory.tokens[0].tolist()
    words = words_of(forward.adapter, tokens)
    stops = forward.adapter.stop_ids
    held = [p for w in words for p in w.positions]
    assert any(t in stops for t in tokens) and held == sorted(set(held))
    assert not any(t in stops for w in words for t in w.token_ids)
    assert texts(resolve(forward.adapter, tokens, "nouns")) == expected
    assert texts(repeated_function_words(words)) == function
    long = next(w for w in words if len(w.positions) == 2)
    assert [tokens[p] for p in long.positions] == list(long.token_ids)
    assert resolve(forward.adapter, tokens, long.text.upper()) == (
        Target(long.text.upper(), long.positions, long.token_ids),
    )


def test_a_phrase_is_all_tokens_of_all_its_words_every_time():
    forward = awkward.alone("mini", "none", 0)
    tokens = forward.trajectory.tokens[0].tolist()  # a red circle and a star·s <eos> two hearts …
    (phrase,) = resolve(forward.adapter, tokens, "a stars")
    assert phrase.positions == (4, 5, 6)
    assert list(phrase.token_ids) == [tokens[p] for p in (4, 5, 6)]
    assert [t.positions for t in resolve(forward.adapter, tokens, "a")] == [(0,), (4,)]
    # over an end of the answer: its words follow each other
    assert [t.positions for t in resolve(forward.adapter, tokens, "stars two")] == [(5, 6, 8)]
    with pytest.raises(TargetError, match="'red stars' is not in the answer"):
        resolve(forward.adapter, tokens, "red stars")
