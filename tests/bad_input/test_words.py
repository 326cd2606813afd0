"""Words that cannot be explained: answers without words, words that are not there, other scripts.

Each is refused with the value and the next step, before any hook; what can be explained is, down to
the pictures, whatever its tokens hold."""

import pytest
import tiny

from captum_dcam.comparing import compare_generation
from captum_dcam.errors import MissingPackageError, TargetError, UnknownNameError
from captum_dcam.evaluation.words import read_answer
from captum_dcam.explaining import explain_generation
from captum_dcam.maps import Reading, repeated_maps
from captum_dcam.model.answers import force
from captum_dcam.model.forward import DenoisingForward
from captum_dcam.model.words import resolve
from captum_dcam.viewer import text_html, text_strip, write_comparison, write_folder

#: text of the tokens of an answer; None ends it
WORDLESS = {
    "nothing": (None,) * 4,
    "signs": (" .", " ,", "!", " …"),
    "blanks": (" ", "\n", "\t", "\u3000"),
    "pictures": (" 🙂", "👩\u200d👩\u200d👧", "\ufe0f", "."),
    "half a character": ("\ufffd", "", "\ufffd", None),
}
SPOKEN = {
    "English": (" a", " cat", " sits", " ."),
    "an end inside": (" a", None, " cat", " ."),
    "blanks inside": (" a cat", " on\nthe", " mat\n", "."),
    "Chinese": ("一只", "", "猫", "坐在。"),
    "Thai": ("แม", "ว", "นั่", "ง"),
    "Hebrew": (" שלום", " ע", "ולם", "\u202e"),
    "markup": (" <b>", "$x_1$", "|a|", "=1+1"),
    "control": ("\x1b[31m", "red", "\x00", "\u2028"),
    "long": (" " + "x" * 300, " cat", "y" * 200, "/../z"),
}
FOREIGN = ("Chinese", "Thai", "Hebrew")
ENTRIES = {
    "explain": explain_generation,
    "compare": lambda forward, words, **more: compare_generation(
        forward, words, ["diffusion_cam_base"], **more
    ),
    "resolve": lambda forward, words, **more: resolve(
        forward.adapter, forward.trajectory.tokens[0].tolist(), words, **more
    ),
}
entries = pytest.mark.parametrize("entry", ENTRIES)


@pytest.fixture(scope="module")
def spoken():
    """A forward with an answer of four tokens whose text a test chooses."""
    made = tiny.adapter("prefix")
    forward = DenoisingForward(made, 1)
    request = made.prepare([[tiny.picture()]], [tiny.PROMPT])
    plain, (stop, *_) = made.token_texts, sorted(made.stop_ids)
    bound = {}

    def speak(texts):
        ids = [stop if text is None else 10 + i for i, text in enumerate(texts)]
        known = {i: text for i, text in zip(ids, texts, strict=True) if text is not None}
        key = tuple(text is None for text in texts)
        if key not in bound:
            made.token_texts = plain
            force(forward, ids, request)
            bound[key] = forward.trajectory
        forward.bind(request, bound[key])
        made.token_texts = lambda some: [known[i] if i in known else plain([i])[0] for i in some]
        return forward

    yield speak
    assert not tiny.hooks(forward)


def refused(forward, call, words, *says, error=TargetError, **more):
    with pytest.raises(error) as caught:
        call(forward, words, **more)
    for one in says:
        assert one in str(caught.value), (one, str(caught.value))
    assert not tiny.hooks(forward) and forward.tap.edit is None


# -- answers without words -------------------------------------------------------------------------


@entries
@pytest.mark.parametrize("words", (None, "all", "nouns", "cat", ["cat"], "", " \n", [0, "a cat"]))
@pytest.mark.parametrize("kind", WORDLESS)
def test_an_answer_without_words(spoken, kind, words, entry):
    forward = spoken(WORDLESS[kind])
    text = "".join(t or "" for t in WORDLESS[kind]).strip()
    asked = words[-1] if isinstance(words, list) else words
    every = {"nouns": "no noun", None: "no word", "all": "no word"}
    what = every.get(asked, f"{asked!r} is not in")
    how = (f"the answer is {text!r}", "ask for a part") if text else ("is empty", "ask something")
    refused(forward, ENTRIES[entry], words, what, *how)


@pytest.mark.parametrize("kind", WORDLESS)
def test_what_needs_no_word_runs_without_one(spoken, kind):
    forward = spoken(WORDLESS[kind])
    assert read_answer(forward, ()).words == ()
    assert repeated_maps(forward, 0, Reading()) is None
    found = explain_generation(forward, [0, 1, 2, 3], preset="paper")
    assert [t.positions for t in found.targets] == [(0,), (1,), (2,), (3,)]


# -- words that are not there ----------------------------------------------------------------------

ABSENT = ("dog", "cat dog", "", " ", "\n", "a  dog", "catt", "猫犬", "e\u0301", "cats'", "-", "No")
LISTED = {"English": "a cat sits", "Chinese": "一 只 猫 坐 在", "blanks inside": "a cat on the mat"}


@entries
@pytest.mark.parametrize("words", ABSENT)
@pytest.mark.parametrize("kind", LISTED)
def test_words_that_are_not_there(spoken, kind, words, entry):
    forward = spoken(SPOKEN[kind])
    refused(forward, ENTRIES[entry], words, f"word {words!r} is not in", f"words: {LISTED[kind]}")


@entries
@pytest.mark.parametrize("kind", FOREIGN)
def test_nouns_of_another_language_are_not_guessed(spoken, kind, entry):
    refused(spoken(SPOKEN[kind]), ENTRIES[entry], "nouns", "no noun", "English", "name its words")


OUTSIDE = {
    -1: "token index -1 is out of range",
    4: "4 positions, 0 to 3",
    (4, 1): "token index 4 is out of range",
    (0, 10**9): "token id 1000000000 is out of range",
    (0, -1): "token id -1 is out of range",
    (True, 1): "two integers are expected",
    (0, 1, 2): "two integers are expected",
    1.5: "target 1.5 is a float",
    b"cat": "target b'cat' is a bytes",
    True: "target True is a bool",
}


@entries
@pytest.mark.parametrize("words", OUTSIDE, ids=repr)
@pytest.mark.parametrize("kind", ("English", "Chinese", "signs"))
def test_positions_that_are_none(spoken, kind, words, entry):
    forward = spoken((SPOKEN | WORDLESS)[kind])
    refused(forward, ENTRIES[entry], [words], OUTSIDE[words])


@entries
@pytest.mark.parametrize(
    ("tagger", "error", "says"),
    [
        ("Phrases", UnknownNameError, "'phrases'"),
        ("textblob", UnknownNameError, "unknown tagger 'textblob'"),
        ("", UnknownNameError, "unknown tagger ''"),
        ("nltk", MissingPackageError, "python -m nltk.downloader"),
    ],
)
def test_taggers_that_are_not_there(spoken, monkeypatch, tagger, error, says, entry):
    import nltk

    monkeypatch.setattr(nltk.data, "path", [])
    forward = spoken(SPOKEN["English"])
    refused(forward, ENTRIES[entry], "nouns", says, error=error, tagger=tagger)


# -- what can be explained is ----------------------------------------------------------------------

TAKEN = {
    ("English", "nouns"): [(1,)],
    ("English", "CAT sits"): [(1, 2)],
    ("English", "at si"): [(1, 2)],
    ("English", "."): [(3,)],
    ("English", (1, 5)): [(1,)],
    ("an end inside", "a cat"): [(0, 2)],
    ("an end inside", None): [(0,), (2,)],
    ("blanks inside", "nouns"): [(0,), (2,)],
    ("blanks inside", None): [(0,), (0,), (1,), (1,), (2,)],
    ("blanks inside", "on the"): [(1,)],
    ("blanks inside", "on the mat"): [(1, 2)],
    ("Chinese", None): [(0,), (0,), (1, 2), (3,), (3,)],
    ("Chinese", "猫"): [(1, 2)],
    ("Chinese", "只猫坐"): [(0, 1, 2, 3)],
    ("Chinese", "。"): [(3,)],
    ("Thai", "แมว"): [(0, 1)],
    ("Thai", None): [(0,), (0,), (1,), (2,), (3,)],
    ("Hebrew", "עולם"): [(1, 2)],
    ("markup", "<b>"): [(0,)],
    ("markup", "1+1"): [(3,)],
    ("control", "red"): [(1,)],
    ("long", "cat"): [(1,)],
    ("signs", "…"): [(3,)],
    ("pictures", "🙂"): [(0,)],
}


@pytest.mark.parametrize("entry", ("explain", "resolve"))
@pytest.mark.parametrize(("kind", "words"), TAKEN, ids=repr)
def test_what_is_there_is_explained(spoken, kind, words, entry):
    found = ENTRIES[entry](spoken((SPOKEN | WORDLESS)[kind]), words)
    targets = found if isinstance(found, tuple) else found.targets
    assert [t.positions for t in targets] == TAKEN[kind, words]
    assert all(len(t.positions) == len(t.token_ids) for t in targets)


@pytest.mark.filterwarnings("ignore:no installed font")
def test_its_pictures_are_drawn(spoken, tmp_path):
    """Line breaks, control characters, other scripts, markup, half a character, nothing at all."""
    forward = spoken((" on\nthe", "\x1b[31m猫\u202e\x00", "", "$x_1$|<b>\ufffd=1"))
    explanation = explain_generation(forward, [0, 1, 2, 3], preset="base")
    written = write_folder(explanation, tmp_path / "explanation")
    assert len(list(written.glob("word-*.png"))) == 4
    comparison = compare_generation(forward, [0, 1, 2, 3], ["tam"])
    write_comparison(comparison, tmp_path / "comparison")
    tokens, (row,) = comparison.tokens, comparison.rows
    strip = (tokens.token_texts, row.text[0], tokens.prompt)
    text_strip(*strip, explained=[tokens.prompt]).savefig(tmp_path / "strip.png")
    assert "<div" in text_html(*strip)
