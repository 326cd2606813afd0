"""Overlays, sheets and the output folder, on made-up explanations of every size."""

import sys
from dataclasses import replace

import numpy as np
import pytest
import tiny
import torch
from matplotlib import colormaps
from PIL import Image
from viewer.made import found_at, made, picture

from captum_dcam import Explanation, explain_generation
from captum_dcam.data.scenes import make_scene
from captum_dcam.errors import InputError, UnknownNameError
from captum_dcam.metrics import localization
from captum_dcam.results.summary import mask_scores, scene_masks, summarise
from captum_dcam.results.trust import Trust
from captum_dcam.viewer import (
    contact_sheet,
    overlay,
    prepare_folder,
    word_map,
    word_overlay,
    write_folder,
)
from captum_dcam.viewer.overlay import ALPHA, MUTE, muted
from captum_dcam.viewer.step_sheet import chosen_steps, step_sheet

# -- overlay ---------------------------------------------------------------------------------


@pytest.mark.parametrize("cmap", ["inferno", "jet"])
def test_overlay_is_the_blend_it_says(cmap):
    image = picture((7, 5))
    values = torch.rand(5, 7, generator=torch.Generator().manual_seed(0))
    found = np.asarray(overlay(image, values, cmap=cmap, alpha=0.6, vmax=1.0), dtype=float)
    base = np.asarray(image, dtype=float)
    for y in range(5):
        for x in range(7):
            value = float(values[y, x])
            heat = np.array(colormaps[cmap](round(value * 255))[:3]) * 255
            expected = base[y, x] * (1 - 0.6 * value) + heat * 0.6 * value
            assert np.abs(found[y, x] - expected).max() <= 1.01


def test_overlay_scales_by_the_maximum_or_vmax():
    image, values = picture((6, 4)), torch.arange(24.0).view(4, 6)
    assert overlay(image, values) == overlay(image, values * 1e-6)
    assert overlay(image, values) == overlay(image, values, vmax=23.0)
    assert overlay(image, values, vmax=100.0) != overlay(image, values)
    clipped = np.asarray(overlay(image, values, vmax=5.0))
    assert (
        np.ptp(clipped[1:, :, 2].astype(int)) == 0
    )  # blue of the picture is constant: all at the top


@pytest.mark.parametrize("value", [0.0, 0.3])
def test_a_constant_map_gives_the_plain_picture_with_a_note(value):
    image = picture((9, 4))
    out = overlay(image, torch.full((4, 9), value))
    assert np.array_equal(np.asarray(out), np.asarray(image))
    assert "flat" in out.info["note"]
    assert "note" not in image.info


@pytest.mark.parametrize("mode", ["L", "RGBA", "CMYK", "P", "I;16", "1"])
def test_overlay_takes_pictures_of_any_mode(mode):
    grey = Image.fromarray(np.full((4, 9), 300, dtype=np.uint16))
    image = grey if mode == "I;16" else picture((9, 4)).convert(mode)
    out = overlay(image, torch.rand(4, 9))
    assert out.mode == "RGB" and out.size == (9, 4)


@pytest.mark.parametrize(
    ("values", "options", "message"),
    [
        (torch.zeros(9, 4), {}, r"\(9, 4\).*expected \(4, 9\)"),
        (-torch.ones(4, 9), {}, "non-negative"),
        (torch.full((4, 9), float("nan")), {}, "finite"),
        (torch.rand(4, 9), {"alpha": 1.5}, "alpha is 1.5"),
        (torch.rand(4, 9), {"vmax": 0.0}, "vmax is 0.0"),
        (torch.rand(4, 9), {"mute": -1.0}, "mute is -1.0"),
    ],
)
def test_overlay_refuses(values, options, message):
    with pytest.raises(ValueError, match=message):
        overlay(picture((9, 4)), values, **options)


def test_unknown_colour_map_names_near_ones():
    with pytest.raises(UnknownNameError, match="inferno"):
        overlay(picture((9, 4)), torch.rand(4, 9), cmap="infermo")


def test_word_map_equals_the_explanations_and_scales_with_the_size():
    e = made(3)
    assert torch.allclose(word_map(e, "word1"), e.pixel_maps()[1], atol=1e-6)
    small = word_map(e, 1, size=(8, 6))
    assert torch.allclose(small, e.maps[0][1], atol=1e-6)  # one pixel a token: its centre


def test_pictures_of_one_word_share_a_scale():
    e = made(1, images=2)
    first, second = (np.asarray(word_overlay(e, 0, i, mute=0.0), dtype=float) for i in (0, 1))
    change = [np.abs(x - np.asarray(e.images[i])).sum() for i, x in enumerate((first, second))]
    assert change[0] > 1.5 * change[1]


# -- contact sheet -----------------------------------------------------------------------------


@pytest.mark.parametrize("words", [1, 5, 40])
@pytest.mark.parametrize("size", [(50, 50), (1200, 90)])
@pytest.mark.parametrize("images", [1, 3])
def test_sheet_of_any_number_and_size(words, size, images):
    sheet = contact_sheet(made(words, size, images), width=600)
    assert sheet.mode == "RGB" and sheet.width == 600
    pixels = np.asarray(sheet)
    for edge in (pixels[:8], pixels[-8:], pixels[:, :8], pixels[:, -8:]):
        assert (edge == 255).all(), "something runs over the margin"


def test_sheet_of_a_large_picture_works_at_its_own_scale():
    sheet = contact_sheet(made(2, (2000, 1500)), mode="nearest")
    assert sheet.width == 1600 and sheet.height < 1600


@pytest.mark.parametrize("maps", ["zero", "flat"])
def test_sheet_of_flat_maps_and_long_words(maps):
    """The plain picture, once per word and once on top, and nothing over the margin."""
    sheet = contact_sheet(made(2, maps=maps, text="unpronounceable" * 20), width=500)
    pixels = np.asarray(sheet)
    for edge in (pixels[:8], pixels[-8:], pixels[:, :8], pixels[:, -8:]):
        assert (edge == 255).all(), "something runs over the margin"
    heat = contact_sheet(made(2, text="unpronounceable" * 20), width=500)
    assert sheet.size == heat.size and sheet != heat


@pytest.mark.parametrize("images", (1, 2))
def test_every_panel_of_the_sheet_is_its_words(images):
    e = made(5, images=images)
    sheet = contact_sheet(e, "nearest", width=1200, cmap="viridis")
    cell = sheet_cell(sheet, e, images)
    at = [
        [
            found_at(sheet, word_overlay(e, n, i, size=cell, mode="nearest", cmap="viridis"))
            for i in range(images)
        ]
        for n in range(5)
    ]
    firsts = [one[0] for one in at]
    assert firsts == sorted(firsts, key=lambda place: (place[1], place[0]))
    assert len({place for one in at for place in one}) == 5 * images
    for one in at:
        assert one == sorted(one, key=lambda place: (place[1], place[0]))


def sheet_cell(sheet, explanation, images):
    """The size at which the sheet draws a picture."""
    from captum_dcam.viewer import sheet as module
    from captum_dcam.viewer.ink import INNER, Ink, mosaic_cell
    from captum_dcam.viewer.overlay import fitted

    ink, columns = Ink(sheet.width), module._columns(5, images)
    room = (ink.px(INNER) - ink.px(18) * (columns - 1)) // columns
    cell = mosaic_cell(ink, images, room)
    return fitted(explanation.images[0].size, cell, cell * 1.2)


def test_sheet_is_deterministic_and_leaves_pyplot_alone():
    before = "matplotlib.pyplot" in sys.modules
    assert contact_sheet(made(2), width=400) == contact_sheet(made(2), width=400)
    assert ("matplotlib.pyplot" in sys.modules) == before


def test_sheet_too_narrow_is_an_error():
    with pytest.raises(ValueError, match="width is 20"):
        contact_sheet(made(1), width=20)


# -- summary ------------------------------------------------------------------------------------


def test_summary_says_where_the_peak_is():
    first, *_, last = summarise(made(5))
    assert (first.number, first.word, first.steps, first.region) == (1, "word0", (4,), "upper left")
    assert first.peak == (0.0, 0.0, 24.0, 160 / 6)
    assert first.confidence == pytest.approx(0.5) and last.confidence == pytest.approx(1.0)
    (empty,) = summarise(made(1, maps="zero"))
    assert empty.peak is None and empty.region == "nowhere"


@pytest.mark.parametrize("size", ((600, 60), (60, 600)))
def test_places_are_told_by_both_sides_of_the_image(size):
    found = summarise(made(12, size))
    for row in found:
        x, y = (row.peak[0] + row.peak[2]) / 2 / size[0], (row.peak[1] + row.peak[3]) / 2 / size[1]
        assert ("left" in row.region, "right" in row.region) == (x < 1 / 3, x >= 2 / 3)
        assert ("upper" in row.region, "lower" in row.region) == (y < 1 / 3, y >= 2 / 3)
    assert len({row.region for row in found}) > 2


def test_summary_names_the_image_that_a_word_looks_at():
    e = made(1, images=2)
    swapped = {"maps": e.maps[::-1], "peaks": e.peaks[::-1]}
    assert summarise(e)[0].image == 0
    assert summarise(Explanation(**{**vars(e), **swapped}))[0].image == 1


def test_scene_scores_are_those_of_the_object_a_word_names():
    scene = next(s for s in (make_scene(7, i) for i in range(50)) if len(s.groups) > 1)
    group = scene.groups[0]
    e = made(4, (192, 192))
    token_texts = (" a", f" {group.color}", f" {group.words.split()[1]}", " nothing")
    e = Explanation(**{**vars(e), "token_texts": token_texts})
    scores = mask_scores(e, scene_masks(e, scene))
    mask = torch.from_numpy(scene.mask_of(group.color, group.shape))
    assert scores[0] is None and scores[3] is None
    for n in (1, 2):
        expected = localization(e.pixel_maps()[n], mask)
        assert float(scores[n].f3) == pytest.approx(float(expected.f3), rel=1e-5)
        assert float(scores[n].contrast) == pytest.approx(float(expected.contrast), rel=1e-5)


# -- folder -------------------------------------------------------------------------------------


def pixels_of(file):
    return Image.open(file).convert("RGB")


def map_of(file, size=(480, 400)):
    """A word's picture without the lines below it, which are there."""
    whole = pixels_of(file)
    below = np.asarray(whole.crop((0, size[1], *whole.size)))
    assert whole.width == size[0] and below.min() < 128
    return whole.crop((0, 0, *size))


def test_folder_holds_everything_and_is_replaced(tmp_path):
    folder = write_folder(made(2), tmp_path / "a" / "out")
    names = {p.name for p in folder.iterdir()}
    assert names == {
        *("word-01-word0.png", "word-02-word1.png"),
        *("sheet.png", "index.html", "explanation"),
    }
    assert Explanation.load(folder / "explanation").words == ("word0", "word1")
    for n in range(2):
        expected = word_overlay(made(2), n, size=(480, 400))
        assert map_of(folder / f"word-0{n + 1}-word{n}.png") == expected
    write_folder(made(1, images=2), folder)
    names = {p.name for p in folder.iterdir()}
    assert names == {
        "word-01-word0-image-1.png",
        "word-01-word0-image-2.png",
        *("sheet.png", "index.html", "explanation"),
    }
    second = word_overlay(made(1, images=2), 0, 1, size=(480, 400))
    assert map_of(folder / "word-01-word0-image-2.png") == second
    write_folder(made(1), folder, mode="nearest")
    expected = word_overlay(made(1), 0, size=(480, 400), mode="nearest")
    assert map_of(folder / "word-01-word0.png") == expected
    assert pixels_of(folder / "sheet.png") == contact_sheet(made(1), "nearest")
    assert [p.name for p in folder.parent.iterdir()] == ["out"]


def test_folder_with_other_things_is_refused(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(FileExistsError, match=r"notes\.txt"):
        write_folder(made(1), tmp_path)
    with pytest.raises(FileExistsError, match="not a folder"):
        prepare_folder(tmp_path / "notes.txt")
    with pytest.raises(NotADirectoryError, match="not a folder"):
        prepare_folder(tmp_path / "notes.txt" / "out")
    out = write_folder(made(1), tmp_path / "out")
    (out / "notes.txt").write_text("mine")
    with pytest.raises(FileExistsError, match=r"notes\.txt"):
        write_folder(made(1), out)
    assert (out / "sheet.png").is_file()


def test_a_failure_leaves_the_earlier_output(tmp_path, monkeypatch):
    out = write_folder(made(1), tmp_path / "out")
    before = (out / "sheet.png").read_bytes()

    def fail(*_args: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(Explanation, "save", fail)
    with pytest.raises(OSError, match="disk full"):
        write_folder(made(3), out)
    assert (out / "sheet.png").read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


# -- every step ------------------------------------------------------------------------------------


def test_the_steps_that_are_shown():
    assert chosen_steps(5, [1, 2]) == [0, 1, 2, 3, 4]
    shown = chosen_steps(32, [1, 3, 5, 6, 10])
    assert len(shown) == 8 and {0, 31, 1, 3, 5, 6, 10} < set(shown)
    many = chosen_steps(100, list(range(20, 60)))
    assert len(many) == 8 and {0, 99} < set(many) and {20, 59} < set(many)
    assert chosen_steps(100, []) == [round(i * 99 / 7) for i in range(8)]


def test_a_sheet_of_every_step(tmp_path):
    """A step's cell is the overlay of its own map, on the scale of all the word's steps."""
    found = explain_generation(tiny.bound("prefix", gen_length=4), [1, 2], every_step=True)
    sheet = step_sheet(found, width=900)
    assert sheet.size[0] == 900 and sheet.mode == "RGB"
    write_folder(found, tmp_path / "out")
    assert Image.open(tmp_path / "out" / "steps.png").size[0] == 1600
    faint = replace(found, steps=replace(found.steps, maps=tuple(m * 0 for m in found.steps.maps)))
    assert step_sheet(faint, width=900).tobytes() != sheet.tobytes()
    with pytest.raises(InputError, match="every_step=True"):
        step_sheet(replace(found, steps=None))


def test_what_localises_nothing_is_faint():
    """Drawn at a lower opacity, and said; an alpha of the caller's counts."""
    explanation = made()
    plain = word_overlay(explanation, 0)
    trust = Trust(torch.zeros(len(explanation.words)), True, "made", ((),) * 9)
    doubted = replace(explanation, trust=trust)
    heat = [np.asarray(x, dtype=int) for x in (plain, word_overlay(doubted, 0))]
    base = np.asarray(muted(explanation.images[0], MUTE), dtype=int)
    assert abs(heat[1] - base).sum() < 0.5 * abs(heat[0] - base).sum()
    same = word_overlay(doubted, 0, alpha=ALPHA)
    assert same.tobytes() == plain.tobytes()
