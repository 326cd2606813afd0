"""Figures for papers and the animation of an answer."""

from dataclasses import replace

import numpy as np
import pytest
from PIL import Image, ImageSequence
from viewer.made import made

from captum_dcam.errors import InputError, TargetError
from captum_dcam.viewer import word_overlay


def test_a_figure_has_a_scale_of_its_own_per_map(tmp_path):
    e = made(3)
    e = replace(e, maps=tuple(m * 0.25 for m in e.maps))
    figure = e.plot(["word2", 0])
    images = [a for a in figure.axes if a.images]
    bars = [a for a in figure.axes if not a.images]
    assert [a.get_title(loc="left") for a in images] == ["word2", "word0"]
    assert [b.get_yticklabels()[-1].get_text() for b in bars] == ["0.25", "0.25"]
    heat = images[0].images[1].get_array()
    assert heat[..., 3].max() == pytest.approx(0.9)
    y, x = np.unravel_index(heat[..., 3].argmax(), heat.shape[:2])
    # the blob of word 2 is at row 2 of 6 and column 2 of 8
    assert (y / heat.shape[0], x / heat.shape[1]) == pytest.approx((2.5 / 6, 2.5 / 8), abs=0.05)
    figure.savefig(tmp_path / "words.svg", metadata={"Date": None})
    assert "word2" in (tmp_path / "words.svg").read_text()  # beside its outlines, as a comment
    assert len(e.plot().axes) == 6


@pytest.mark.parametrize(
    ("words", "how", "error", "message"),
    [
        (["none"], {}, TargetError, "'none' was not explained"),
        ([], {}, InputError, "no words to draw"),
        (None, {"image": 1}, InputError, "image is 1: expected 0 to 0"),
        (None, {"columns": 0}, InputError, "columns is 0"),
        (None, {"width": 1000}, InputError, "width 1000 in"),
    ],
)
def test_what_no_figure_can_show_is_refused(words, how, error, message):
    with pytest.raises(error, match=message):
        made(2).plot(words, **how)


def test_an_animation_has_a_frame_per_word_as_it_commits(tmp_path):
    e = made(4)  # committed from the last to the first
    file = e.animate(tmp_path / "answer.gif", milliseconds=100)
    film = Image.open(file)
    frames = [f.convert("RGB").copy() for f in ImageSequence.Iterator(film)]
    assert len(frames) == 2 + len(e.words) and {f.size for f in frames} == {frames[0].size}
    assert file.stat().st_size < 300_000
    assert film.info["loop"] == 0 and frames[0].width == 720
    side = round(720 * 0.025)
    for step, frame in enumerate(frames[1:-1]):
        heat = word_overlay(e, 3 - step, size=(302, 252))
        box = (side + 20, side + 20, side + 282, side + 232)
        shown = np.asarray(frame.crop(box)).astype(int)
        expected = np.asarray(heat.crop((20, 20, 282, 232))).astype(int)
        assert np.abs(shown - expected).mean() < 8, step
    text = np.stack([np.asarray(f.crop((340, 0, *f.size))).std() for f in frames])
    assert (np.diff(text[:-1]) > 0).all()  # more and more is written


def test_what_cannot_be_animated_is_refused(tmp_path):
    e = made(2)
    given = replace(e, trajectory=replace(e.trajectory, settings={"forced": True}))
    for wrong, match in ((given, "was given, not generated"), (made(0), "no word was explained")):
        with pytest.raises(InputError, match=match):
            wrong.animate(tmp_path / "a.gif")
    with pytest.raises(ValueError, match="width is 10"):
        e.animate(tmp_path / "a.gif", width=10)
    assert not list(tmp_path.iterdir())
