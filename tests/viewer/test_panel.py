"""The panel of a comparison: sizes, what is hot, failures, marks, scales, determinism."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy import ndimage
from viewer.made import found_at, made

from captum_dcam.data.scenes import make_scene, scene_mask
from captum_dcam.methods import Cost
from captum_dcam.metrics import localization
from captum_dcam.model.layout import Layout, uniform_grid
from captum_dcam.model.sequence import TextTokens
from captum_dcam.model.words import Target
from captum_dcam.results.comparison import Comparison, ComparisonRow
from captum_dcam.viewer import comparison_panel
from captum_dcam.viewer.panel import (
    FAILED,
    OUTLINE,
    PARTIAL,
    SMALLEST,
    Thumbnails,
    _Panel,
    places,
    plan_of,
    seconds_text,
)

GROUPS = ("Diffusion-CAM", "logit lens", "attention")


def row(number, maps, masks=None, status="done", note="", label=None):
    words = len(maps[0])
    whole = status == "done"
    scores = None
    if masks is not None:
        scores = tuple(localization(torch.rand(20, 20), torch.eye(20).bool()) for _ in range(words))
    return ComparisonRow(
        f"m{number}",
        label or f"Method {number}",
        GROUPS[number * 3 // 60 % 3],
        {},
        status,
        note,
        maps,
        maps,
        tuple(whole or (n < 1 and status == "partial") for n in range(words)),
        None,
        Cost(1, 1, 0.5),
        scores,
    )


def compared(rows=3, words=4, images=1, masked=False, size=(192, 160), text="word", label=None):
    """Rows whose maps are blobs, as of a made-up explanation."""
    e = made(words, size, images, text=text)
    masks = None
    if masked:
        mask = torch.zeros(size[1], size[0], dtype=torch.bool)
        mask[40:120, 40:120] = True
        masks = (mask, *[None] * (words - 1))
    token_texts = (" what", " is", *e.token_texts, " <eos>")
    return Comparison(
        e.prompt,
        e.answer,
        e.targets,
        tuple(row(i, e.maps, masks, label=label) for i in range(rows)),
        e.layout,
        TextTokens(torch.arange(len(token_texts)), torch.arange(len(token_texts)), token_texts, 2),
        e.commit_steps(),
        {"family": "mini", "regime": "full", "layer": 2, "score": "commit"},
        {},
        e.images,
        masks,
    )


def dark(comparison):
    """On dark pictures, where red is heat alone."""
    images = tuple(i.point(lambda v: v // 8) for i in comparison.images)
    return replace(comparison, images=images)


def edges_are_paper(panel):
    pixels = np.asarray(panel)
    return all(
        bool((edge == 255).all())
        for edge in (pixels[:8], pixels[-8:], pixels[:, :8], pixels[:, -8:])
    )


@pytest.mark.parametrize(
    ("rows", "words"), [(1, 1), (1, 30), (3, 4), (12, 4), (12, 12), (60, 1), (60, 4), (60, 12)]
)
def test_panel_of_any_number(rows, words):
    panel = comparison_panel(compared(rows, words), width=800)
    assert panel.mode == "RGB" and panel.width == 800
    assert edges_are_paper(panel), "something runs over the margin"
    if rows * words <= 240:
        assert 0.5 < panel.height / panel.width < 1.6


@pytest.mark.parametrize("images", [2, 3, 7])
@pytest.mark.parametrize("size", [(300, 60), (60, 300)])
def test_panel_of_several_and_odd_pictures(images, size):
    assert edges_are_paper(comparison_panel(compared(5, 3, images, size=size), width=800))


def test_long_names_and_words_are_clipped():
    comparison = compared(12, 3, text="unpronounceable" * 9, label="A method " * 20)
    assert edges_are_paper(comparison_panel(comparison, width=800))


@pytest.mark.parametrize(
    ("rows", "words", "blocks", "scale"), ((12, 4, 2, "map"), (4, 12, 1, "row"))
)
def test_every_cell_shows_its_word_by_its_method(rows, words, blocks, scale):
    """Every map has its one hot token elsewhere; cells stand in rows by method, block after block,
    and in columns by word, section after section."""
    hot = torch.eye(48).view(rows, words, 6, 8) * torch.rand(rows, words, 1, 1).add(0.5)
    every = tuple(row(i, (maps,)) for i, maps in enumerate(hot))
    comparison = replace(compared(1, words), rows=every)
    panel = comparison_panel(comparison, width=800, scale=scale, mode="nearest", cmap="viridis")
    own = _Panel(comparison, 800, scale, "viridis", "nearest")
    sections = own.plan.sections(words)
    assert len(own.parts) == blocks
    at = {}
    for i in range(rows):
        for n in range(words):
            ((picture, _),) = own.cells.pictures(i, n)
            assert hottest(picture, own.cells._grounds[0]) == divmod(i * words + n, 8)
            at[i, n] = found_at(panel, picture)
    for section in sections:
        for part in own.parts:
            lines = [[at[i, n] for n in section] for i in part]
            assert all(len({y for _, y in line}) == 1 for line in lines)
            assert all([x for x, _ in line] == [x for x, _ in lines[0]] for line in lines)
            assert [x for x, _ in lines[0]] == sorted({x for x, _ in lines[0]})
            assert [line[0][1] for line in lines] == sorted({line[0][1] for line in lines})
        starts = [at[part[0], section[0]][0] for part in own.parts]
        assert starts == sorted(set(starts))
    tops = [at[0, section[0]][1] for section in sections]
    assert tops == sorted(set(tops))


def test_only_the_words_that_a_budget_cut_off_are_marked():
    """A corner on cells of words 1 and 2 of the middle method, and nowhere else."""
    comparison = compared(3, 3)
    maps = comparison.rows[0].maps
    rows = (row(0, maps), row(1, maps, status="partial"), row(2, maps))
    panel = np.asarray(comparison_panel(replace(comparison, rows=rows), width=800))
    marked = (panel == np.asarray(PARTIAL, dtype=np.uint8)).all(-1)
    sizes = [int(one.sum()) for one in regions(marked)]
    corners = [size for size in sizes if size > 30]
    assert len(corners) == 3 and len(set(corners[1:])) == 1  # the legend's and two cells'
    whole = comparison_panel(replace(comparison, rows=(row(0, maps),) * 3), width=800)
    assert not has(whole, PARTIAL)


def hottest(picture, ground):
    """Row and column of the token, of 6 x 8, that differs most from the ground."""
    change = np.abs(np.asarray(picture).astype(int) - np.asarray(ground)).sum(-1)
    y, x = np.argwhere(change > 0.9 * change.max()).mean(0)
    return int((y + 0.5) * 6 // picture.height), int((x + 0.5) * 8 // picture.width)


def regions(mask):
    """Connected parts of a mask, from above."""
    numbers, count = ndimage.label(mask)
    return [numbers == n + 1 for n in range(count)]


def test_panel_of_an_answer_without_words_has_its_header():
    comparison = compared(2, 1)
    rows = tuple(row(i, (torch.zeros(0, 6, 8),)) for i in range(2))
    empty = replace(comparison, targets=(), commit_steps=(), rows=rows)
    assert comparison_panel(empty, width=600).height > 0


def test_panel_is_deterministic_and_changes_nothing():
    comparison = compared(5, 2, masked=True)
    before = [m.clone() for r in comparison.rows for m in r.maps]
    assert comparison_panel(comparison, width=700) == comparison_panel(comparison, width=700)
    after = [m for r in comparison.rows for m in r.maps]
    assert all(map(torch.equal, before, after))


def has(panel, color):
    return bool((np.asarray(panel) == np.asarray(color, dtype=np.uint8)).all(-1).any())


def test_failed_and_unfinished_rows_are_marked():
    comparison = compared(3, 3)
    assert not has(comparison_panel(comparison, width=600), FAILED)
    zero = tuple(torch.zeros_like(m) for m in comparison.rows[0].maps)
    failed = row(1, zero, status="failed", note="MethodError: no attention weights")
    whole = comparison_panel(replace(comparison, rows=(comparison.rows[0], failed)), width=600)
    assert has(whole, FAILED) and not has(whole, PARTIAL)
    partial = row(2, comparison.rows[0].maps, status="partial", note="budget")
    assert has(comparison_panel(replace(comparison, rows=(partial,)), width=600), PARTIAL)
    many = [row(i, zero, status="failed", note="MethodError: " + "why " * 99) for i in range(6)]
    assert edges_are_paper(comparison_panel(replace(compared(1, 1), rows=tuple(many)), width=600))


def thumbnails(comparison, scale="map", width=96, mode="bilinear"):
    return Thumbnails(comparison, width, scale, "inferno", mode)


def heat(thumbnail):
    """How far every pixel is from the dark ground: the red channel rises with the value."""
    return np.asarray(thumbnail).astype(int)[..., 0]


@pytest.mark.parametrize("mode", ["bilinear", "nearest"])
def test_the_hottest_cell_is_hot(mode):
    comparison = compared(1, 2)
    maps = torch.zeros(2, 6, 8)
    maps[0, 1, 6] = 3.0
    comparison = replace(comparison, rows=(row(0, (maps,)),))
    ((drawn, at),) = thumbnails(comparison, mode=mode).pictures(0, 0)
    assert at == (0, 0) and drawn.size == (96, 80)
    red = heat(drawn)
    y, x = np.unravel_index(red.argmax(), red.shape)
    assert 6 <= x / 96 * 8 < 7 and 1 <= y / 80 * 6 < 2
    ((flat, _),) = thumbnails(comparison).pictures(0, 1)
    assert heat(flat).max() < red.max()  # the plain picture


def test_tokens_smaller_than_a_pixel_are_not_skipped():
    e = compared(1, 1, size=(160, 160))
    for cell in ((0, 0), (31, 77), (50, 3)):
        maps = torch.zeros(1, 80, 80)
        maps[0][cell] = 1.0
        grid = uniform_grid(0, (80, 80), (160, 160))
        one = replace(e, layout=Layout((grid,), 6400), rows=(row(0, (maps,)),))
        ((drawn, _),) = thumbnails(one, width=20).pictures(0, 0)
        base = thumbnails(replace(one, rows=(row(0, (maps * 0,)),)), width=20).pictures(0, 0)[0][0]
        change = np.abs(np.asarray(drawn).astype(int) - np.asarray(base)).sum(-1)
        y, x = np.unravel_index(change.argmax(), change.shape)
        assert (y, x) == (cell[0] // 4, cell[1] // 4)


def test_scales():
    comparison = dark(compared(1, 2))
    maps = torch.stack((comparison.rows[0].maps[0][0], comparison.rows[0].maps[0][0] / 10))
    comparison = replace(comparison, rows=(row(0, (maps,)),))
    strong, faint = (thumbnails(comparison, "map").pictures(0, n)[0][0] for n in (0, 1))
    assert strong == faint  # each to its own maximum
    strong, faint = (thumbnails(comparison, "row").pictures(0, n)[0][0] for n in (0, 1))
    assert heat(strong).max() > heat(faint).max() + 60
    with pytest.raises(ValueError, match="scale is 'word'"):
        comparison_panel(comparison, scale="word")
    with pytest.raises(ValueError, match="width is 100"):
        comparison_panel(comparison, width=100)


def test_several_pictures_share_a_words_scale():
    comparison = dark(compared(1, 1, images=2))  # the second picture's maps are half as strong
    first, second = thumbnails(comparison, width=200).pictures(0, 0)
    assert heat(first[0]).max() > heat(second[0]).max() + 60
    assert first[1] != second[1]


def test_masks_are_outlined_where_they_are():
    plain, masked = dark(compared(1, 2)), dark(compared(1, 2, masked=True))
    a, b = (np.asarray(thumbnails(c).pictures(0, 0)[0][0]).astype(int) for c in (plain, masked))
    changed = np.abs(a - b).sum(-1) > 0
    assert changed[20:60, 20].all() and changed[20, 20:60].all()  # 40 px of 160 are 20 of 80
    assert not changed[25:55, 25:55].any() and not changed[:20].any()
    second = [thumbnails(c).pictures(0, 1)[0][0] for c in (plain, masked)]
    assert second[0] == second[1]
    assert OUTLINE == (255, 255, 255)


def test_maps_that_are_no_numbers_or_missing_are_blank():
    comparison = compared(1, 2)
    maps = comparison.rows[0].maps[0].clone()
    maps[0, 2, 2] = float("nan")
    broken = replace(comparison, rows=(row(0, (maps,)),))
    for scale in ("map", "row"):
        assert thumbnails(broken, scale).pictures(0, 0) is None
        assert thumbnails(broken, scale).pictures(0, 1) is not None
    missing = row(0, (torch.zeros(2, 6, 8),), status="partial")
    assert thumbnails(replace(comparison, rows=(missing,))).pictures(0, 1) is None
    assert edges_are_paper(comparison_panel(broken, width=600))
    assert edges_are_paper(comparison_panel(replace(comparison, rows=(missing,)), width=600))


def test_words_and_methods_are_all_laid_out():
    for rows, words in ((1, 1), (3, 4), (12, 12), (60, 12), (60, 40), (7, 100)):
        plan = plan_of(rows, 3, words, 1.0, 120.0)
        assert [n for part in plan.sections(words) for n in part] == list(range(words))
        parts = plan.split([30] * rows)
        assert [i for part in parts for i in part] == list(range(rows))
        assert all(parts) and len(parts) == plan.blocks and plan.cell >= SMALLEST
    assert plan_of(60, 8, 4, 1.0, 120.0).blocks in (2, 3)


def test_places_fill_the_cell_without_overlap():
    found = places([(100, 50), (50, 100), (80, 80)], 101)
    for k, (x, y, w, h) in enumerate(found):
        assert x >= 0 and x + w <= 101
        for a, b, c, d in found[:k]:
            assert x >= a + c or a >= x + w or y >= b + d or b >= y + h


def test_seconds_are_short():
    given = (0.0312, 0.52, 7.123, 123.4)
    assert [seconds_text(s) for s in given] == ["0.031 s", "0.52 s", "7.1 s", "123 s"]


def test_scene_masks_need_no_explanation():
    scene = make_scene(7, 0)
    group = scene.groups[0]
    token_texts = [" a", f" {group.color}", f" {group.shape}", " nothing"]
    expected = torch.from_numpy(scene.mask_of(group.color, group.shape))
    for n in (1, 2):
        assert torch.equal(
            scene_mask(scene, token_texts, Target(token_texts[n], (n,), (0,))), expected
        )
    assert scene_mask(scene, token_texts, Target("nothing", (3,), (0,))) is None
