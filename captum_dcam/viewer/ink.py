r"""What sheets and panels are drawn with: fonts, measures, chips, running text, header, legend."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

from captum_dcam.model.words import Target
from captum_dcam.results.comparison import Comparison
from captum_dcam.results.explanation import Explanation
from captum_dcam.viewer import fonts
from captum_dcam.viewer.overlay import fitted, palette, scaled

Color = tuple[int, int, int]
PAPER: Color = (255, 255, 255)
TEXT: Color = (31, 35, 40)
MUTED: Color = (101, 109, 118)
RULE: Color = (216, 222, 228)
STEP_CMAP = "viridis"
#: thousandths of the width: around everything, between parts, what is left, text of the answer
MARGIN, GAP = 28, 22
INNER = 1000 - 2 * MARGIN
BODY, SMALL = 17.0, 12.5


def step_color(step: int, steps: int) -> Color:
    """Colour of a commit step: early dark, late light."""
    r, g, b = palette(STEP_CMAP)[round(12 + 230 * max(step, 0) / max(steps - 1, 1))].tolist()
    return r, g, b


@dataclass(frozen=True)
class Run:
    """A stretch of running text; with a colour it is a chip. ``glued``: no space before it."""

    text: str
    color: Color | None = None
    glued: bool = False


#: a line of running text: each run with its x in pixels
Line = list[tuple[float, Run]]


@dataclass(frozen=True)
class Ink:
    r"""Measures of a sheet: everything is in thousandths of its width.

    Args:
        width (int): of the sheet in pixels.
    """

    width: int

    def px(self, units: float) -> int:
        """Pixels of a length in thousandths of the width."""
        return round(units * self.width / 1000)

    def page(self, width: int, height: int) -> Page:
        """A blank part of the sheet, in pixels."""
        image = Image.new("RGB", (width, height), PAPER)
        return Page(self.width, image, ImageDraw.Draw(image))

    def size(self, units: float) -> int:
        """Size of a font in pixels."""
        return max(1, self.px(units))

    def length(self, text: str, units: float, bold: bool = False) -> float:
        """Width of a text in pixels."""
        size = self.size(units)
        found = fonts.parts(text, bold)
        return sum(fonts.font(size, bold, file).getlength(part) for part, file in found)

    def clipped(self, text: str, units: float, width: float) -> str:
        """The text, or its beginning and an ellipsis, in at most ``width`` pixels."""
        if self.length(text, units) <= width:
            return text
        while text and self.length(text + "…", units) > width:
            text = text[:-1]
        return text.rstrip() + "…"

    def lines(self, runs: Sequence[Run], units: float, width: float) -> list[Line]:
        """Lines of at most ``width`` pixels; a run longer than that is clipped."""
        out: list[Line] = [[]]
        x = 0.0
        for run in runs:
            text = self.clipped(run.text, units, width - 2 * self.px(units * 0.5))
            own = Run(text, run.color, run.glued)
            gap = 0.0 if run.glued or not out[-1] else self.px(units * 0.36)
            need = self._run_width(own, units)
            if out[-1] and x + gap + need > width:
                out.append([])
                x = gap = 0.0
            out[-1].append((x + gap, own))
            x += gap + need
        return out

    def _run_width(self, run: Run, units: float) -> float:
        pads = 0 if run.color is None else 2 * self.px(units * 0.5)
        return self.length(run.text, units) + pads

    def rounded(self, picture: Image.Image, units: float = 5) -> Image.Image:
        """The picture with round corners on paper."""
        k = 3
        big = Image.new("L", (picture.width * k, picture.height * k), 0)
        box = (0, 0, big.width - 1, big.height - 1)
        radius = min(self.px(units), *picture.size) * k
        ImageDraw.Draw(big).rounded_rectangle(box, radius=radius, fill=255)
        mask = big.resize(picture.size, Image.Resampling.BOX)
        return Image.composite(picture, Image.new("RGB", picture.size, PAPER), mask)


@dataclass(frozen=True)
class Page(Ink):
    """A part of a sheet to draw on, in pixels from its upper left corner."""

    image: Image.Image
    draw: ImageDraw.ImageDraw

    def write(
        self,
        at: tuple[float, float],
        text: str,
        units: float,
        color: Color = TEXT,
        bold: bool = False,
        anchor: str = "lm",
    ) -> None:
        """A text whose left middle, or another anchor of Pillow's, is ``at``."""
        size, found = self.size(units), fonts.parts(text, bold)
        if len(found) == 1:
            ((text, file),) = found
            self.draw.text(at, text, fill=color, font=fonts.font(size, bold, file), anchor=anchor)
            return
        # several fonts: one baseline, that of DejaVu Sans
        (x, y), (ascent, descent) = at, fonts.font(size, bold).getmetrics()
        y += {"m": (ascent - descent) / 2, "a": ascent, "d": -descent, "s": 0}[anchor[1]]
        x -= {"l": 0.0, "m": 0.5, "r": 1.0}[anchor[0]] * self.length(text, units, bold)
        for part, file in found:
            own = fonts.font(size, bold, file)
            self.draw.text((x, y), part, fill=color, font=own, anchor="ls")
            x += own.getlength(part)

    def rule(self, start: float, y: float, end: float, units: float = 1) -> None:
        """A grey horizontal line."""
        self.draw.line((start, y, end, y), fill=RULE, width=max(1, self.px(units)))

    def chip(self, at: tuple[float, float], run: Run, units: float) -> None:
        """A run of text whose left middle is ``at``: in a rounded box if it has a colour."""
        if run.color is None:
            self.write(at, run.text, units)
            return
        (x, y), half, width = at, self.px(units * 0.82), self._run_width(run, units)
        box = (x, y - half, x + width, y + half)
        self.draw.rounded_rectangle(box, radius=self.px(units * 0.4), fill=run.color)
        r, g, b = run.color
        reads_well = TEXT if 0.299 * r + 0.587 * g + 0.114 * b > 140 else PAPER
        self.write((x + width / 2, y), run.text, units, reads_well, anchor="mm")

    def flow(
        self, at: tuple[float, float], lines: Sequence[Line], units: float, leading: float
    ) -> float:
        """Draw lines of runs from the upper left corner ``at``; returns the y below them."""
        y = at[1]
        for line in lines:
            for x, run in line:
                self.chip((at[0] + x, y + self.px(leading) / 2), run, units)
            y += self.px(leading)
        return y

    def note(self, at: tuple[int, int], text: str) -> int:
        """A small grey text; returns the x behind it."""
        self.write(at, text, SMALL, MUTED)
        return at[0] + round(self.length(text, SMALL))

    def bar(self, at: tuple[int, int], text: str, cmap: str, ends: tuple[int, int]) -> int:
        """A colour bar and its label; returns the x behind them."""
        index = np.rint(np.linspace(*ends, self.px(72))).astype(int)
        ramp = Image.fromarray(np.repeat(palette(cmap)[index][None], self.px(9), axis=0))
        self.image.paste(self.rounded(ramp, 3), (at[0], at[1] - ramp.height // 2))
        return self.note((at[0] + ramp.width + self.px(9), at[1]), text)


# -- parts that sheets and panels share ------------------------------------------------------------


def titled(result: Explanation | Comparison) -> str:
    """What stands over its answer: who wrote it."""
    if isinstance(result, Explanation) and result.trajectory.given is not None:
        return "FILLED ANSWER"
    forced = result.forced if isinstance(result, Comparison) else result.trajectory.forced
    return "GIVEN ANSWER" if forced else "ANSWER"


def header(
    ink: Ink, images: Sequence[Image.Image], prompt: str, answer: Sequence[Run], title: str
) -> Image.Image:
    """The image or a mosaic of the images on the left; prompt and answer, under its ``title``, on
    the right."""
    if len(images) == 1:
        size = fitted(images[0].size, ink.px(330), ink.px(270))
        shown = ink.rounded(scaled(images[0], size))
    else:
        cell = ink.px(160 if len(images) <= 4 else 105)
        shown = mosaic(ink, [scaled(i, fitted(i.size, cell, cell)) for i in images])
    left = shown.width + ink.px(26)
    room = ink.px(INNER) - left
    asked = ink.lines([Run(w) for w in prompt.split()], BODY, room)
    said = ink.lines(answer, BODY, room)
    need = ink.px(24) * 2 + ink.px(27) * len(asked) + ink.px(34) * len(said) + ink.px(16 + 4)
    page = ink.page(ink.px(INNER), max(shown.height, need))
    page.image.paste(shown, (0, 0))
    y = 0.0
    for head, lines, leading in (("PROMPT", asked, 27), (title, said, 34)):
        page.write((left, y + ink.px(9)), head, 11.5, MUTED, bold=True)
        y = page.flow((left, y + ink.px(24)), lines, BODY, leading) + ink.px(16)
    return page.image


def legend(ink: Ink) -> tuple[Page, int]:
    """A line below the header, to say what the colours mean; and the y of its text."""
    page = ink.page(ink.px(INNER), ink.px(46))
    page.rule(0, 0, page.image.width)
    return page, ink.px(30)


def settings_line(page: Page, y: int, s: Mapping[str, Any], more: str, room: float) -> None:
    """The settings and ``more`` on the right of a legend, in at most ``room`` pixels."""
    score = s.get("score")
    parts = (
        s.get("family"),
        {"prefix": "prefix cache", "full": "no cache"}.get(s.get("regime", "")),
        f"block {s.get('layer')}",
        f"score of step {score}" if isinstance(score, int) else f"{score} score",
        more,
    )
    text = page.clipped(" · ".join(str(p) for p in parts if p), SMALL, room)
    page.write((page.image.width, y), text, SMALL, MUTED, anchor="rm")


def _columns(count: int) -> int:
    """How many pictures of a mosaic stand side by side."""
    return 1 if count == 1 else 2 if count <= 4 else 3


def mosaic_cell(ink: Ink, count: int, width: int) -> int:
    """Width of one of ``count`` pictures in a mosaic of at most ``width`` pixels."""
    return (width - ink.px(6) * (_columns(count) - 1)) // _columns(count)


def mosaic(ink: Ink, pictures: Sequence[Image.Image]) -> Image.Image:
    """Pictures side by side, two per row (three when there are more than four), tops aligned."""
    columns, gap = _columns(len(pictures)), ink.px(6)
    lines = [pictures[i : i + columns] for i in range(0, len(pictures), columns)]
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


def running(
    token_texts: Sequence[str], targets: Sequence[Target], colors: Sequence[Color]
) -> list[Run]:
    """The answer as running text; tokens of an explained word are one chip of its colour."""
    owner: dict[int, int] = {}
    for n, target in enumerate(targets):
        for position in target.positions:
            owner.setdefault(position, n)
    runs: list[Run] = []
    last: int | None = None
    for position, token_text in enumerate(token_texts):
        text, word = token_text.strip(), owner.get(position)
        if not text:
            continue
        glued = not token_text[:1].isspace()
        if runs and word == last and (word is not None or glued):
            before = runs.pop()
            text, glued = before.text + ("" if glued else " ") + text, before.glued
        runs.append(Run(text, None if word is None else colors[word], glued))
        last = word
    return runs or [Run("(empty)")]


def stacked(parts: Sequence[Image.Image], ink: Ink) -> Image.Image:
    """Parts below one another on paper."""
    margin, gap = ink.px(MARGIN), ink.px(GAP)
    height = 2 * margin + sum(p.height for p in parts) + gap * (len(parts) - 1)
    sheet = Image.new("RGB", (ink.width, height), PAPER)
    y = margin
    for part in parts:
        sheet.paste(part, (margin, y))
        y += part.height + gap
    return sheet
