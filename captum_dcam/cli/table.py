r"""What ``captum-dcam table`` does: tables from stored results, printed and written."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import typer
from rich.text import Text

from captum_dcam.cli.explain import check_name
from captum_dcam.cli.printing import output_console, show, table_of
from captum_dcam.errors import InputError, StoreError
from captum_dcam.evaluation.table import FORMATS, Table
from captum_dcam.evaluation.tables import TABLES, Results, table
from captum_dcam.files import write_text


def run(names: Sequence[str], folder: Path, output: Path | None, markdown: bool) -> list[Table]:
    """Make tables, print them, and write them where ``output`` is given.

    ``all`` makes every table whose parts were measured, and says which were not; a table that was
    asked for by name and lacks its part is an error.
    """
    for name in names:
        check_name("table", name, (*TABLES, "all"))
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
    if output is not None:
        write(found, output)
    for one in found:
        typer.echo(one.markdown()) if markdown else show(one)
    return found


def write(tables: Sequence[Table], folder: Path) -> None:
    """NAME.md, NAME.csv and NAME.tex of every table, each whole or not at all."""
    for one in tables:
        for suffix, render in FORMATS.items():
            write_text(folder / f"{one.name}.{suffix}", render(one))


def print_list() -> None:
    """A line a table: its name and what it shows."""
    console = output_console(120)
    drawn = table_of("Table", "What it shows")
    for name, make in TABLES.items():
        drawn.add_row(Text(name, style="bold"), Text((make.__doc__ or "").split("\n")[0]))
    console.print(drawn)
