"""``python -m captum_dcam.testing FILE…``: the conformance table of cases in files."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import Annotated

import typer

from captum_dcam.testing.case import AdapterCase
from captum_dcam.testing.feasibility import feasibility
from captum_dcam.testing.report import check_all, markdown


def cases_in(path: Path) -> list[AdapterCase]:
    """``CASES`` of a file, or of every file of a folder."""
    if path.is_dir():
        return [case for file in sorted(path.glob("*.py")) for case in cases_in(file)]
    name = f"captum_dcam_cases_{path.stem}"
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
    only: Annotated[str, typer.Option(help="Cases whose name holds this.")] = "",
    calls: Annotated[bool, typer.Option("--calls", help="Print the table of calls.")] = False,
) -> None:
    """Run the six checks on every case and print the table in Markdown."""
    cases = [case for path in paths for case in cases_in(path) if only in case.name]
    if calls:
        for row in map(feasibility, cases):
            typer.echo(f"{row.name}: {row.ratio:.0%} of {len(row.calls)} calls")
            typer.echo("".join(f"  {line}\n" for line in row.lines()), nl=False)
        return
    rows = [check_all(case) for case in cases]
    typer.echo(markdown(rows))
    raise typer.Exit(0 if all(row.passed for row in rows) else 1)


if __name__ == "__main__":
    typer.run(main)
