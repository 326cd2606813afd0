r"""A word was exchanged: every word's map before and after, side by side."""

from __future__ import annotations

import math

from PIL import Image

from captum_dcam.errors import InputError
from captum_dcam.results.edit import Edit
from captum_dcam.viewer.ink import (
    INNER,
    MUTED,
    SMALL,
    Color,
    Ink,
    Run,
    header,
    legend,
    running,
    settings_line,
    stacked,
)
from captum_dcam.viewer.overlay import CMAP, fitted, word_overlay

#: colours of the exchanged word, and of the others
EXCHANGED: Color = (255, 214, 153)
SAME: Color = (226, 232, 240)
#: pairs of maps side by side
COLUMNS = 3


def edit_sheet(edit: Edit, *, image: int = 0, width: int = 1600, cmap: str = CMAP) -> Image.Image:
    r"""Draw an edit: both answers, and for every word its map before and after.

    Below each pair: the rank correlation of the two maps, the distance of their peaks in percent of
    the image's diagonal, and the overlap of their highest tenths. The exchanged word has a colour.

    Args:
        edit (Edit): from :func:`captum_dcam.exchange_word`.
        image (int, optional): number of the image. Default: 0
        width (int, optional): of the sheet in pixels. Default: 1600
        cmap (str, optional): a matplotlib colour map. Default: ``"inferno"``

    Returns:
        PIL.Image.Image: RGB.
    """
    if width < 300:
        raise InputError(f"width is {width} px: nothing can be read below 300")
    ink, one = Ink(width), edit.before
    colors = [EXCHANGED if new else SAME for new in edit.exchanged]
    before, after = (running(e.token_texts, e.targets, colors) for e in (one, edit.after))
    said = [*before, Run("→"), *after]
    columns, gap = min(COLUMNS, max(2, len(one.words))), ink.px(22)
    room = (ink.px(INNER) - gap * (columns - 1)) // columns
    half = (room - ink.px(4)) // 2
    size = fitted(one.images[image].size, half, half * 1.2)
    page, y = legend(ink)
    x = page.bar(
        (0, y), "left: before, right: after; heat: low … the word's highest", cmap, (40, 255)
    )
    settings_line(page, y, one.settings, "", page.image.width - x - ink.px(24))
    parts = [header(ink, one.images, one.prompt, said, "ANSWER BEFORE AND AFTER"), page.image]
    for start in range(0, len(one.words), columns):
        line = ink.page(ink.px(INNER), size[1] + ink.px(66))
        for column, n in enumerate(range(start, min(start + columns, len(one.words)))):
            left = column * (room + gap)
            for number, explanation in enumerate((one, edit.after)):
                heat = word_overlay(explanation, n, image, size=size, cmap=cmap)
                line.image.paste(heat, (left + number * (size[0] + ink.px(4)), 0))
            words = one.words[n], edit.after.words[n]
            name = words[0] if words[0] == words[1] else " → ".join(words)
            line.chip((left, size[1] + ink.px(18)), Run(ink.clipped(name, 15, room), colors[n]), 15)
            for below, text in zip((39, 56), _moved(edit, n), strict=True):
                line.write((left, size[1] + ink.px(below)), text, SMALL, MUTED)
        parts.append(line.image)
    return stacked(parts, ink)


def _moved(edit: Edit, n: int) -> tuple[str, str]:
    """How far a word's map moved, in two lines."""
    distance = float(edit.distance[n])
    apart = "no common peak" if math.isnan(distance) else f"peaks {distance:.0%} apart"
    ranks = f"rank correlation {float(edit.correlation[n]):.2f}"
    return ranks, f"{apart} · overlap {float(edit.overlap[n]):.0%}"
