r"""One engine for all tables: a table is a specification of what it reads, shows and says.

The specifications are data, in ``tables.toml``: ``[tables.NAME]`` holds the arguments of a
:class:`TableSpec`, ``[columns]`` and ``[notes]`` what several tables share. What is no mean,
difference or count of stored scores is a function of a row, entered under :func:`register_cells`.
One's own tables are entered with :func:`add_tables` from such a file, or with :func:`add_table`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from captum_dcam.errors import InputError, SettingError, StoreError, near
from captum_dcam.evaluation.frame import Frame, Values
from captum_dcam.evaluation.published import published, read_toml, source
from captum_dcam.evaluation.store import Store
from captum_dcam.evaluation.table import Cell, Column, Figure, Table, with_published
from captum_dcam.files import Record
from captum_dcam.metrics import CONTRAST_CAP
from captum_dcam.registry import Registry

S = TypeVar("S", "ColumnSpec", "TableSpec")


@dataclass
class Results:
    r"""A folder of parts, each read once.

    Args:
        folder (Path): where ``evaluate`` put them.
    """

    folder: Path
    _frames: dict[str, Frame] = field(default_factory=dict, repr=False)

    def part(self, name: str, suite: str = "") -> Frame:
        """A part's results; StoreError that says how to measure it."""
        if name not in self._frames:
            if not Store.exists(self.folder / name):
                raise StoreError(
                    f"{self.folder} has no results of {name!r}: measure them with captum-dcam "
                    f"evaluate --suite {suite or name} --output {self.folder}"
                )
            self._frames[name] = Frame(self.folder / name)
        return self._frames[name]

    def has(self, name: str) -> bool:
        """Whether a part was measured, on one image at least."""
        folder = self.folder / name
        return Store.exists(folder) and next(Store.read(folder).records(), None) is not None


class TableRow(NamedTuple):
    r"""A row of a table, before its cells are made.

    Args:
        label (str): what stands before it.
        frame (Frame): the part that it is read from.
        variant (str, optional): whose scores it shows. Default: nobody's, all are undefined
        printed (str, optional): the row of the published table beside it. Default: none
    """

    label: str
    frame: Frame
    variant: str = ""
    printed: str = ""

    def values(self, metric: str, of: str = "", **chosen: Any) -> Values:
        """A metric of the row's variant, or of another; contrast as F3 caps it, because a map
        without background has any contrast."""
        found = self.frame.values(of or self.variant, metric, **chosen)
        if metric == "contrast":
            return replace(found, scores=found.scores.clamp(max=CONTRAST_CAP))
        return found

    def difference(self, metric: str, of: str = "", minus: str = "") -> Values:
        """What one variant has more than another on the words of both; default: the row's own."""
        return self.values(metric, of).minus(self.values(metric, minus))


#: name → the function that makes a row's cells in columns that are computed together
CELLS: Registry[Callable[[TableRow], Sequence[Cell]]] = Registry("function of cells", given=1)
register_cells = CELLS.register


@dataclass(frozen=True)
class ColumnSpec:
    r"""What a column shows of a row: one of ``mean``, ``difference``, ``count`` and ``cells``.

    Args:
        name (str), digits (int), better (str): as in :class:`Column`.
        mean (str): a metric, averaged over words, with its interval over images.
        difference (str): a metric of ``of`` minus that of ``minus`` on the same words, averaged.
        count (str): a metric; how many words have it (of both variants, if one is named).
        of, minus (str, optional): names of variants. Default: the row's own
        factor, scale (float, optional): unit of the mean, and of every value before it is averaged:
            -1 where lower is better. Default: 1
        cells (str): name of a function under :func:`register_cells`; it makes several columns.
        heads (sequence): their (name, digits, better).
    """

    name: str = ""
    digits: int = 1
    better: str = ""
    mean: str = ""
    difference: str = ""
    count: str = ""
    of: str = ""
    minus: str = ""
    factor: float = 1.0
    scale: float = 1.0
    cells: str = ""
    heads: Sequence[Sequence[Any]] = ()

    def __post_init__(self) -> None:
        if sum(map(bool, (self.mean, self.difference, self.count, self.cells))) != 1:
            raise InputError(f"{self}: expected one of mean, difference, count and cells")

    def columns(self) -> list[Column]:
        """The heads."""
        return [Column(*head) for head in self.heads or [(self.name, self.digits, self.better)]]

    def of_row(self, row: TableRow) -> Sequence[Cell]:
        """A row's cells, one per head."""
        if self.cells:
            return CELLS[self.cells](row)
        metric = self.mean or self.difference or self.count
        two = self.difference or self.of or self.minus
        found = row.difference(metric, self.of, self.minus) if two else row.values(metric)
        if self.count:
            return [len(found)]
        return [Figure.of(found.scaled(self.scale).mean(), self.factor)]


@dataclass(frozen=True)
class TableSpec:
    r"""A table: what it reads, its rows and columns, and what it says below them.

    Args:
        name (str): how the command line calls it.
        title (str): one line.
        shows (str): what ``captum-dcam table --list`` says of it.
        columns (sequence of ColumnSpec, optional): from left to right. Default: the mean of every
            metric of the first part
        first (str, optional): head of the rows' labels. Default: empty
        parts (sequence of str, optional): parts of a suite that must have been measured.
        more (sequence of str, optional): parts that are read as well if they were measured, a
            ``…-long`` only beside its other half; without ``parts``, one of them must have been.
        suite (str, optional): the suite that measures them. Default: called as the part is
        rows (sequence, optional): (label, variant) or (label, variant, published row), read from
            the first part. Default: all its variants
        find (str, optional): name of a function under :func:`register_rows` that gives the rows, of
            the specification and the parts. Default: ``"listed"``: those of ``rows``
        published (str), printed (sequence of str): a published table and those of its columns that
            stand behind; one without any figure for these rows is left out. Default: none
        notes (sequence of str): what a reader has to know; ``plan``, ``facts`` and ``frame`` of the
            first part are filled in. ``@NAME``: what a function under :func:`register_notes` says
            of the specification, the parts and the rows.
    """

    name: str
    title: str
    shows: str
    columns: Sequence[ColumnSpec] = ()
    first: str = ""
    parts: Sequence[str] = ()
    more: Sequence[str] = ()
    otherwise: str = ""
    suite: str = ""
    rows: Sequence[Sequence[str]] = ()
    find: str = "listed"
    published: str = ""
    printed: Sequence[str] = ()
    notes: Sequence[str] = ("@settings",)

    def read(self, results: Results) -> list[Frame]:
        """The parts; StoreError that says how to measure one that is missing."""
        there = [p for p in self.more if results.has(p.removesuffix("-long")) and results.has(p)]
        names = (*self.parts, *there) or (self.otherwise or self.more[0],)
        return [results.part(p, self.suite) for p in names]

    def table(self, results: Results) -> Table:
        """The table itself, the published figures behind its own."""
        frames = self.read(results)
        rows = list(ROWS[self.find](self, frames))
        columns = self.columns or [ColumnSpec(m, 3, mean=m) for m in frames[0].metrics]
        found = [
            [published(self.published, row.printed, name) for name in self.printed] for row in rows
        ]
        heads, behind = with_published([Column(name, 2) for name in self.printed], found)
        return Table(
            self.name,
            self.title,
            (*(head for column in columns for head in column.columns()), *heads),
            tuple(
                (row.label, (*(c for column in columns for c in column.of_row(row)), *more))
                for row, more in zip(rows, behind, strict=True)
            ),
            tuple(note for text in self.notes for note in self._note(text, frames, rows)),
            self.first,
        )

    def _note(self, text: str, frames: list[Frame], rows: list[TableRow]) -> Iterable[str]:
        if text.startswith("@"):
            return NOTES[text[1:]](self, frames, rows)
        header = frames[0].header
        return [text.format(plan=header["plan"], facts=header["facts"], frame=frames[0])]


# -- rows and notes that many tables have ----------------------------------------------------------

#: name → the function that finds a table's rows
ROWS: Registry[Callable[[TableSpec, list[Frame]], Iterable[TableRow]]] = Registry("rows", given=2)
register_rows = ROWS.register
#: name → the function that finds what stands below
NOTES: Registry[Callable[[TableSpec, list[Frame], list[TableRow]], Iterable[str]]] = Registry(
    "notes", given=3
)
register_notes = NOTES.register


@register_rows("listed")
def listed(spec: TableSpec, frames: list[Frame]) -> list[TableRow]:
    """The rows of the specification, or all variants."""
    found = spec.rows or [(variant, variant) for variant in frames[0].variants]
    return [TableRow(label, frames[0], *rest) for label, *rest in found]


@register_notes("failures")
def failures(spec: TableSpec, frames: list[Frame], rows: list[TableRow]) -> Iterable[str]:
    """The rows whose variant failed on some images, and why."""
    for row in rows:
        done, images, why = row.frame.status(row.variant)
        if why and done < images:
            yield f"{row.label}: {done} of {images} images ({why})"


@register_notes("settings")
def settings(spec: TableSpec, frames: list[Frame], rows: list[TableRow]) -> list[str]:
    """The first part's."""
    return [settings_note(frames[0])]


def settings_note(frame: Frame) -> str:
    """Model, data, images, words, seed and version of torch, and what the brackets are."""
    plan, facts = frame.header["plan"], frame.header["facts"]
    start, many = frame.header["images"]["start"], frame.header["images"]["count"]
    mark = f" Stored {frame.note}." if frame.note else ""
    return (
        f"{plan['model']} ({facts['regime']}, {facts['dtype']}, {facts['device']}); "
        f"data {plan['dataset']['name']}, images {start} to {start + many - 1} "
        f"({frame.images} measured, {frame.failed} failed), {frame.count('object')} object words; "
        f"seed {plan['seed']}; torch {facts['versions']['torch']}. "
        f"Brackets: 95 % intervals, images resampled with all their words.{mark}"
    )


@register_notes("source")
def source_note(spec: TableSpec, frames: list[Frame], rows: list[TableRow]) -> list[str]:
    """Whose figures the published columns are."""
    return [f"Published figures: {source(spec.published)}: another model and other data."]


# -- tables by name --------------------------------------------------------------------------------

#: name → the function that makes it from results
TABLES: Registry[Callable[[Results], Table]] = Registry(
    "table", given=1, listed="captum-dcam table"
)
register_table = TABLES.register


def add_table(spec: TableSpec, owner: str) -> None:
    r"""Enter a table.

    Args:
        spec (TableSpec): what it reads, shows and says.
        owner (str): where it is specified, such as ``__name__``: the same place may enter it again.

    Raises:
        RegistrationError: the name belongs to a table of another place.
    """

    def made(results: Results) -> Table:
        return spec.table(results)

    made.__doc__, made.__module__, made.__qualname__ = spec.shows, owner, spec.name
    register_table(spec.name)(made)


def add_tables(path: Path) -> None:
    r"""Enter the tables of a file of specifications, written as ours.

    Raises:
        SettingError: a table or column has a key that there is not, with near ones.
        RegistrationError: a name belongs to a table of another file.
    """
    content = read_toml(path)
    groups, texts = content.get("columns", {}), content.get("notes", {})
    entries: dict[str, Record] = {}
    for name, own in content["tables"].items():
        entry = {**entries.get(own.pop("like", ""), {}), **own, "name": name}
        entries[name] = dict(entry)
        columns = [groups[c] if isinstance(c, str) else [c] for c in entry.get("columns", ())]
        entry["columns"] = [_made(ColumnSpec, c, name) for group in columns for c in group]
        if "notes" in entry:
            entry["notes"] = [texts.get(note.removeprefix("@"), note) for note in entry["notes"]]
        add_table(_made(TableSpec, entry, name), str(path))


def _made(kind: type[S], record: Record, table: str) -> S:
    known = [f.name for f in fields(kind)]
    for key in record:
        if key not in known:
            raise SettingError(f"table {table!r}: {kind.__name__} has no {key!r}{near(key, known)}")
    return kind(**record)


def table(name: str, results: Results | str | Path) -> Table:
    r"""A table from stored results.

    Raises:
        UnknownNameError: no such table, with near names.
        StoreError: a part that it needs was not measured; says how to.
    """
    return TABLES[name](results if isinstance(results, Results) else Results(Path(results)))
