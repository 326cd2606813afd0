"""``python -m captum_dcam.testing FILE…``: the conformance table of cases in files."""

from __future__ import annotations

import importlib.util
import os
import sys
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from captum_dcam.files import write_text
from captum_dcam.model.hub import check_device
from captum_dcam.testing.case import AdapterCase
from captum_dcam.testing.gradients import feasibility
from captum_dcam.testing.report import check_all, document, markdown, merge_rows

#: environment variables that name a checkout of a family's own code
UPSTREAM = "CAPTUM_DCAM_UPSTREAM_"


def cases_in(path: Path) -> list[AdapterCase]:
    """``CASES`` of a file, or of every file of a folder."""
    if path.is_dir():
        return [case for file in sorted(path.glob("*.py")) for case in cases_in(file)]
    name = f"captum_dcam_cases_{path.parent.parent.name}_{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise typer.BadParameter(f"{path} is no Python file: expected one that defines CASES")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    if not hasattr(module, "CASES"):
        raise typer.BadParameter(f"{path} defines no CASES: expected a list of AdapterCase")
    return list(module.CASES)


def main(
    paths: Annotated[list[Path], typer.Argument(help="Files or folders that define CASES.")],
    only: Annotated[str, typer.Option(help="Only cases whose name contains this.")] = "",
    device: Annotated[
        str, typer.Option(help="Where the models go: 'cpu', 'cuda', 'cuda:1', 'mps'.")
    ] = "cpu",
    calls: Annotated[bool, typer.Option("--calls", help="Print the table of calls.")] = False,
    store: Annotated[
        Path | None, typer.Option(help="JSON file to which the rows are added.")
    ] = None,
    into: Annotated[
        Path | None, typer.Option(help="Document whose table is written anew from --store.")
    ] = None,
) -> None:
    """Run the seven checks on every case and print the table in Markdown."""
    if into is not None and store is None:
        raise typer.BadParameter("--into writes what --store holds: give both")
    cases = [case for path in paths for case in cases_in(path) if only in case.name]
    if not cases:
        raise typer.BadParameter(
            f"no case in {', '.join(map(str, paths))}: is the name in --only right, and the "
            f"variable {UPSTREAM}NAME set, where the family's own code is needed?"
        )
    try:
        where = check_device(device)
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint="--device") from error
    if where.type != "cpu":
        cases = [case.on(device) for case in cases]
    if calls:
        for table in map(feasibility, cases):
            typer.echo(f"{table.name}: {table.ratio:.0%} of {len(table.calls)} calls")
            typer.echo("".join(f"  {line}\n" for line in table.lines()), nl=False)
        return
    rows = [replace(check_all(case), command=command(paths, device)) for case in cases]
    typer.echo(markdown(rows))
    if store is not None:
        every = merge_rows(store, rows)
        if into is not None:
            write_text(into, document(into.read_text(encoding="utf-8"), every))
    raise typer.Exit(0 if all(row.passed for row in rows) else 1)


def command(paths: list[Path], device: str) -> str:
    """The command line, without the places of checkouts of other people's code."""
    settings = [f"{n}=CHECKOUT" for n in sorted(os.environ) if n.startswith(UPSTREAM)]
    where = [] if device == "cpu" else [f"--device {device}"]
    run = "PYTHONPATH=tests python -m captum_dcam.testing"
    return " ".join([*settings, run, *(p.as_posix() for p in paths), *where])


if __name__ == "__main__":
    typer.run(main)
