r"""``captum-dcam table``: tables from stored results, printed and written."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import typer
from rich.text import Text

from captum_dcam.cli.options import Base, argument, command, option
from captum_dcam.cli.printing import output_console, show, table_of
from captum_dcam.errors import InputError, StoreError

if TYPE_CHECKING:
    from captum_dcam.evaluation.table import Table


class Options(Base):
    """The options of ``captum-dcam table``."""

    names: list[str] | None = argument(
        "NAMES", "Tables, or 'all' that the results allow: {tables}.", "tables"
    )
    results: Path = option(Path("results"), None, "Folder that evaluate wrote.", "--results", "-r")
    output: Path | None = option(
        None, None, "Folder for NAME.md, .csv and .tex.", "--output", "-o", shown="none"
    )
    markdown: bool = option(False, None, "Print Markdown, as in docs/RESULTS.md.", "--markdown")
    list_: bool = option(False, None, "List the tables and stop.", "--list")


@command
def table(options: Options) -> None:
    """Print and write the papers' tables, and ours, from stored results.

    Example: captum-dcam table comparison ablation --results results --output tables
    """
    from captum_dcam.evaluation.table import FORMATS
    from captum_dcam.files import write_text

    if options.list_ or not options.names:
        print_list()
        return
    found = run(options.names, options.results)
    if options.output is not None:
        for one in found:
            for suffix, render in FORMATS.items():
                write_text(options.output / f"{one.name}.{suffix}", render(one))
    for one in found:
        typer.echo(one.markdown()) if options.markdown else show(one)


def run(names: Sequence[str], folder: Path) -> list[Table]:
    """Make tables.

    ``all`` makes every table whose parts were measured, and says which were not; a table that was
    asked for by name and lacks its part is an error.
    """
    from captum_dcam.evaluation.tables import TABLES, Results, table
    from captum_dcam.files import reading

    with reading(folder):
        if not folder.is_dir():
            raise InputError(f"{folder} is not a folder: give --results what evaluate wrote to")
    results, found = Results(folder), []
    for name in dict.fromkeys(n for one in names for n in (TABLES if one == "all" else (one,))):
        try:
            found.append(table(name, results))
        except StoreError as error:
            if "all" not in names or name in names:
                raise
            typer.echo(f"left out {name}: {error}", err=True)
    if not found:
        raise InputError(f"{folder} holds no part of any table: run captum-dcam evaluate first")
    return found


def print_list() -> None:
    """One line per table: its name and what it shows."""
    from captum_dcam.evaluation.tables import TABLES

    console = output_console(120)
    drawn = table_of("Table", "What it shows")
    for name, make in TABLES.items():
        drawn.add_row(Text(name, style="bold"), Text((make.__doc__ or "").split("\n")[0]))
    console.print(drawn)
