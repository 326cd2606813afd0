r"""The panel of a comparison: one row per method, one column per word, in one picture."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product

import numpy as np
from PIL import Image
from scipy import ndimage
from torch import Tensor
from torch.nn.functional import avg_pool2d

from captum_dcam.errors import InputError
from captum_dcam.results.comparison import Comparison, ComparisonRow
from captum_dcam.viewer.fonts import EMPTY
from captum_dcam.viewer.ink import (
    INNER,
    MUTED,
    TEXT,
    Color,
    Ink,
    Page,
    header,
    legend,
    running,
    settings_line,
    stacked,
    titled,
)
from captum_dcam.viewer.overlay import CMAP, MUTE, fitted, muted, overlay, scaled

SCALES = ("map", "row")
#: colours: chips of words, what failed, what is partial, ground of a cell without a map
CHIP: Color = (226, 232, 240)
FAILED: Color = (190, 40, 40)
PARTIAL: Color = (196, 110, 0)
BLANK: Color = (241, 243, 246)
#: colour of the border of the object's mask
OUTLINE: Color = (255, 255, 255)
#: pixels between the overlays of one cell
BETWEEN = 2
#: sizes of text: words, names of methods, what is below these, why one failed, group headings
WORD, NAME, FACT, REASON, GROUP = 12.5, 11.5, 10.0, 9.0, 10.5
#: width of all cells together from which a reason is written over them
NARROW = 110.0

# -- the layout, in thousandths of the width -------------------------------------------------------

#: lowest row, heading of a group, gaps between cells, label and cells, and blocks
ROW, MARK, CELL_GAP, GUTTER, BLOCK_GAP = 29.0, GROUP + 9, 3.0, 8.0, 26.0
SMALLEST, LARGEST = 20.0, 180.0
#: width of the column of labels: at least, at most
LABELS = (90.0, 205.0)
#: height of all rows together: at most, and where the whole sheet is about square
HIGH, SQUARE = 1050.0, 650.0
HEADING = 60.0


@dataclass(frozen=True)
class PanelPlan:
    r"""Measures of a panel in thousandths of its width.

    Args:
        blocks (int): of methods, side by side.
        words (int): columns of a section.
        cell (float): width of a thumbnail.
        label (float): width of the column of labels.
    """

    blocks: int
    words: int
    cell: float
    label: float

    def sections(self, words: int) -> list[range]:
        """Numbers of the words of every section."""
        return [range(i, min(i + self.words, words)) for i in range(0, words, self.words)]

    def split(self, heights: Sequence[int]) -> list[range]:
        """Consecutive rows of every block, about as high as one another; none is empty."""
        total, done, start = sum(heights), 0, 0
        parts: list[range] = []
        for i, height in enumerate(heights):
            left = len(heights) - i
            full = done + height / 2 > total * (len(parts) + 1) / self.blocks
            if i > start and (full or left < self.blocks - len(parts)):
                parts.append(range(start, i))
                start = i
            done += height
        return [*parts, range(start, len(heights))]


def plan_of(rows: int, groups: int, words: int, ratio: float, need: float) -> PanelPlan:
    r"""The layout that shows large thumbnails on little paper.

    Args:
        rows, groups, words (int): how many.
        ratio (float): height over width of a cell.
        need (float): width of the longest label.
    """
    label, high, words = min(max(need + 2, LABELS[0]), LABELS[1]), HIGH, max(words, 1)
    found: list[tuple[float, PanelPlan]] = []
    while not found:
        for sections, blocks in product(range(1, words + 1), range(1, min(rows, 5) + 1)):
            columns, lines = -(-words // sections), -(-rows // blocks)
            if -(-words // columns) != sections:
                continue  # fewer sections hold as many columns
            wide = (INNER - BLOCK_GAP * (blocks - 1)) / blocks - label - GUTTER
            room = high / sections - HEADING - groups / blocks * 20
            cell = min(LARGEST, wide / columns - CELL_GAP, (room / lines - CELL_GAP) / ratio)
            if cell < SMALLEST or lines * (ROW + CELL_GAP) > room:
                continue
            height = sections * (
                HEADING + groups / blocks * 20 + lines * (max(cell * ratio, ROW) + CELL_GAP)
            )
            filled = rows * words * cell * cell * ratio / (INNER * height)
            long = max(1.0, height / SQUARE)
            found.append((cell * (filled / long) ** 0.5, PanelPlan(blocks, columns, cell, label)))
        high *= 1.5  # more than fits: better a long sheet than cells too small to see
    return max(found, key=lambda item: item[0])[1]


# -- cells: overlays of one word by one method -----------------------------------------------------


def places(sizes: Sequence[tuple[int, int]], width: int) -> list[tuple[int, int, int, int]]:
    """(left, top, width, height) of every image in a cell ``width`` wide, row by row."""
    columns = math.ceil(math.sqrt(len(sizes)))
    own = (width - BETWEEN * (columns - 1)) // columns
    shown = [fitted(size, own, own * 1.25) for size in sizes]
    out, top = [], 0
    for start in range(0, len(sizes), columns):
        line = shown[start : start + columns]
        for k, (w, h) in enumerate(line):
            left = k * (own + BETWEEN) + (own - w) // 2
            out.append((left, top, w, h))
        top += max(h for _, h in line) + BETWEEN
    return out


def grid_height(sizes: Sequence[tuple[int, int]], width: int) -> int:
    """Height of a cell."""
    return max(top + height for _, top, _, height in places(sizes, width))


class Thumbnails:
    r"""Overlays of one size.

    Args:
        comparison (Comparison): maps, images and masks.
        width (int): of a cell in pixels.
        scale (str): ``map`` or ``row``.
        cmap (str): a matplotlib colour map.
        mode (str): ``bilinear`` or ``nearest``.
    """

    def __init__(
        self, comparison: Comparison, width: int, scale: str, cmap: str, mode: str
    ) -> None:
        self.comparison = comparison
        self.width = width
        self.scale, self.cmap, self.mode = scale, cmap, mode
        self.images = comparison.layout.images
        sizes = [comparison.images[i].size for i in self.images]
        self.places = places(sizes, width)
        self.height = grid_height(sizes, width)
        self._grounds = [
            muted(scaled(comparison.images[i], (w, h)), MUTE)
            for i, (_, _, w, h) in zip(self.images, self.places, strict=True)
        ]
        self._edges = [_edge(m, self.places[0][2:]) for m in comparison.masks or ()]
        self._maps: dict[int, list[Tensor]] = {}

    def pictures(self, row: int, word: int) -> list[tuple[Image.Image, tuple[int, int]]] | None:
        """Overlays of a cell with their places; None where there is no map."""
        every = self._row(row)
        maps = [m[word] for m in every]
        peak = max(float(m.max()) for m in maps)
        whole = all(bool(m.isfinite().all()) for m in maps)
        if not whole or (peak <= 0 and not self.comparison.rows[row].complete[word]):
            return None
        if self.scale == "row":
            finite = [m[m.isfinite().flatten(1).all(1)] for m in every]
            peak = max(float(m.max()) for m in finite if len(m))
        vmax = peak if peak > 0 else None
        drawn = [
            overlay(ground, values, cmap=self.cmap, vmax=vmax)
            for values, ground in zip(maps, self._grounds, strict=True)
        ]
        edge = self._edges[word] if word < len(self._edges) else None
        if edge is not None:
            pixels = np.asarray(drawn[0]).astype(np.float32)
            pixels[edge] = 0.2 * pixels[edge] + 0.8 * np.asarray(OUTLINE, dtype=np.float32)
            drawn[0] = Image.fromarray(np.rint(pixels).astype(np.uint8))
        return [(one, place[:2]) for one, place in zip(drawn, self.places, strict=True)]

    def _row(self, row: int) -> list[Tensor]:
        """Maps (N, H, W) of a method over every image; computed once, kept for one row."""
        if row not in self._maps:
            places = zip(self.images, self.places, strict=True)
            self._maps = {row: [self._reduced(row, i, (w, h)) for i, (_, _, w, h) in places]}
        return self._maps[row]

    def _reduced(self, row: int, image: int, size: tuple[int, int]) -> Tensor:
        """Maps over a thumbnail; tokens smaller than its pixels are averaged."""
        layout = self.comparison.layout
        # the most tokens in a line, where grids stand side by side
        tokens = sum(max(grid.shape) for grid in layout.grids if grid.image == image)
        k = max(1, math.ceil(tokens / min(size)))
        large = (size[1] * k, size[0] * k)
        own = [maps.float() for maps in self.comparison.rows[row].maps]
        maps = layout.over_image(own, image, large, self.mode)
        return maps if k == 1 else avg_pool2d(maps[:, None], k)[:, 0]


def _edge(mask: Tensor | None, size: tuple[int, int]) -> np.ndarray | None:
    """Inner border (H, W) bool of a mask at another size (W, H)."""
    if mask is None:
        return None
    full = Image.fromarray(mask.numpy().astype(np.uint8) * 255)
    small = np.asarray(full.resize(size, Image.Resampling.BOX)) > 127
    return small & ~ndimage.binary_erosion(small)


# -- drawing ---------------------------------------------------------------------------------------


def comparison_panel(
    comparison: Comparison,
    *,
    scale: str = "map",
    width: int = 1600,
    cmap: str = CMAP,
    mode: str = "bilinear",
) -> Image.Image:
    r"""Draw a comparison on one sheet.

    The image, the prompt and the answer stand on top. Below, every method has a row, with its
    seconds for all words and its mean F3 where masks are known; every word has a column, where its
    object is outlined. Many methods stand in several blocks side by side, many words in several
    sections. A method that failed says why; a cell that its budget left unfinished is marked, or
    blank. A flat map shows the plain image.

    Args:
        comparison (Comparison): the result; one image or several (a mosaic in every cell).
        scale (str, optional): ``map`` paints every map to its own maximum; ``row`` gives a
            method's maps one scale, so that words that hardly look at the image stay pale.
            Default: ``"map"``
        width (int, optional): in pixels; all else scales with it. Default: 1600
        cmap (str, optional): a matplotlib colour map. Default: ``"inferno"``
        mode (str, optional): ``bilinear``, or ``nearest`` to see the image tokens.
            Default: ``"bilinear"``

    Returns:
        PIL.Image.Image: RGB.

    Raises:
        ValueError: unknown ``scale``, or less than 600 pixels of ``width``.
    """
    if scale not in SCALES:
        raise InputError(f"scale is {scale!r}: expected one of {SCALES}")
    if width < 600:
        raise InputError(f"width is {width} px: nothing can be read below 600")
    panel, ink = _Panel(comparison, width, scale, cmap, mode), Ink(width)
    answer = running(spoken(comparison), comparison.targets, [CHIP] * len(comparison.targets))
    parts = [
        header(ink, comparison.images, comparison.prompt, answer, titled(comparison)),
        _legend(ink, comparison, scale, cmap),
        *map(panel.section, panel.plan.sections(len(comparison.targets))),
    ]
    return stacked(parts, ink)


def spoken(comparison: Comparison) -> list[str]:
    """Text of every token of the answer, empty for tokens that end it."""
    at, out = 0, []
    for token_text in comparison.tokens.token_texts[comparison.tokens.prompt :]:
        text = token_text if at else token_text.lstrip()
        own = text if comparison.answer.startswith(text, at) else ""
        at += len(own)
        out.append(token_text if own else "")
    return out


def _legend(ink: Ink, comparison: Comparison, scale: str, cmap: str) -> Image.Image:
    """What the colours mean, and the settings."""
    page, y = legend(ink)
    own = "each map's highest" if scale == "map" else "the method's highest"
    x = page.bar((0, y), f"heat: low … {own}", cmap, (40, 255)) + ink.px(24)
    if any(mask is not None for mask in comparison.masks or ()):
        side, inset, half = ink.px(13), ink.px(3), ink.px(13) // 2
        page.draw.rectangle((x, y - half, x + side, y + half), fill=MUTED)
        inner = (x + inset, y - half + inset, x + side - inset, y + half - inset)
        page.draw.rectangle(inner, outline=OUTLINE, width=max(1, ink.px(1)))
        x = page.note((x + side + ink.px(7), y), "the object's mask") + ink.px(24)
    x = page.note((x, y), "seconds: all words together") + ink.px(24)
    if any(row.status == "partial" for row in comparison.rows):
        side, half = ink.px(11), ink.px(11) // 2
        page.draw.rectangle((x, y - half, x + side, y + half), fill=BLANK)
        _corner(page, (x, y - half), side)
        x = page.note((x + side + ink.px(7), y), "unfinished") + ink.px(24)
    s = comparison.settings
    stages = (s.get("refinements") or {}).get("stages") or ()
    names = " + ".join(str(stage.get("name")) for stage in stages)
    settings_line(page, y, s, names, page.image.width - x)
    return page.image


class _Panel:
    """The rows of a comparison, with the measures that all of them share, in pixels."""

    def __init__(
        self, comparison: Comparison, width: int, scale: str, cmap: str, mode: str
    ) -> None:
        ink, rows = Ink(width), comparison.rows
        self.ink, self.rows, self.words = ink, rows, comparison.words
        begins = [i == 0 or rows[i].group != rows[i - 1].group for i in range(len(rows))]
        texts = [
            (text, size) for r in rows for text, size in ((r.label, NAME), (_facts(r)[0], FACT))
        ]
        need = max((ink.length(text, size) * 1000 / width for text, size in texts), default=0.0)
        sizes = [comparison.images[i].size for i in comparison.layout.images]
        ratio = grid_height(sizes, 1000) / 1000
        self.plan = plan_of(len(rows), sum(begins), len(comparison.targets), ratio, need)
        self.cells = Thumbnails(comparison, ink.px(self.plan.cell), scale, cmap, mode)
        self.gap, self.label = ink.px(CELL_GAP), ink.px(self.plan.label)
        lowest = ink.px(ROW)
        self.tall = [
            lowest if row.status == "failed" else max(lowest, self.cells.height) for row in rows
        ]
        several = len({row.group for row in rows}) > 1
        self.begins = {i for i, first in enumerate(begins) if first and several}
        marks = [ink.px(MARK) if i in self.begins else 0 for i in range(len(rows))]
        self.parts = self.plan.split(
            [tall + mark + self.gap for tall, mark in zip(self.tall, marks, strict=True)]
        )
        # a block that begins within a group repeats the group's heading
        self.marked = self.begins | {part[0] for part in self.parts if several}

    def section(self, words: range) -> Image.Image:
        """All methods for some of the words, in blocks side by side."""
        ink, head = self.ink, self._headings(words)
        blocks = [self._block(words, part, head) for part in self.parts]
        out = ink.page(ink.px(INNER), max(b.height for b in blocks)).image
        pitch = (ink.px(INNER) + ink.px(BLOCK_GAP)) / self.plan.blocks
        for i, block in enumerate(blocks):
            out.paste(block, (round(i * pitch), 0))
        return out

    def _headings(self, words: range) -> Image.Image:
        """The words above their columns; upright where the columns are too narrow for them."""
        ink, cell = self.ink, self.cells.width
        texts = [self.words[n] or EMPTY for n in words]
        width, longest = len(texts) * (cell + self.gap), max(ink.length(w, WORD) for w in texts)
        if longest <= cell:
            page = ink.page(width, ink.px(22))
            for k, text in enumerate(texts):
                x = k * (cell + self.gap) + cell / 2
                page.write((x, ink.px(10)), text, WORD, anchor="mm")
            return page.image
        high = min(longest, ink.px(96))
        page = ink.page(width, round(high) + ink.px(6))
        for k, text in enumerate(texts):
            line = ink.page(round(high), ink.px(WORD * 1.4))
            line.write((0, line.image.height / 2), ink.clipped(text, WORD, high), WORD)
            upright = line.image.transpose(Image.Transpose.ROTATE_90)
            page.image.paste(upright, (k * (cell + self.gap) + (cell - upright.width) // 2, 0))
        return page.image

    def _block(self, words: range, part: range, head: Image.Image) -> Image.Image:
        """Column headings, group headings and rows of some of the methods."""
        ink, left, mark = self.ink, self.label + self.ink.px(GUTTER), self.ink.px(MARK)
        height = sum(self.tall[i] + self.gap + (mark if i in self.marked else 0) for i in part)
        page = ink.page(left + len(words) * (self.cells.width + self.gap), head.height + height)
        page.image.paste(head, (left, 0))
        end, y = page.image.width - self.gap, head.height
        for i in part:
            if i in self.marked:
                middle, group = y + page.px(MARK) / 2, self.rows[i].group
                text = group if i in self.begins else f"{group} (continued)"
                page.write((0, middle), text, GROUP, MUTED, bold=True)
                page.rule(ink.length(text, GROUP, bold=True) + ink.px(8), middle, end, 0.7)
                y += mark
            self._row(page, i, words, y, left, end)
            y += self.tall[i] + self.gap
        return page.image

    def _row(self, page: Page, i: int, words: range, y: int, left: int, end: int) -> None:
        """One method: its label, and its cells or why it has none."""
        row, middle = self.rows[i], y + self.tall[i] / 2
        failed = row.status == "failed"
        narrow = failed and end - left < page.px(NARROW)
        text, color = _facts(row)
        if narrow:
            text = f"{text}: {_why(row)}"
        room = end if narrow else self.label
        for below, line, size, shade in ((-7, row.label, NAME, TEXT), (7, text, FACT, color)):
            page.write((0, middle + page.px(below)), page.clipped(line, size, room), size, shade)
        if failed and not narrow:
            _reason(page, row, (left, middle), end - left)
        elif not failed:
            self._cells(page, i, words, (left, y + (self.tall[i] - self.cells.height) // 2))

    def _cells(self, page: Page, i: int, words: range, at: tuple[int, int]) -> None:
        """The thumbnails of one method."""
        wide, high = self.cells.width, self.cells.height
        for k, n in enumerate(words):
            x, y = at[0] + k * (wide + self.gap), at[1]
            pictures = self.cells.pictures(i, n)
            if pictures is None:
                box = (x, y, x + wide - 1, y + high - 1)
                page.draw.rounded_rectangle(box, page.px(3), fill=BLANK)
                page.write((x + wide / 2, y + high / 2), "–", WORD, MUTED, anchor="mm")
            for picture, (left, top) in pictures or ():
                page.image.paste(page.rounded(picture, 2.5), (x + left, y + top))
            if not self.rows[i].complete[n]:
                _corner(page, (x, y), max(page.px(9), wide // 8))


def _facts(row: ComparisonRow) -> tuple[str, Color]:
    """The line below a method's name."""
    if row.status == "failed":
        return "failed", FAILED
    parts, mean = [seconds_text(row.cost.seconds)], row.mean("f3")
    if mean is not None:
        parts.append(f"F3 {mean:.2f}")
    if row.status == "partial":
        parts.append(f"{sum(row.complete)} of {len(row.complete)} words")
    return " · ".join(parts), PARTIAL if row.status == "partial" else MUTED


def seconds_text(seconds: float) -> str:
    """``0.042 s``, ``4.2 s``, ``123 s``."""
    digits = 3 if seconds < 0.1 else 2 if seconds < 1 else 1 if seconds < 100 else 0
    return f"{seconds:.{digits}f} s"


def _why(row: ComparisonRow) -> str:
    """The reason without the exception's name."""
    kind, _, rest = row.note.partition(": ")
    return rest if kind.endswith("Error") and rest else row.note


def _reason(page: Page, row: ComparisonRow, at: tuple[float, float], room: int) -> None:
    """Why a method failed, in two lines in place of its cells."""
    (x, y), half, pad = at, page.px(ROW) / 2 - page.px(3), page.px(7)
    page.draw.rounded_rectangle((x, y - half, x + room, y + half), page.px(3), fill=BLANK)
    words, inner = _why(row).split(), room - 2 * pad
    first = len(words)
    while first > 1 and page.length(" ".join(words[:first]), REASON) > inner:
        first -= 1
    lines = [" ".join(part) for part in (words[:first], words[first:]) if part]
    for k, line in enumerate(lines):
        middle = y + page.px(11.5) * (k - (len(lines) - 1) / 2)
        page.write((x + pad, middle), page.clipped(line, REASON, inner), REASON, FAILED)


def _corner(page: Page, at: tuple[float, float], side: int) -> None:
    """The mark of an unfinished map: a triangle in the upper left corner."""
    x, y = at
    page.draw.polygon(((x, y), (x + side, y), (x, y + side)), fill=PARTIAL)
