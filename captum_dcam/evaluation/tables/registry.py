r"""Tables by name, and what all of them share."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from captum_dcam.errors import StoreError
from captum_dcam.evaluation.frame import Frame, Values
from captum_dcam.evaluation.published import published, source
from captum_dcam.evaluation.store import Store
from captum_dcam.evaluation.table import Cell, Column, Figure, Table, with_published
from captum_dcam.metrics import CONTRAST_CAP, f3_score
from captum_dcam.registry import Registry


@dataclass
class Results:
    r"""A folder of parts, each read once.

    Args:
        folder (Path): where ``evaluate`` put them.
    """

    folder: Path
    _frames: dict[str, Frame] = field(default_factory=dict, repr=False)

    def part(self, name: str, suite: str | None = None) -> Frame:
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


#: name → the function that makes it from results
TABLES: Registry[Callable[[Results], Table]] = Registry("table", given=1)
register_table = TABLES.register


def table(name: str, results: Results | str | Path) -> Table:
    r"""A table from stored results.

    Raises:
        UnknownNameError: no such table, with near names.
        StoreError: a part that it needs was not measured; says how to.
    """
    return TABLES[name](results if isinstance(results, Results) else Results(Path(results)))


# -- localisation scores, as several tables show them ----------------------------------------------

#: name of the column, metric, factor, digits
LOCALIZATION = (
    ("Obj-IoU %", "obj_iou", 100.0, 1),
    ("Contrast", "contrast", 1.0, 2),
    ("Concentration %", "concentration", 100.0, 1),
    ("F3 %", "f3", 100.0, 1),
)
F3_OF_MEANS = Column("F3 of means %", better="up")


def scored(frame: Frame, variant: str, metric: str, **chosen: int) -> Values:
    """A metric's values; contrast as F3 caps it: a map without background has any contrast."""
    found = frame.values(variant, metric, **chosen)  # type: ignore[arg-type]
    return found.capped(CONTRAST_CAP) if metric == "contrast" else found


def localization_columns() -> list[Column]:
    """The four scores and F3 of their means, which is how the papers' tables are made."""
    return [Column(name, digits, "up") for name, _, _, digits in LOCALIZATION] + [F3_OF_MEANS]


def localization_cells(frame: Frame, variant: str) -> list[Cell]:
    """Means over words with intervals."""
    cells: list[Cell] = []
    means = []
    for _, metric, factor, _ in LOCALIZATION:
        found = scored(frame, variant, metric).mean()
        cells.append(Figure.of(found, factor))
        means.append(None if found is None else float(found.mean))
    if None in means:
        return [*cells, None]
    return [*cells, Figure(100 * float(f3_score(*means[:3])))]  # type: ignore[arg-type]


def gain(frame: Frame, variant: str, over: str, metric: str = "f3", factor: float = 100.0) -> Cell:
    """Mean paired difference of two variants on the same words, with its interval."""
    difference = scored(frame, variant, metric).minus(scored(frame, over, metric))
    return Figure.of(difference.mean(), factor)


class Printed(NamedTuple):
    """Where a table's published figures stand: its name, and the row of every row of ours."""

    table: str
    rows: Sequence[str | None]
    columns: Sequence[str]


def beside(
    columns: Sequence[Column], rows: Sequence[tuple[str, list[Cell]]], printed: Printed
) -> tuple[tuple[Column, ...], tuple[tuple[str, tuple[Cell, ...]], ...]]:
    """Columns and rows with the published figures behind them."""
    found = [
        [None if row is None else published(printed.table, row, c) for c in printed.columns]
        for row in printed.rows
    ]
    heads, cells = with_published([Column(name, 2) for name in printed.columns], found)
    merged = [(label, tuple(own + more)) for (label, own), more in zip(rows, cells, strict=True)]
    return (*columns, *heads), tuple(merged)


def settings_note(frame: Frame, extra: Iterable[str] = ()) -> str:
    """What every table says below it: model, data, images, words, state of the code."""
    plan, facts = frame.header["plan"], frame.header["facts"]
    versions = facts["versions"]
    parts = [
        f"{plan['model']} ({facts['regime']}, {facts['dtype']}, {facts['device']})",
        f"data {plan['dataset']['name']}, images {frame.header['images']['start']} to "
        f"{frame.header['images']['start'] + frame.header['images']['count'] - 1} "
        f"({frame.images} measured, {frame.failed} failed), {frame.count('object')} object words",
        f"seed {plan['seed']}",
        f"torch {versions['torch']}",
        *extra,
    ]
    return "; ".join(parts) + ". Brackets: 95 % intervals, images resampled with all their words."


def source_note(name: str) -> str:
    """Whose figures the published columns are."""
    return f"Published figures: {source(name)}: another model and other data."
