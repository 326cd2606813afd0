"""Any script can be drawn: by a font that has it, or as a box that is named once."""

import warnings
from dataclasses import replace

import numpy as np
import pytest
from fontTools.fontBuilder import FontBuilder
from fontTools.pens.ttGlyphPen import TTGlyphPen
from PIL import Image, ImageDraw, ImageFont
from viewer import made

from captum_dcam.viewer import contact_sheet, fonts, text_strip
from captum_dcam.viewer.fonts import GlyphWarning
from captum_dcam.viewer.ink import Ink


@pytest.fixture(scope="module")
def cat_font(tmp_path_factory):
    """A font whose only sign is 猫, a solid square."""
    pen = TTGlyphPen(None)
    for move, point in zip(
        (pen.moveTo, *[pen.lineTo] * 3), ((50, 0), (50, 800), (950, 800), (950, 0)), strict=True
    ):
        move(point)
    pen.closePath()
    empty = TTGlyphPen(None).glyph()
    build = FontBuilder(1000)
    build.setupGlyphOrder([".notdef", "cat"])
    build.setupCharacterMap({ord("猫"): "cat"})
    build.setupGlyf({".notdef": empty, "cat": pen.glyph()})
    build.setupHorizontalMetrics({".notdef": (500, 0), "cat": (1000, 50)})
    build.setupHorizontalHeader(ascent=900, descent=-100)
    build.setupNameTable({"familyName": "Only Cats", "styleName": "Regular"})
    build.setupOS2()
    build.setupPost()
    file = tmp_path_factory.mktemp("fonts") / "OnlyCats-Regular.ttf"
    build.save(file)
    return str(file)


@pytest.fixture
def machine(monkeypatch):
    """Choose what fonts are installed; nothing has been named yet."""
    monkeypatch.setattr(fonts, "_named", set())

    def with_fonts(*files):
        monkeypatch.setattr(fonts, "installed", lambda: files)

    with_fonts()
    return with_fonts


def drawn(text, width=400, anchor="lm"):
    page = Ink(1000).page(width, 60)
    x = {"l": 10, "m": width / 2, "r": width - 10}[anchor[0]]
    page.write((x, 30), text, 24, anchor=anchor)
    return np.asarray(page.image)


def test_plain_text_is_drawn_as_ever(machine):
    image = Image.new("RGB", (400, 60), (255, 255, 255))
    font = ImageFont.truetype(fonts.dejavu(), 24)
    ImageDraw.Draw(image).text((10, 30), "a Ω cat – №", fill=(31, 35, 40), font=font, anchor="lm")
    assert (np.asarray(image) == drawn("a Ω cat – №")).all()


@pytest.mark.parametrize("anchor", ("lm", "mm", "rm"))
def test_another_font_draws_what_the_first_lacks(machine, cat_font, anchor):
    machine("/nowhere.ttf", cat_font)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        image = drawn("a猫b", anchor=anchor)
        assert fonts.parts("a猫b") == [
            ("a", fonts.dejavu()),
            ("猫", cat_font),
            ("b", fonts.dejavu()),
        ]
    dark = (image < 128).all(-1)
    square = dark.all(0, where=dark.any(1)[:, None] & (np.arange(60)[:, None] // 10 == 2))
    assert square.sum() >= 18  # 0.9 of the size
    ink = Ink(1000)
    assert ink.length("a猫b", 24) == pytest.approx(ink.length("a", 24) + ink.length("b", 24) + 24)
    columns = np.flatnonzero(dark.any(0))
    places = {"lm": 10, "mm": 200 - ink.length("a猫b", 24) / 2, "rm": 390 - ink.length("a猫b", 24)}
    assert columns[0] == pytest.approx(places[anchor] + 1, abs=2)


def test_what_no_font_has_is_a_box_and_named_once(machine):
    with pytest.warns(GlyphWarning, match=r"猫 \(U\+732B\).*Install fonts.*fonts-noto-cjk"):
        boxes = drawn("a猫猫")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert (drawn("a猫猫") == boxes).all() and (drawn("a□□") == boxes).all()
    with pytest.warns(GlyphWarning) as seen:
        drawn("猫ก")
    assert len(seen) == 1 and "U+0E01" in str(seen[0].message)
    assert "U+732B" not in str(seen[0].message)


def test_control_characters_do_not_break_a_line(machine):
    assert fonts.one_line("on\r\nthe\tmat\x1b\u2028\x00") == "on↵the mat   "
    assert fonts.one_line("a cat") == "a cat"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for text in ("on\nthe", "\n", "\u202e", "\u200d", "\ud800", "", "\x00"):
            assert drawn(text).shape == (60, 400, 3)


def test_a_strip_takes_the_same_fonts(machine, cat_font, tmp_path, capsys):
    call = ([" a", " 猫", " on\nthe"], [0.5, -1.0, 0.1], 1)
    with pytest.warns(GlyphWarning, match="猫"):
        text_strip(*call).savefig(tmp_path / "boxes.png")
    machine(cat_font)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for explained in ((), (1,)):
            text_strip(*call, explained=explained).savefig(tmp_path / "cat.png")
    assert not capsys.readouterr().err  # where what is logged goes
    assert (tmp_path / "cat.png").read_bytes() != (tmp_path / "boxes.png").read_bytes()


def test_the_sheet_of_an_answer_with_line_breaks(machine):
    e = made.made(words=3)
    texts = (" on\nthe", "\n", " mat\n")
    targets = tuple(replace(t, text=text.strip()) for t, text in zip(e.targets, texts, strict=True))
    assert contact_sheet(replace(e, token_texts=texts, targets=targets)).width == 1600
