r"""Drawing on a sheet: fonts, measures, chips, running text. Pillow only."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import matplotlib
import numpy as np
from PIL import Image, ImageDraw, ImageFont

from captum_dcam.viewer.overlay import palette

Color = tuple[int, int, int]
PAPER: Color = (255, 255, 255)
TEXT: Color = (31, 35, 40)
MUTED: Color = (101, 109, 118)
RULE: Color = (216, 222, 228)
STEP_CMAP = "viridis"


@lru_cache(maxsize=64)
def font(size: int, bold: bool = False) -> ImageFont.FreeTypeFont:
    """DejaVu Sans, which matplotlib carries with it."""
    name = "DejaVuSans-Bold.ttf" if bold else "DejaVuSans.ttf"
    return ImageFont.truetype(Path(matplotlib.get_data_path()) / "fonts" / "ttf" / name, size)


def step_color(step: int, steps: int) -> Color:
    """Colour of a commit step: early dark, late light."""
    r, g, b = palette(STEP_CMAP)[round(12 + 230 * step / max(steps - 1, 1))].tolist()
    return r, g, b


def on(color: Color) -> Color:
    """Text colour that reads well on ``color``."""
    light = 0.299 * color[0] + 0.587 * color[1] + 0.114 * color[2]
    return TEXT if light > 140 else PAPER


@dataclass(frozen=True)
class Run:
    """A piece of running text; with a colour it is a chip. ``glued``: no blank before it."""

    text: str
    color: Color | None = None
    glued: bool = False


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

    def font(self, units: float, bold: bool = False) -> ImageFont.FreeTypeFont:
        return font(max(1, self.px(units)), bold)

    def length(self, text: str, units: float, bold: bool = False) -> float:
        """Width of a text in pixels."""
        return self.font(units, bold).getlength(text)

    def write(
        self,
        draw: ImageDraw.ImageDraw,
        at: tuple[float, float],
        text: str,
        units: float,
        color: Color = TEXT,
        bold: bool = False,
        anchor: str = "lm",
    ) -> None:
        draw.text(at, text, fill=color, font=self.font(units, bold), anchor=anchor)

    def clipped(self, text: str, units: float, width: float, bold: bool = False) -> str:
        """The text, or its beginning and an ellipsis, in at most ``width`` pixels."""
        if self.length(text, units, bold) <= width:
            return text
        while text and self.length(text + "…", units, bold) > width:
            text = text[:-1]
        return text.rstrip() + "…"

    def chip(
        self,
        draw: ImageDraw.ImageDraw,
        at: tuple[float, float],
        text: str,
        units: float,
        color: Color,
    ) -> float:
        """A rounded label whose left middle is ``at``; returns its width."""
        width = self.chip_width(text, units)
        x, y = at
        half = self.px(units * 0.82)
        box = (x, y - half, x + width, y + half)
        draw.rounded_rectangle(box, radius=self.px(units * 0.4), fill=color)
        self.write(draw, (x + width / 2, y), text, units, on(color), anchor="mm")
        return width

    def chip_width(self, text: str, units: float) -> float:
        return self.length(text, units) + 2 * self.px(units * 0.5)

    def lines(self, runs: Sequence[Run], units: float, width: float) -> list[list[Run]]:
        """Break runs into lines of at most ``width`` pixels; a run longer than that is clipped."""
        out: list[list[Run]] = [[]]
        x = 0.0
        for run in runs:
            own = self.clipped(run.text, units, width - 2 * self.px(units * 0.5))
            gap = self._gap(run, units) if out[-1] else 0.0
            need = self._run_width(Run(own, run.color), units)
            if out[-1] and x + gap + need > width:
                out.append([])
                x, gap = 0.0, 0.0
            out[-1].append(Run(own, run.color, run.glued))
            x += gap + need
        return out

    def flow(
        self,
        draw: ImageDraw.ImageDraw,
        at: tuple[float, float],
        lines: Sequence[Sequence[Run]],
        units: float,
        leading: float,
    ) -> float:
        """Draw lines of runs from the upper left corner ``at``; returns the y below them."""
        y = at[1]
        for line in lines:
            x, middle = at[0], y + self.px(leading) / 2
            for i, run in enumerate(line):
                x += self._gap(run, units) if i else 0.0
                if run.color is None:
                    self.write(draw, (x, middle), run.text, units)
                else:
                    self.chip(draw, (x, middle), run.text, units, run.color)
                x += self._run_width(run, units)
            y += self.px(leading)
        return y

    def _run_width(self, run: Run, units: float) -> float:
        return (
            self.length(run.text, units) if run.color is None else self.chip_width(run.text, units)
        )

    def _gap(self, run: Run, units: float) -> float:
        return 0.0 if run.glued else self.px(units * 0.36)

    def ramp(
        self, size: tuple[int, int], cmap: str, lowest: int = 0, highest: int = 255
    ) -> Image.Image:
        """A horizontal colour bar."""
        index = np.rint(np.linspace(lowest, highest, size[0])).astype(int)
        return Image.fromarray(np.repeat(palette(cmap)[index][None], size[1], axis=0))

    def rounded(self, picture: Image.Image, units: float = 5) -> Image.Image:
        """The picture with round corners on paper and a hairline around it."""
        k = 3
        big = Image.new("L", (picture.width * k, picture.height * k), 0)
        box = (0, 0, big.width - 1, big.height - 1)
        radius = min(self.px(units), *picture.size) * k
        ImageDraw.Draw(big).rounded_rectangle(box, radius=radius, fill=255)
        mask = big.resize(picture.size, Image.Resampling.BOX)
        return Image.composite(picture, Image.new("RGB", picture.size, PAPER), mask)


def stacked(parts: Sequence[Image.Image], width: int, margin: int, gap: int) -> Image.Image:
    """Parts below one another on paper."""
    height = 2 * margin + sum(p.height for p in parts) + gap * (len(parts) - 1)
    sheet = Image.new("RGB", (width, height), PAPER)
    y = margin
    for part in parts:
        sheet.paste(part, (margin, y))
        y += part.height + gap
    return sheet
