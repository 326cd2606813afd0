r"""What ``captum-dcam compare`` prints: tables for people, JSON for programs."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import typer
from rich.text import Text

from captum_dcam.cli.compare import Compared
from captum_dcam.cli.printing import output_console, print_facts, table_of
from captum_dcam.files import without_nan
from captum_dcam.results.comparison import METRICS, Comparison, Row, document
from captum_dcam.viewer.folder import PANEL

#: the method that the others' times are compared with, where it is there
REFERENCE = "diffusion_cam"
STATUS = {"done": "", "partial": "yellow", "failed": "red"}


def print_comparison(compared: Compared) -> None:
    """Prompt, answer, a line a method, why some failed, and where the files are."""
    console, comparison = output_console(120), compared.comparison
    facts = {
        "Picture": compared.source,
        "Prompt": comparison.prompt,
        "Answer": comparison.answer,
        "Words": ", ".join(comparison.words),
    }
    print_facts(console, facts)
    reference = reference_of(comparison)
    scored = any(row.mean("f3") is not None for row in comparison.rows)
    names = ["Method", "Status", "Seconds", "× time", "Passes", "MB"]
    names += ["Obj-IoU", "Contrast", "Conc.", "F3"] if scored else []
    table = table_of(*names, right=names[2:])
    table.columns[0].no_wrap = True
    for row in ordered(comparison.rows, compared.sort):
        cells = [Text(row.name), Text(row.status, style=STATUS[row.status])]
        cells += map(Text, _costs(row, reference))
        if scored:
            cells += [Text(_figure(row.mean(m), 1 if m == "contrast" else 3)) for m in METRICS]
        table.add_row(*cells)
    console.print(table)
    for row in comparison.rows:
        if row.status != "done" or row.note:
            console.print(Text.assemble((f"{row.name} ", "bold"), _reason(row)))
    notes = ["Seconds: all words together. Passes: forward + backward. MB: peak memory."]
    if reference is not None:
        notes.append(f"× time: against {reference.name}.")
    if scored:
        notes.append("Scores: means over the words that name an object, against its mask.")
    console.print(" ".join(notes), style="dim")
    print_facts(console, {"Panel": str(compared.folder / PANEL)})
    print_facts(console, {"Folder": f"{compared.folder} (comparison.csv, .json, and all maps)"})


def reference_of(comparison: Comparison) -> Row | None:
    """Whose time is 1: Diffusion-CAM's default, else the first method that is done."""
    done = [row for row in comparison.rows if row.status == "done" and row.cost.seconds > 0]
    return next((row for row in done if row.name == REFERENCE), done[0] if done else None)


def ordered(rows: Sequence[Row], sort: str | None) -> list[Row]:
    """Rows as ``--sort`` asks: best F3 first, quickest first (failed ones last), or by name."""
    if sort == "f3":
        return sorted(rows, key=lambda r: -1.0 if (f := r.mean("f3")) is None else f, reverse=True)
    if sort == "seconds":
        return sorted(rows, key=lambda r: (r.status == "failed", r.cost.seconds))
    return sorted(rows, key=lambda r: r.name) if sort == "name" else list(rows)


def _costs(row: Row, reference: Row | None) -> list[str]:
    cost = row.cost
    if row.status == "failed":
        return ["–"] * 4
    ratio = None if reference is None else cost.seconds / reference.cost.seconds
    peak = None if cost.peak_bytes is None else cost.peak_bytes / 1e6
    passes = f"{cost.forwards} + {cost.backwards}"
    return [_figure(cost.seconds, 2), _figure(ratio, 1), passes, _figure(peak, 0)]


def _figure(value: float | None, digits: int) -> str:
    return "–" if value is None else f"{value:.{digits}f}"


def _reason(row: Row) -> str:
    if row.status == "partial":
        return f"partial, {sum(row.complete)} of {len(row.complete)} words: {row.note}"
    return f"failed: {row.note}" if row.status == "failed" else row.note


def print_comparison_json(compared: Compared) -> None:
    """One JSON document on standard output."""
    content = {
        "picture": compared.source,
        **document(compared.comparison),
        "output": str(compared.folder),
        "panel": PANEL,
    }
    typer.echo(json.dumps(content, indent=1, ensure_ascii=False, allow_nan=False))


def print_methods(records: Sequence[dict[str, Any]]) -> None:
    """A line a method, group after group."""
    console, group = output_console(160), ""
    table = table_of("Name", "Method", "Passes", "Needs", "Maps", "Runs on", "Source")
    table.columns[0].no_wrap = True
    for r in records:
        if r["group"] != group:
            group = r["group"]
            if table.row_count:
                table.add_section()
            table.add_row(Text(group, style="bold"))
        maps = " + ".join(r["maps"]) + (", one for all words" if r["target_blind"] else "")
        cells = [r["name"], r["label"], r["passes"], ", ".join(r["needs"]), maps]
        table.add_row(*map(Text, [*cells, ", ".join(r["runs_on"]), r["source"]]))
    console.print(table)
    console.print(
        "Passes: for one token, with '+ n back' for backward passes. Settings: --json, or "
        "name:setting=value.",
        style="dim",
    )


def print_methods_json(records: Sequence[dict[str, Any]]) -> None:
    """The same as JSON, with settings and their defaults."""
    typer.echo(json.dumps(without_nan(records), indent=1, ensure_ascii=False, default=str))
