r"""The contact sheet: image, answer, and one panel per word, in one picture."""

from __future__ import annotations

from collections.abc import Sequence

from PIL import Image

from captum_dcam.errors import InputError
from captum_dcam.results.explanation import Explanation
from captum_dcam.results.summary import WordSummary, summarise
from captum_dcam.viewer.fonts import EMPTY
from captum_dcam.viewer.ink import (
    BODY,
    INNER,
    MUTED,
    SMALL,
    STEP_CMAP,
    Color,
    Ink,
    Run,
    header,
    legend,
    mosaic,
    mosaic_cell,
    running,
    settings_line,
    stacked,
    step_color,
    titled,
)
from captum_dcam.viewer.overlay import CMAP, FLAT, fitted, word_overlay

#: of a word that a calibrator doubts
DOUBT: Color = (178, 60, 0)
#: more words than this stand eight in a line; in a panel narrower than this words are short
MANY, BRIEF = 35, 140


def contact_sheet(
    explanation: Explanation,
    mode: str = "bilinear",
    *,
    width: int = 1600,
    cmap: str = CMAP,
) -> Image.Image:
    r"""Draw an explanation on one sheet.

    The image, the prompt, the answer with a chip for every explained word (coloured by the step
    that committed it), and for every word its map over the image, when it was committed, how sure
    the model was, where it looks, and how well the map localises; and, where they were computed,
    what the steps say of whether it is so, and whether a calibrator doubts it. Every word's map is
    scaled to its own maximum; one that is said to localise nothing is faint.

    Args:
        explanation (Explanation): the result; images of any size, one or several.
        mode (str, optional): ``bilinear``, or ``nearest`` to see the image tokens.
            Default: ``"bilinear"``
        width (int, optional): of the sheet in pixels; all else scales with it. Default: 1600
        cmap (str, optional): a matplotlib colour map for the heat. Default: ``"inferno"``

    Returns:
        PIL.Image.Image: RGB.
    """
    if width < 300:
        raise InputError(f"width is {width} px: nothing can be read below 300")
    ink, rows, images = Ink(width), summarise(explanation), explanation.images
    colors = [step_color(row.steps[-1], explanation.trajectory.steps) for row in rows]
    answer = running(explanation.token_texts, explanation.targets, colors)
    parts = [
        *warning(ink, explanation),
        *judge(ink, explanation, rows),
        header(ink, images, explanation.prompt, answer, titled(explanation)),
        _legend(ink, explanation, cmap),
    ]
    columns, gap = _columns(len(rows), len(explanation.layout.images)), ink.px(18)
    room = (ink.px(INNER) - gap * (columns - 1)) // columns
    seen = explanation.layout.images
    cell = mosaic_cell(ink, len(seen), room)
    sizes = [fitted(images[i].size, cell, cell * 1.2) for i in seen]
    for start in range(0, len(rows), columns):
        panels = []
        for row, color in list(zip(rows, colors, strict=True))[start : start + columns]:
            heat = [
                word_overlay(explanation, row.number - 1, i, size=size, mode=mode, cmap=cmap)
                for i, size in zip(seen, sizes, strict=True)
            ]
            panels.append(_panel(ink, row, color, heat, room))
        line = ink.page(ink.px(INNER), max(p.height for p in panels)).image
        for i, panel in enumerate(panels):
            line.paste(panel, (i * (room + gap), 0))
        parts.append(line)
    return stacked(parts, ink)


def warning(ink: Ink, explanation: Explanation) -> list[Image.Image]:
    """What a reader must know before anything else, if there is anything."""
    text = "" if explanation.trust is None else explanation.trust.warning
    if not text:
        return []
    lines = ink.lines([Run(w) for w in f"Beware: {text}".split()], 15, ink.px(INNER))
    page = ink.page(ink.px(INNER), ink.px(24) * len(lines))
    page.flow((0, 0), lines, 15, 24)
    return [page.image]


def judge(ink: Ink, explanation: Explanation, rows: Sequence[WordSummary]) -> list[Image.Image]:
    """Which calibrator doubts words, if one doubts any."""
    if not any(row.doubted for row in rows):
        return []
    assert explanation.trust is not None
    scores = explanation.trust.scores
    said = f"Not grounded?: doubted below {scores.below:.0%} by the calibrator {scores.calibrator}"
    lines = ink.lines([Run(w) for w in said.split()], 13, ink.px(INNER))
    page = ink.page(ink.px(INNER), ink.px(21) * len(lines))
    page.flow((0, 0), lines, 13, 21)
    return [page.image]


def _columns(words: int, images: int) -> int:
    """Panels side by side: fewer when there are few words or several images, more where a long
    answer would make a sheet that nobody scrolls through."""
    if images > 1:
        return 2 if images > 4 else 3
    return 3 if words <= 3 else 4 if words <= 16 else 5 if words <= MANY else 8


def _legend(ink: Ink, explanation: Explanation, cmap: str) -> Image.Image:
    """What the colours mean, and the settings."""
    page, y = legend(ink)
    last = explanation.trajectory.steps - 1
    means = "hidden in state" if explanation.trajectory.forced else "committed at step"
    x = page.bar((0, y), f"{means} 0 … {last}", STEP_CMAP, (12, 242))
    page.bar((x + ink.px(24), y), "heat: low … the word's highest", cmap, (40, 255))
    s = explanation.settings
    product = f"{'centered ' if s.get('center') else ''}{s.get('product', '')}"
    settings_line(page, y, s, product, page.image.width - x - ink.px(24 + 330))
    return page.image


def _panel(
    ink: Ink, row: WordSummary, color: Color, heat: Sequence[Image.Image], width: int
) -> Image.Image:
    """One word: its map over the image or images, and three lines of text."""
    shown = mosaic(ink, heat)
    page = ink.page(width, shown.height + ink.px(74 + (17 if row.said else 0)))
    page.image.paste(shown, (0, 0))
    y = shown.height + ink.px(20)
    number = str(row.number)
    page.write((width, y), number, SMALL, MUTED, anchor="rm")
    room = width - ink.length(number, SMALL) - ink.px(24)
    page.chip((0, y), Run(ink.clipped(row.word or EMPTY, 16, room), color), 16)
    steps = f"step{'' if len(row.steps) == 1 else 's'} {row.when}".replace("step given", "given")
    focus = f"image {row.image + 1}, {row.region}" if len(heat) > 1 else row.region
    brief = width < ink.px(BRIEF)
    where = FLAT if all("note" in one.info for one in heat) else focus
    where = where if brief or where == FLAT else f"focus: {where}"
    if row.localises is not None and where != FLAT:
        said = "localises nothing" if row.doubtful else f"{where} · localises"
        where = f"{said} ({row.localises:.0%})" if row.doubtful else f"{said} {row.localises:.0%}"
    sure = f"p {row.confidence:.0%}" if brief else f"probability {row.confidence:.0%}"
    lines = [(26, f"{steps} · {sure}", MUTED), (43, where, MUTED)]
    if row.said:
        lines.append((60, row.said, DOUBT if row.doubted else MUTED))
    for below, text, shade in lines:
        page.write((0, y + ink.px(below)), ink.clipped(text, SMALL, width), SMALL, shade)

    return page.image


def captioned(picture: Image.Image, explanation: Explanation, number: int) -> Image.Image:
    """A word's picture with what it is below: the word, its step and probability, its place, what
    the colours mean, and the model."""
    row, s = summarise(explanation)[number], explanation.settings
    ink = Ink(max(1000, round(picture.width * 1.4)))
    steps = f"step{'' if len(row.steps) == 1 else 's'} {', '.join(map(str, row.steps))}"
    facts = f"{steps} · probability {row.confidence:.0%} · highest: {row.region}"
    made = (s.get("family"), f"block {s.get('layer')}", f"{s.get('score')} score", s.get("preset"))
    page = ink.page(picture.width, picture.height + ink.px(82))
    page.image.paste(picture, (0, 0))
    left, room, y = ink.px(8), picture.width - ink.px(16), picture.height
    page.write((left, y + ink.px(16)), ink.clipped(row.word or EMPTY, BODY, room), BODY, bold=True)
    page.write((left, y + ink.px(36)), ink.clipped(facts, SMALL, room), SMALL, MUTED)
    page.bar((left, y + ink.px(53)), "0 … the highest of this map", CMAP, (40, 255))
    model = ink.clipped(" · ".join(str(m) for m in made if m), SMALL, room)
    page.write((left, y + ink.px(70)), model, SMALL, MUTED)
    return page.image
