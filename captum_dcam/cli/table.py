r"""``captum-dcam table``: tables from stored results, printed and written."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rich.text import Text

from captum_dcam.cli.options import Base, argument, command, option
from captum_dcam.cli.printing import output_console, print_plain, say_on_stderr, show, table_of
from captum_dcam.errors import InputError, StoreError

if TYPE_CHECKING:
    from captum_dcam.evaluation.table import Table


#: where evaluate writes, unless it is told otherwise
RESULTS = Path("results")


class Options(Base):
    """The options of ``captum-dcam table``."""

    names: list[str] | None = argument(
        "NAMES", "Tables, or 'all' that the results allow: {tables}.", "tables"
    )
    results: Path = option(RESULTS, None, "Folder that evaluate wrote.", "--results", "-r")
    output: Path | None = option(
        None,
        None,
        "Folder for NAME.md, .csv and .tex; earlier tables are replaced, nothing else is.",
        "--output",
        "-o",
        shown="none",
    )
    markdown: bool = option(False, None, "Print Markdown.", "--markdown")
    list_: bool = option(False, None, "List the tables and stop.", "--list")


@command
def table(options: Options) -> None:
    """Print and write the papers' tables, and ours, from stored results.

    Example: captum-dcam table comparison ablation --results results --output tables
    """
    from captum_dcam.evaluation.table import FORMATS, tabulator
    from captum_dcam.results.manifests import check_listed, write_listed

    asked = options.output is not None or options.markdown or options.results != RESULTS
    if options.list_ or not (options.names or asked):
        print_list()
        return
    check_results(options.results)
    if not options.names:
        raise InputError("which tables? Give their names, or 'all'; captum-dcam table lists them")
    if options.output is not None or options.markdown:
        tabulator()
    if options.output is not None:
        check_listed(options.output, "tables")
    found = run(options.names, options.results)
    if options.output is not None:
        made = {
            f"{t.name}.{suffix}": render(t) for t in found for suffix, render in FORMATS.items()
        }
        write_listed(options.output, made, "tables")
    for one in found:
        print_plain(one.markdown()) if options.markdown else show(one)


def run(names: Sequence[str], folder: Path) -> list[Table]:
    """Make tables.

    ``all`` makes every table whose parts were measured; a table that was asked for by name and
    lacks its part is an error.
    """
    from captum_dcam.evaluation.tables import TABLES, Results, table

    results, found, without = Results(folder), [], 0
    for name in dict.fromkeys(n for one in names for n in (TABLES if one == "all" else (one,))):
        try:
            found.append(table(name, results))
        except StoreError:
            if "all" not in names or name in names:
                raise
            without += 1
    if without and found:
        say_on_stderr(
            f"{len(found)} tables; {without} others need parts that {folder} does not hold (asked "
            "for by its name, a table says which)"
        )
    if not found:
        raise InputError(f"{folder} holds no part of any table: run captum-dcam evaluate first")
    return found


def check_results(folder: Path) -> None:
    """Raise where there is no folder of results."""
    from captum_dcam.files import reading

    with reading(folder):
        if not folder.is_dir():
            raise InputError(f"{folder} is not a folder: give --results what evaluate wrote to")


def print_list() -> None:
    """One line per table: its name and what it shows."""
    from captum_dcam.evaluation.tables import TABLES

    console = output_console(120)
    drawn = table_of("Table", "What it shows")
    for name, make in TABLES.items():
        drawn.add_row(Text(name, style="bold"), Text((make.__doc__ or "").split("\n")[0]))
    console.print(drawn)
