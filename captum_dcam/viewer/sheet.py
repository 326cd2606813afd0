r"""The contact sheet: picture, answer, and one panel a word, in one image."""

from __future__ import annotations

from PIL import Image, ImageDraw

from captum_dcam.explanation import Explanation
from captum_dcam.viewer.ink import (
    MUTED,
    PAPER,
    RULE,
    STEP_CMAP,
    Color,
    Ink,
    Run,
    stacked,
    step_color,
)
from captum_dcam.viewer.overlay import CMAP, FLAT, fitted, scaled, word_overlay
from captum_dcam.viewer.summary import WordSummary, summarise

MARGIN, GAP = 28, 22
INNER = 1000 - 2 * MARGIN
BODY = 17.0


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
        raise ValueError(f"width is {width} px: nothing can be read below 300")
    ink = Ink(width)
    rows = summarise(explanation)
    parts = [_header(ink, explanation, rows), _legend(ink, explanation, cmap)]
    parts += _panels(ink, explanation, rows, mode, cmap)
    return stacked(parts, width, ink.px(MARGIN), ink.px(GAP))


# -- header -------------------------------------------------------------------------------------


def _header(ink: Ink, explanation: Explanation, rows: tuple[WordSummary, ...]) -> Image.Image:
    """Picture on the left; prompt and answer on the right."""
    picture = _pictures(ink, explanation)
    left = picture.width + ink.px(26)
    room = ink.px(INNER) - left
    prompt = ink.lines([Run(w) for w in explanation.prompt.split()], BODY, room)
    answer = ink.lines(_runs(explanation, rows), BODY, room)
    need = ink.px(24) * 2 + ink.px(27) * len(prompt) + ink.px(34) * len(answer) + ink.px(16 + 4)
    out = Image.new("RGB", (ink.px(INNER), max(picture.height, need)), PAPER)
    out.paste(picture, (0, 0))
    draw = ImageDraw.Draw(out)
    y = _label(ink, draw, (left, 0), "PROMPT")
    y = ink.flow(draw, (left, y), prompt, BODY, 27) + ink.px(16)
    y = _label(ink, draw, (left, y), "ANSWER")
    ink.flow(draw, (left, y), answer, BODY, 34)
    return out


def _label(ink: Ink, draw: ImageDraw.ImageDraw, at: tuple[float, float], text: str) -> float:
    ink.write(draw, (at[0], at[1] + ink.px(9)), text, 11.5, MUTED, bold=True)
    return at[1] + ink.px(24)


def _pictures(ink: Ink, explanation: Explanation) -> Image.Image:
    """The request's picture, or a mosaic of its pictures."""
    images = explanation.images
    if len(images) == 1:
        size = fitted(images[0].size, ink.px(330), ink.px(270))
        return ink.rounded(scaled(images[0], size))
    cell = ink.px(160 if len(images) <= 4 else 105)
    return _mosaic(ink, [scaled(i, fitted(i.size, cell, cell)) for i in images], cell)


def _mosaic(ink: Ink, pictures: list[Image.Image], cell: int) -> Image.Image:
    """Pictures side by side, two a row (three when there are more than four), tops aligned."""
    columns = 1 if len(pictures) == 1 else 2 if len(pictures) <= 4 else 3
    lines = [pictures[i : i + columns] for i in range(0, len(pictures), columns)]
    gap = ink.px(6)
    heights = [max(p.height for p in line) for line in lines]
    width = max(sum(p.width for p in line) + gap * (len(line) - 1) for line in lines)
    out = Image.new("RGB", (width, sum(heights) + gap * (len(lines) - 1)), PAPER)
    y = 0
    for line, height in zip(lines, heights, strict=True):
        x = 0
        for picture in line:
            out.paste(ink.rounded(picture), (x, y))
            x += picture.width + gap
        y += height + gap
    return out


def _runs(explanation: Explanation, rows: tuple[WordSummary, ...]) -> list[Run]:
    """The answer as running text; tokens of an explained word are one chip."""
    owner: dict[int, int] = {}
    for n, target in enumerate(explanation.targets):
        for position in target.positions:
            owner.setdefault(position, n)
    runs: list[Run] = []
    last: int | None = None
    for position, piece in enumerate(explanation.pieces):
        text, word = piece.strip(), owner.get(position)
        if not text:
            continue
        glued = not piece[:1].isspace()
        if runs and ((word is not None and word == last) or (word is None is last and glued)):
            runs[-1] = Run(
                runs[-1].text + ("" if glued else " ") + text, runs[-1].color, runs[-1].glued
            )
        else:
            runs.append(Run(text, _color(explanation, rows, word), glued))
        last = word
    return runs or [Run("(empty)")]


def _color(
    explanation: Explanation, rows: tuple[WordSummary, ...], word: int | None
) -> Color | None:
    return None if word is None else step_color(rows[word].steps[-1], explanation.trajectory.steps)


# -- legend -------------------------------------------------------------------------------------


def _legend(ink: Ink, explanation: Explanation, cmap: str) -> Image.Image:
    """What the colours mean, and the settings."""
    out = Image.new("RGB", (ink.px(INNER), ink.px(46)), PAPER)
    draw = ImageDraw.Draw(out)
    draw.line((0, 0, out.width, 0), fill=RULE, width=max(1, ink.px(1)))
    y = ink.px(30)
    steps = explanation.trajectory.steps
    x = _bar(ink, out, (0, y), f"committed at step 0 … {steps - 1}", STEP_CMAP, (12, 242))
    _bar(ink, out, (x + ink.px(24), y), "heat: low … the word's highest", cmap, (40, 255))
    room = out.width - x - ink.px(24 + 330)
    text = ink.clipped(_settings(explanation), 12.5, room)
    ink.write(draw, (out.width, y), text, 12.5, MUTED, anchor="rm")
    return out


def _bar(
    ink: Ink, out: Image.Image, at: tuple[int, int], text: str, cmap: str, ends: tuple[int, int]
) -> int:
    """A colour bar and its label; returns the x behind them."""
    ramp = ink.ramp((ink.px(72), ink.px(9)), cmap, *ends)
    out.paste(ink.rounded(ramp, 3), (at[0], at[1] - ramp.height // 2))
    x = at[0] + ramp.width + ink.px(9)
    ink.write(ImageDraw.Draw(out), (x, at[1]), text, 12.5, MUTED)
    return x + round(ink.length(text, 12.5))


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
    return _mosaic(ink, shown, cell), all("note" in s.info for s in shown)
