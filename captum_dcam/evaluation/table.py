r"""A table of results: figures with intervals, and Markdown, CSV and LaTeX of them."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import compress

from captum_dcam.errors import InputError
from captum_dcam.metrics import BootstrapInterval
from captum_dcam.packages import needed
from captum_dcam.shown import in_markdown, no_formula


@dataclass(frozen=True)
class Figure:
    r"""A number, perhaps with an interval.

    Args:
        value (float): mean, in the column's unit.
        low, high (float, optional): 95 % interval. Default: none
    """

    value: float
    low: float | None = None
    high: float | None = None

    @classmethod
    def of(cls, interval: BootstrapInterval | None, factor: float = 1.0) -> Figure | None:
        """From an interval, in another unit; None stays None."""
        if interval is None:
            return None
        mean, low, high = (float(part) * factor for part in interval)
        return cls(mean, low, high)


def tabulator() -> Callable[..., str]:
    """What draws tables in Markdown and LaTeX; MissingPackageError without its package."""
    return needed("tabulate", "a table in Markdown or LaTeX").tabulate


#: text, a number, or nothing: not defined, not measured
Cell = str | int | Figure | None


@dataclass(frozen=True)
class Column:
    r"""What a column holds.

    Args:
        name (str): its head.
        digits (int, optional): after the point. Default: 1
        better (str, optional): ``"up"`` or ``"down"``: an arrow in the head. Default: neither
        published (bool, optional): printed in a paper, for another model and data. Default: False
    """

    name: str
    digits: int = 1
    better: str = ""
    published: bool = False

    @property
    def head(self) -> str:
        """The name, with an arrow or with the mark of published figures."""
        mark = {"up": " ↑", "down": " ↓"}.get(self.better, "")
        return f"{self.name}{mark}" if not self.published else f"published: {self.name}"


@dataclass(frozen=True)
class Table:
    r"""Rows of cells under columns.

    Args:
        name (str): how the command line calls it; its files' name.
        title (str): one line.
        columns (tuple of Column): all but the first, which holds the rows' labels.
        rows (tuple): (label, cells), as many cells as columns.
        notes (tuple of str): what a reader has to know, settings included.
        first (str, optional): head of the labels. Default: empty
    """

    name: str
    title: str
    columns: tuple[Column, ...]
    rows: tuple[tuple[str, tuple[Cell, ...]], ...]
    notes: tuple[str, ...] = ()
    first: str = ""

    def __post_init__(self) -> None:
        for label, cells in self.rows:
            if len(cells) != len(self.columns):
                raise InputError(
                    f"table {self.name!r}, row {label!r}: {len(cells)} cells for "
                    f"{len(self.columns)} columns"
                )

    def cell(self, row: str, column: str) -> Cell:
        """The cell of a row and a column by name; KeyError or ValueError if there is none."""
        own = [None if c.published else c.name for c in self.columns]
        return dict(self.rows)[row][own.index(column)]

    def shown(self) -> Table:
        """The same without columns that hold nothing."""
        keep = [any(c is not None for c in cells) for cells in self._by_column()]
        rows = ((label, tuple(compress(cells, keep))) for label, cells in self.rows)
        return replace(self, columns=tuple(compress(self.columns, keep)), rows=tuple(rows))

    def _by_column(self) -> list[list[Cell]]:
        """Every column's cells, from top to bottom."""
        return [[cells[n] for _, cells in self.rows] for n in range(len(self.columns))]

    def texts(self) -> list[list[str]]:
        """Labels and cells as they are shown."""
        return [
            [label, *(text_of(c, k.digits) for c, k in zip(cells, self.columns, strict=True))]
            for label, cells in self.rows
        ]

    def markdown(self) -> str:
        """Title, table and notes in GitHub's Markdown."""
        heads = [self.first, *(c.head for c in self.columns)]
        text = (any(isinstance(c, str) for c in cells) for cells in self._by_column())
        aligned = ["left", *("left" if any_text else "right" for any_text in text)]
        cells = [[in_markdown(cell) for cell in row] for row in self.texts()]
        heads = [in_markdown(head) for head in heads]
        how = {"tablefmt": "github", "disable_numparse": True, "colalign": aligned}
        body = tabulator()(cells, heads, **how)
        return "\n\n".join((f"### {self.title}", body, *self.notes)) + "\n"

    def latex(self) -> str:
        """A ``tabular`` for the package booktabs, title and notes as comments."""
        heads = [self.first, *(c.head for c in self.columns)]
        body = tabulator()(self.texts(), heads, tablefmt="latex_booktabs", disable_numparse=True)
        for sign, command in (("↑", r"$\uparrow$"), ("↓", r"$\downarrow$"), ("×", r"$\times$")):
            body = body.replace(sign, command)
        comments = [f"% {' '.join(line.split())}" for line in (self.title, *self.notes)]
        return "\n".join((*comments, body)) + "\n"

    def csv(self) -> str:
        """One line per row; a column with intervals becomes three."""
        stream = io.StringIO()
        writer = csv.writer(stream, lineterminator="\n")
        wide = [
            any(isinstance(c, Figure) and c.low is not None for c in cells)
            for cells in self._by_column()
        ]
        heads = [self.first or "row"]
        for column, three in zip(self.columns, wide, strict=True):
            name = f"published {column.name}" if column.published else column.name
            heads += [name, f"{name} low", f"{name} high"] if three else [name]
        writer.writerow(map(no_formula, heads))
        for label, cells in self.rows:
            line: list[object] = [no_formula(label)]
            for cell, three in zip(cells, wide, strict=True):
                figure = cell if isinstance(cell, Figure) else None
                parts = (
                    [no_formula(cell)]
                    if figure is None
                    else [figure.value, figure.low, figure.high]
                )
                line += [*parts, None, None][:3] if three else parts[:1]
            writer.writerow(line)
        return stream.getvalue()


#: suffix → the format's writer
FORMATS: dict[str, Callable[[Table], str]] = {
    "md": Table.markdown,
    "csv": Table.csv,
    "tex": Table.latex,
}


def text_of(cell: Cell, digits: int) -> str:
    """A cell as it is shown; "–" for nothing."""
    if cell is None:
        return "–"
    if not isinstance(cell, Figure):
        return str(cell)
    shown = f"{cell.value:.{digits}f}"
    if cell.low is None or cell.high is None:
        return shown
    return f"{shown} [{cell.low:.{digits}f}, {cell.high:.{digits}f}]"


def with_published(
    columns: Sequence[Column], found: Sequence[Sequence[float | None]]
) -> tuple[list[Column], list[list[Cell]]]:
    r"""Columns for published figures behind one's own, and their cells row by row.

    Args:
        columns (sequence of Column): those that may have been published.
        found (sequence of sequences): a row's figures, one per column; None where there is none.

    Returns:
        tuple: the columns of which at least one figure is there, and the cells of every row.
    """
    keep = [any(row[n] is not None for row in found) for n in range(len(columns))]
    heads = [Column(c.name, c.digits, published=True) for c in compress(columns, keep)]
    cells: list[list[Cell]] = [
        [None if value is None else Figure(value) for value in compress(row, keep)] for row in found
    ]
    return heads, cells
