r"""What ``captum-dcam evaluate`` prints: how every part stands, for people or as JSON."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence

import typer
from rich.text import Text

from captum_dcam.cli.evaluate import Evaluated
from captum_dcam.cli.printing import output_console, print_facts, show, table_of
from captum_dcam.evaluation.tables import table


def say_part(name: str) -> None:
    """Before a part's bar, on stderr."""
    typer.echo(f"{name} …", err=True)


def print_summaries(done: Sequence[Evaluated]) -> None:
    """A line a part, problems of the data, and what to do next."""
    console = output_console(120)
    heads = ("Part", "Shard", "Images", "Now", "Failed", "Left", "Folder")
    drawn = table_of(*heads, right=heads[1:6])
    for one in done:
        s = one.summary
        cells = [one.name or "–", f"{s.shard[0]}/{s.shard[1]}", s.total, s.measured, s.failed]
        style = "yellow" if s.left else ""
        drawn.add_row(*map(str, cells), Text(str(s.left), style=style), str(s.folder))
    console.print(drawn)
    for one in done:
        for problem in one.summary.problems[:10]:
            console.print(Text(f"left out: {problem}", style="yellow"))
        if len(one.summary.problems) > 10:
            console.print(Text(f"and {len(one.summary.problems) - 10} more", style="yellow"))
    if any(one.summary.left for one in done):
        console.print(Text("Stopped early: the same command goes on.", style="yellow"))
    elif any(one.summary.merged is None for one in done):
        console.print("Other shards are not complete yet; the last one merges.", style="dim")
    else:
        suites = any(one.name for one in done)
        folder = done[0].summary.folder.parent if suites else done[0].summary.folder
        print_facts(console, {"Results": str(folder)})
        if not suites:
            show(table("summary", folder))
        else:
            console.print(f"captum-dcam table all --results {folder}", style="dim")


def print_json(done: Sequence[Evaluated]) -> None:
    """One JSON document on standard output."""
    found = [
        {
            "part": one.name,
            "folder": str(one.summary.folder),
            "shard": list(one.summary.shard),
            "total": one.summary.total,
            "measured": one.summary.measured,
            "failed": one.summary.failed,
            "left": one.summary.left,
            "merged": None if one.summary.merged is None else str(one.summary.merged),
            "problems": list(one.summary.problems),
            "plan": one.plan.record(),
        }
        for one in done
    ]
    typer.echo(json.dumps(found, indent=1, ensure_ascii=False))


def print_choices(found: Mapping[str, Sequence[str]], as_json: bool) -> None:
    """What may be asked for."""
    if as_json:
        typer.echo(json.dumps(found, indent=1, ensure_ascii=False))
        return
    console = output_console(120)
    for kind, names in found.items():
        console.print(Text.assemble((f"{kind:10}", "bold"), ", ".join(names)))
