r"""The contact sheet: picture, answer, and one panel a word, in one image."""

from __future__ import annotations

from PIL import Image, ImageDraw

from captum_dcam.errors import InputError
from captum_dcam.results.explanation import Explanation
from captum_dcam.results.summary import WordSummary, summarise
from captum_dcam.viewer.header import GAP, INNER, MARGIN, bar, header, mosaic, running
from captum_dcam.viewer.ink import MUTED, PAPER, RULE, STEP_CMAP, Ink, Run, stacked, step_color
from captum_dcam.viewer.overlay import CMAP, FLAT, fitted, word_overlay


def contact_sheet(
    explanation: Explanation,
    mode: str = "bilinear",
    *,
    width: int = 1600,
    cmap: str = CMAP,
) -> Image.Image:
    r"""Draw an explanation on one sheet.

    The picture, the prompt, the answer with a chip for every explained word (coloured by the step
    that committed it), and for every word its map over the picture, when it was committed, how sure
    the model was, and where it looks. Every word's map is scaled to its own maximum.

    Args:
        explanation (Explanation): the result; pictures of any size, one or several.
        mode (str, optional): ``bilinear``, or ``nearest`` to see the image tokens.
            Default: ``"bilinear"``
        width (int, optional): of the sheet in pixels; all else scales with it. Default: 1600
        cmap (str, optional): a matplotlib colour map for the heat. Default: ``"inferno"``

    Returns:
        PIL.Image.Image: RGB.
    """
    if width < 300:
        raise InputError(f"width is {width} px: nothing can be read below 300")
    ink = Ink(width)
    rows = summarise(explanation)
    answer = _answer(explanation, rows)
    parts = [
        header(ink, explanation.images, explanation.prompt, answer),
        _legend(ink, explanation, cmap),
    ]
    parts += _panels(ink, explanation, rows, mode, cmap)
    return stacked(parts, width, ink.px(MARGIN), ink.px(GAP))


def _answer(explanation: Explanation, rows: tuple[WordSummary, ...]) -> list[Run]:
    """The answer, its explained words in the colour of the step that committed them."""
    steps = explanation.trajectory.steps
    colors = [step_color(row.steps[-1], steps) for row in rows]
    return running(explanation.token_texts, explanation.targets, colors)


# -- legend -------------------------------------------------------------------------------------


def _legend(ink: Ink, explanation: Explanation, cmap: str) -> Image.Image:
    """What the colours mean, and the settings."""
    out = Image.new("RGB", (ink.px(INNER), ink.px(46)), PAPER)
    draw = ImageDraw.Draw(out)
    draw.line((0, 0, out.width, 0), fill=RULE, width=max(1, ink.px(1)))
    y = ink.px(30)
    steps = explanation.trajectory.steps
    x = bar(ink, out, (0, y), f"committed at step 0 … {steps - 1}", STEP_CMAP, (12, 242))
    bar(ink, out, (x + ink.px(24), y), "heat: low … the word's highest", cmap, (40, 255))
    room = out.width - x - ink.px(24 + 330)
    text = ink.clipped(_settings(explanation), 12.5, room)
    ink.write(draw, (out.width, y), text, 12.5, MUTED, anchor="rm")
    return out


def _settings(explanation: Explanation) -> str:
    s = explanation.settings
    product = f"{'centred ' if s.get('center') else ''}{s.get('product', '')}"
    parts = [
        f"{s.get('family', '')}",
        f"block {s.get('layer')}",
        f"{s.get('score')} score",
        product,
    ]
    return " · ".join(p for p in parts if p)


# -- panels -------------------------------------------------------------------------------------


def _columns(words: int, images: int) -> int:
    """Panels side by side: fewer when there are few words or several pictures."""
    columns = 3 if words <= 3 else 4 if words <= 16 else 5
    if images > 1:
        columns = 2 if images > 4 else 3
    return columns


def _panels(
    ink: Ink, explanation: Explanation, rows: tuple[WordSummary, ...], mode: str, cmap: str
) -> list[Image.Image]:
    """Lines of panels, each an image of the sheet's inner width."""
    columns = _columns(len(rows), len(explanation.images))
    gap = ink.px(18)
    width = (ink.px(INNER) - gap * (columns - 1)) // columns
    lines = []
    for start in range(0, len(rows), columns):
        panels = [
            _panel(ink, explanation, row, width, mode, cmap)
            for row in rows[start : start + columns]
        ]
        line = Image.new("RGB", (ink.px(INNER), max(p.height for p in panels)), PAPER)
        for i, panel in enumerate(panels):
            line.paste(panel, (i * (width + gap), 0))
        lines.append(line)
    return lines


def _panel(
    ink: Ink, explanation: Explanation, row: WordSummary, width: int, mode: str, cmap: str
) -> Image.Image:
    """One word: its map over the picture(s), and three lines of text."""
    heat, flat = _heat(ink, explanation, row.number - 1, width, mode, cmap)
    out = Image.new("RGB", (width, heat.height + ink.px(74)), PAPER)
    out.paste(heat, (0, 0))
    draw = ImageDraw.Draw(out)
    y = heat.height + ink.px(20)
    number = f"{row.number}"
    ink.write(draw, (width, y), number, 12.5, MUTED, anchor="rm")
    room = width - ink.length(number, 12.5) - ink.px(24)
    word = ink.clipped(row.word, 16, room)
    color = step_color(row.steps[-1], explanation.trajectory.steps)
    ink.chip(draw, (0, y), word, 16, color)
    noun = "step" if len(row.steps) == 1 else "steps"
    steps = ", ".join(map(str, row.steps))
    facts = f"{noun} {steps} · {row.confidence:.0%} sure"
    ink.write(draw, (0, y + ink.px(26)), ink.clipped(facts, 12.5, width), 12.5, MUTED)
    where = FLAT if flat else _where(explanation, row)
    ink.write(draw, (0, y + ink.px(43)), ink.clipped(where, 12.5, width), 12.5, MUTED)
    return out


def _where(explanation: Explanation, row: WordSummary) -> str:
    prefix = f"picture {row.image + 1}, " if len(explanation.images) > 1 else ""
    return f"focus: {prefix}{row.region}"


def _heat(
    ink: Ink, explanation: Explanation, number: int, width: int, mode: str, cmap: str
) -> tuple[Image.Image, bool]:
    """Overlay of a word on every picture, and whether all its maps are flat."""
    images = explanation.images
    columns = 1 if len(images) == 1 else 2 if len(images) <= 4 else 3
    cell = (width - ink.px(6) * (columns - 1)) // columns
    shown = [
        word_overlay(
            explanation,
            number,
            i,
            size=fitted(picture.size, cell, cell * 1.2),
            mode=mode,
            cmap=cmap,
        )
        for i, picture in enumerate(images)
    ]
    return mosaic(ink, shown), all("note" in s.info for s in shown)
