r"""How a panel of many methods and words is laid out so that it stays readable."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from captum_dcam.viewer.header import INNER

#: thousandths of the width: lowest row, gaps between cells, label and cells, and blocks
ROW, CELL_GAP, GUTTER, BLOCK_GAP = 29.0, 3.0, 8.0, 26.0
SMALLEST, LARGEST = 20.0, 180.0
#: labels: at least, at most
LABELS = (90.0, 205.0)
#: how high all rows together should be at most, and what makes the whole sheet about square
HIGH, SQUARE = 1050.0, 650.0
HEADING = 60.0


@dataclass(frozen=True)
class Plan:
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


def plan_of(rows: int, groups: int, words: int, ratio: float, need: float) -> Plan:
    r"""The layout that shows large thumbnails on little paper.

    Args:
        rows (int), groups (int), words (int): how many.
        ratio (float): height over width of a cell.
        need (float): width of the longest label.
    """
    label = min(max(need + 2, LABELS[0]), LABELS[1])
    high = HIGH
    while True:
        found = [
            plan
            for sections in range(1, words + 1)
            for blocks in range(1, min(rows, 5) + 1)
            if (plan := _fitting(rows, groups, words, ratio, label, high, sections, blocks))
        ]
        if found:
            return max(found, key=lambda item: item[0])[1]
        high *= 1.5  # more than fits: better a long sheet than cells too small to see


def _fitting(
    rows: int,
    groups: int,
    words: int,
    ratio: float,
    label: float,
    high: float,
    sections: int,
    blocks: int,
) -> tuple[float, Plan] | None:
    """A layout and how good it is; None if its cells would be too small."""
    columns = -(-words // sections)
    if sections > 1 and -(-words // columns) != sections:
        return None
    wide = (INNER - BLOCK_GAP * (blocks - 1)) / blocks - label - GUTTER
    lines = -(-rows // blocks)
    room = high / sections - HEADING - groups / blocks * 20
    cell = min(LARGEST, wide / columns - CELL_GAP, (room / lines - CELL_GAP) / ratio)
    if cell < SMALLEST or lines * (ROW + CELL_GAP) > room:
        return None
    height = sections * (
        HEADING + groups / blocks * 20 + lines * (max(cell * ratio, ROW) + CELL_GAP)
    )
    filled = rows * words * cell * cell * ratio / (INNER * height)
    long = max(1.0, height / SQUARE)
    return cell * (filled / long) ** 0.5, Plan(blocks, columns, cell, label)
