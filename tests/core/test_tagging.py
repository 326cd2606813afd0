"""Parts of speech: the same on every machine, right on what the embedded model says, and measured
on captions that were labelled by hand."""

import os
from itertools import product
from pathlib import Path

import nltk
import pytest
import regex
import tiny

import captum_dcam
from captum_dcam.comparing import compare_generation
from captum_dcam.data.scenes import COLORS, SHAPE_OF, SHAPES, Group, captions, vocabulary
from captum_dcam.errors import MissingPackageError, UnknownNameError
from captum_dcam.explaining import explain_generation
from captum_dcam.model import tagging
from captum_dcam.model.answers import force
from captum_dcam.model.tagging import EMBEDDED, NOUN_TAGS, tag
from captum_dcam.model.words import FUNCTION_TAGS
from captum_dcam.presets import PRESETS, preset

#: a folder with captions whose nouns are marked by hand, beside the repository or named here
LABELS = Path(os.environ.get("CAPTUM_DCAM_LABELS", Path(__file__).parents[3] / "shared/labels"))


class Perceptron:
    """In the place of NLTK's tagger, whose data no package ships: "mat" is a verb."""

    def tag(self, words):
        return [(w, {"a": "DT", "mat": "VB"}.get(w, "NN")) for w in words]


@pytest.fixture
def perceptron(monkeypatch):
    monkeypatch.setattr(tagging, "_perceptron", Perceptron)


@pytest.fixture
def no_data(monkeypatch):
    monkeypatch.setattr(nltk.data, "path", [])
    tagging._perceptron.cache_clear()


def nouns(text):
    words = text.split()
    return [w for w, t in zip(words, tag(words), strict=True) if t in NOUN_TAGS]


# -- the default -----------------------------------------------------------------------------------


@pytest.mark.parametrize("count", (1, 3))
@pytest.mark.parametrize("shape", SHAPES)
def test_it_is_right_on_all_that_the_embedded_model_says(shape, count):
    for color, other in product(COLORS, SHAPES):
        places = ((0.1, 0.1),) * count
        groups = Group(color, shape, count, places), Group("cyan", other, 1, ((0.5, 0.5),))
        for text in captions(groups).values():
            words = regex.findall(r"\w+", text)
            found = dict(zip(words, tag(words), strict=True))
            assert {w for w, t in found.items() if t in NOUN_TAGS} == {
                w for w in words if w in SHAPE_OF or w == "image"
            }
            assert all(found[w] == "JJ" for w in words if w in COLORS)
            assert {found[w] for w in ("a", "an", "and", "the", "in", "there") if w in words} <= (
                FUNCTION_TAGS
            )


def test_single_words_of_the_embedded_model():
    """Its answers to questions are one word."""
    assert set(vocabulary()) - {",", ".", "?"} == set(EMBEDDED)
    for word in SHAPE_OF:
        assert tag([word])[0] in NOUN_TAGS and tag([word.upper()])[0] in NOUN_TAGS
    assert [tag([w]) for w in (*COLORS, "two", "yes")] == [["JJ"]] * len(COLORS) + [["CD"], ["UH"]]


SENTENCES = {
    "a bear standing near the water": ["bear", "water"],
    "a stop sign beside the sink": ["stop", "sign", "sink"],
    "two green crosses and a cross": ["crosses", "cross"],
    "a cyan car on top of the hill": ["car", "top", "hill"],
    "people cross the street": ["people", "street"],
    "a man talks on his phone": ["man", "phone"],
    "a yellow and black bowl": ["bowl"],
    "the kitchen is yellow": ["kitchen"],
    "an orange and an apple": ["orange", "apple"],
    "a boy in a white t-shirt performs a trick": ["boy", "t-shirt", "trick"],
    "a person in red stands by the other": ["person"],
    "a few dogs and a couple cats": ["dogs", "couple", "cats"],
    "the dogs of Anna sit in London": ["dogs", "Anna", "London"],
    "一 只 猫 и кот": [],
    "is it": [],
}


@pytest.mark.parametrize("text", SENTENCES)
def test_nouns_of_sentences(text):
    assert nouns(text) == SENTENCES[text]
    assert tag(text.split()) == tag(text.split(), "phrases")


def test_one_tag_per_word_whatever_the_word():
    words = ["a\nb", "", "two dogs", "\n", ".", "a/b", "\u3000", "don't", "&slash;", "x" * 500, "#"]
    for n in range(len(words) + 1):
        assert len(tag(words[:n])) == n and all(tag(words[:n]))


def test_captions_labelled_by_hand():
    """At least 95 % of the nouns, and 95 % of what is called a noun."""
    file = LABELS / "captions.txt"
    if not file.is_file():
        pytest.skip(f"no {file}")
    lines = [line for line in file.read_text("utf-8").splitlines() if line[:1] not in ("#", "")]
    right = missed = wrong = 0
    for line in lines:
        marked = regex.findall(r"[*?]?\w+(?:['-]\w+)*", line.split("\t")[1])
        tags = tag([w.lstrip("*?") for w in marked])
        for word, found in zip(marked, (t in NOUN_TAGS for t in tags), strict=True):
            right += word[0] == "*" and found
            missed += word[0] == "*" and not found
            wrong += word[0] not in "*?" and found
    assert right + missed > 300
    print(f"{right} of {right + missed} nouns, {wrong} others called nouns")
    assert right / (right + missed) >= 0.95 and right / (right + wrong) >= 0.95


# -- NLTK's, by choice -----------------------------------------------------------------------------


def test_the_default_does_not_ask_what_is_installed(perceptron):
    assert tag("a mat".split()) == ["DT", "NN"] and tag("a mat".split(), "nltk") == ["DT", "VB"]
    reading = {name: preset(name).reading().tagger for name in PRESETS}
    assert reading == {"default": "phrases", "base": "phrases", "paper": "nltk"}
    assert preset("paper").reading(tagger="phrases").tagger == "phrases"


def test_without_its_data_the_paper_preset_takes_the_default(no_data):
    assert preset("paper").reading().tagger == "phrases"
    with pytest.raises(MissingPackageError, match=r"nltk\.downloader.*leave the tagger at 'phr"):
        preset("default").reading(tagger="nltk")


def test_who_tagged_is_recorded(perceptron):
    forward = tiny.bound("prefix")
    for chosen, given, recorded in (
        ("default", None, "phrases"),
        ("paper", None, "nltk"),
        ("paper", "phrases", "phrases"),
        ("base", "nltk", "nltk"),
    ):
        found = explain_generation(forward, preset=chosen, tagger=given)
        assert found.settings["tagger"] == recorded
    compared = compare_generation(forward, [0], ["diffusion_cam_base"], tagger="nltk")
    assert compared.settings["tagger"] == "nltk"
    compared = compare_generation(forward, [0], ["diffusion_cam_base"])
    assert compared.settings["tagger"] == "phrases"


def test_the_chosen_one_says_what_a_noun_is(perceptron):
    made = tiny.adapter("prefix")
    forward = captum_dcam.DenoisingForward(made)
    force(forward, [12, 13, 14], made.prepare([[tiny.picture()]], [tiny.PROMPT]))
    made.token_texts = lambda ids: [(" a", " mat", " cat")[i % 3] for i in ids]
    assert explain_generation(forward, "nouns").words == ("mat", "cat")
    assert explain_generation(forward, "nouns", tagger="nltk").words == ("cat",)


@pytest.mark.parametrize("call", ("explain", "compare"))
@pytest.mark.parametrize(
    ("tagger", "error", "says"),
    [
        ("nltk", MissingPackageError, "averaged_perceptron_tagger_eng"),
        ("phrase", UnknownNameError, "unknown tagger 'phrase'; did you mean 'phrases'"),
    ],
)
def test_a_tagger_that_cannot_run_is_refused_before_any_work(no_data, call, tagger, error, says):
    made = tiny.adapter("prefix")
    made.generate = None
    with pytest.raises(error, match=says):
        getattr(captum_dcam, call)(made, tiny.picture(), tiny.PROMPT, tagger=tagger)


def test_one_thread_at_a_time_reads_the_lexicon(monkeypatch):
    """TextBlob reads it at the first use, and another thread would find a part of it."""
    from textblob.en import parser

    find, locked = parser.find_tags, []

    def seen(words):
        locked.append(tagging._LEXICON.locked())
        return find(words)

    monkeypatch.setattr(parser, "find_tags", seen)
    assert tag("a bear".split()) == ["DT", "NN"] and locked == [True]
    assert not tagging._LEXICON.locked()
