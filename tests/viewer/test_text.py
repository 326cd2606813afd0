"""Relevance of text as HTML and as a figure: escaping, colours, NaN, wrapping, no global state."""

import io
import sys
import warnings
from html.parser import HTMLParser

import numpy as np
import pytest
import torch
from PIL import Image

from captum_dcam.viewer import text_html, text_strip
from captum_dcam.viewer.text import AGAINST, FOR, STRONGEST, percent

PIECES = (" what", " is", " it", " a", " red", " circ", "le")
VALUES = (0.0, 1.0, -2.0, float("nan"), 0.5, 4.0, -4.0)
NAN = float("nan")


class Spans(HTMLParser):
    """Text of every titled span, with its style and title; and whether tags are balanced."""

    def __init__(self, text):
        super().__init__()
        self.found, self.open, self.text = [], [], ""
        self.feed(text)
        assert not self.open, "tags are left open"

    def handle_starttag(self, tag, attrs):
        if tag != "br":
            self.open.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop()[0] == tag

    def handle_data(self, data):
        self.text += data
        attrs = self.open[-1][1]
        if "title" in attrs:
            self.found.append((data, attrs["style"], attrs["title"]))


def test_colours_are_signed_and_relative_to_the_strongest():
    spans = Spans(text_html(PIECES, VALUES, 3)).found
    assert [s[0] for s in spans] == [p.strip() for p in PIECES]
    styles = [s[1] for s in spans]
    r, g, b = FOR
    assert f"rgba({r},{g},{b},{STRONGEST / 4:.3f})" in styles[1]
    assert f"rgba({r},{g},{b},{STRONGEST:.3f})" in styles[5]
    r, g, b = AGAINST
    assert f"rgba({r},{g},{b},{STRONGEST / 2:.3f})" in styles[2]
    assert "rgba" not in styles[0] and "rgba" not in styles[3]
    assert spans[3][2] == "no value" and spans[4][2] == "+0.5"
    given = Spans(text_html(PIECES, VALUES, 3, vmax=8)).found
    assert f"{STRONGEST / 2:.3f}" in given[5][1]


def test_everything_is_escaped():
    evil = ' <script>alert("1")</script>&amp;'
    text = text_html([evil, evil], [1.0, NAN], 1, candidates=[(evil, 0.0001)])
    assert "<script" not in text
    parsed = Spans(text)
    assert [s[0] for s in parsed.found] == [evil.strip()] * 2
    assert parsed.text.count('<script>alert("1")</script>&amp;') == 3 and "<0.1%" in parsed.text


def test_parts_and_the_explained_token_are_told_apart():
    text = text_html(PIECES, VALUES, 3, explained=[3], candidates=[(" a", 0.62), (" the", 0.004)])
    parsed = Spans(text)
    for part in ("Prompt", "Answer", "Candidates", "62%", "0.4%"):
        assert part in parsed.text
    assert parsed.found[3][2] == "explained" and "outline" in parsed.found[3][1]
    assert sum("outline" in s[1] for s in parsed.found) == 1
    assert "Prompt" not in text_html(PIECES, VALUES, 0)
    assert "Answer" not in text_html(PIECES, VALUES, 7)


def test_nothing_comes_from_outside_and_pieces_join():
    text = text_html(PIECES, VALUES, 3)
    for outside in ("http", "class=", "<link", "<script", "url("):
        assert outside not in text
    assert "red circle" in Spans(text).text  # 'circ' + 'le'
    assert "<br>" in text_html([" a\n", " b"], [1, 2], 0)


@pytest.mark.parametrize("values", [[0.0] * 7, [NAN] * 7])
def test_no_values_give_no_colour(values):
    assert all("rgba" not in s[1] for s in Spans(text_html(PIECES, values, 3)).found)
    text_strip(PIECES, values, 3)


def test_tensors_and_arrays_do_as_well():
    values = [0.5, 1.0, -2.0, 1.5, 0.5, 4.0, -4.0]
    expected = text_html(PIECES, values, 3)
    assert text_html(PIECES, torch.tensor(values, dtype=torch.bfloat16), 3) == expected
    assert text_html(PIECES, np.array(values), 3) == expected


@pytest.mark.parametrize("draw", [text_html, text_strip])
@pytest.mark.parametrize(
    ("values", "prompt", "options", "message"),
    [
        (VALUES[:3], 3, {}, r"\(3,\): expected \(7,\)"),
        (VALUES, 8, {}, "prompt is 8"),
        (VALUES, 3, {"explained": [9]}, "explained token 9"),
        ((*VALUES[:6], float("inf")), 3, {}, "infinity"),
        (VALUES, 3, {"vmax": 0.0}, "vmax is 0"),
        (VALUES, 3, {"candidates": [("x", 1.5)]}, "probability 1.5"),
    ],
)
def test_bad_input_is_refused(draw, values, prompt, options, message):
    with pytest.raises(ValueError, match=message):
        draw(PIECES, values, prompt, **options)


def pixels(figure):
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=100)
    return np.asarray(Image.open(file).convert("RGB"))


def test_strip_paints_tokens_and_wraps():
    one, many = text_strip(PIECES, VALUES, 3), text_strip(PIECES * 20, VALUES * 20, 3)
    assert one.get_size_inches()[0] == many.get_size_inches()[0] == 8.0
    assert many.get_size_inches()[1] > 2 * one.get_size_inches()[1]
    drawn = pixels(one).astype(int)
    full = 255 + STRONGEST * (np.array(FOR) - 255)
    assert (np.abs(drawn - full).max(-1) <= 2).sum() > 50
    shown = pixels(many)
    for edge in (shown[:3], shown[-3:], shown[:, :3], shown[:, -3:]):
        assert (edge == 255).all()


def test_strip_takes_any_text_without_mathtext_or_warnings():
    odd = [" $x_1$", " $", " \\frac{1}{2}", " %", "\n", " " * 3, " x" * 200, ""]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        figure = text_strip(odd, [1.0] * len(odd), 2, explained=[1], candidates=[(" $a$", 0.5)])
        texts = [t.get_text() for t in figure.axes[0].texts]
        pixels(figure)
    assert "$x_1$" in texts and "\\frac{1}{2}" in texts and "$a$ 50%" in texts
    with pytest.raises(ValueError, match="width 0"):
        text_strip(PIECES, VALUES, 3, width=0)


def test_strip_is_deterministic_and_leaves_pyplot_alone():
    before = "matplotlib.pyplot" in sys.modules
    first, second = (pixels(text_strip(PIECES, VALUES, 3)) for _ in range(2))
    assert np.array_equal(first, second)
    assert ("matplotlib.pyplot" in sys.modules) == before


def test_percent():
    assert [percent(p) for p in (0, 0.0001, 0.004, 0.62, 1)] == [
        "0%",
        "<0.1%",
        "0.4%",
        "62%",
        "100%",
    ]
