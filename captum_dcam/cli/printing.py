r"""What ``captum-dcam`` prints: tables for people, JSON for programs."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import torch
import typer
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from captum_dcam.cli.explain import Result
from captum_dcam.metrics import LocalizationScores, f3_score
from captum_dcam.results.summary import WordSummary, summarise
from captum_dcam.viewer.folder import SHEET, word_files

METRICS = ("obj_iou", "contrast", "concentration", "f3")


def output_console(width: int = 110) -> Console:
    """Standard output; ``width`` columns wide where it is no terminal."""
    console = Console(highlight=False)
    return console if console.is_terminal else Console(highlight=False, width=width)


def print_report(result: Result) -> None:
    """Prompt, answer, a line a word, and where the files are."""
    console, explanation = output_console(), result.explanation
    facts = {"Picture": result.source, "Prompt": explanation.prompt, "Answer": explanation.answer}
    print_facts(console, facts)
    console.print(_words_table(result))
    if result.scores is not None:
        _print_scores(console, result)
    if result.signs is not None:
        console.print(
            "Fall: how much the word's log-probability falls when the tenth of the image tokens "
            "that its map highlights is removed, and when as many random ones are.",
            style="dim",
        )
    several = "a picture of every word, and explanation/ to load again"
    places = {"Sheet": str(result.folder / SHEET), "Folder": f"{result.folder} ({several})"}
    print_facts(console, places)


def print_facts(console: Console, facts: Mapping[str, str]) -> None:
    """A line each, its label bold and aligned."""
    for label, text in facts.items():
        console.print(Text.assemble((f"{label:8}", "bold"), text))


def table_of(*columns: str, right: Sequence[str] = ()) -> Table:
    """An empty table in the style of all; ``right`` names the columns of figures."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for name in columns:
        table.add_column(name, justify="right" if name in right else "left", no_wrap=name == "Word")
    return table


def _words_table(result: Result) -> Table:
    right = ("#", "Step", "Sure", "F3", "Fall", "Random")
    names = ["#", "Word", "Step", "Sure", "Looks at", "Peak box (px)"]
    names += ["F3"] if result.scores is not None else []
    names += ["Fall", "Random"] if result.signs is not None else []
    table = table_of(*names, right=right)
    for n, row in enumerate(summarise(result.explanation)):
        cells = [
            str(row.number),
            row.word,
            ", ".join(map(str, row.steps)),
            f"{row.confidence:.0%}",
            row.region,
            _box(row),
        ]
        if result.scores is not None:
            own = result.scores[n]
            cells.append("" if own is None else f"{float(own.f3):.3f}")
        if result.signs is not None:
            cells += [f"{value:+.3f}" for value in result.signs[n].tolist()]
        table.add_row(*map(Text, cells))
    return table


def _box(row: WordSummary) -> str:
    if row.peak is None:
        return "–"
    x0, y0, x1, y1 = (round(v) for v in row.peak)
    return f"x {x0}–{x1}, y {y0}–{y1}"


def _print_scores(console: Console, result: Result) -> None:
    """All four localisation scores of the words that name objects, and their means."""
    assert result.scores is not None
    named = [
        (word, own)
        for word, own in zip(result.explanation.words, result.scores, strict=True)
        if own is not None
    ]
    if not named:
        console.print("No explained word names an object of the scene.", style="dim")
        return
    table = table_of("Localisation", "Obj-IoU", "Contrast", "Concentration", "F3")
    for column in table.columns[1:]:
        column.justify = "right"
    for word, own in named:
        table.add_row(Text(word), *_figures(own))
    if len(named) > 1:
        table.add_row(Text("mean (F3 of the means)", style="bold"), *_figures(_means(named)))
    console.print(table)


def _means(named: Sequence[tuple[str, LocalizationScores]]) -> LocalizationScores:
    iou, contrast, share = (
        torch.stack([getattr(own, name) for _, own in named]).mean() for name in METRICS[:3]
    )
    return LocalizationScores(iou, contrast, share, f3_score(iou, contrast, share))


def _figures(own: LocalizationScores) -> list[str]:
    values = _named(own)
    return [f"{value:.{1 if name == 'contrast' else 3}f}" for name, value in values.items()]


def document(result: Result) -> dict[str, Any]:
    """The result as plain data."""
    explanation = result.explanation
    trajectory = explanation.trajectory
    files: dict[int, list[str]] = {}
    for number, _, name in word_files(explanation):
        files.setdefault(number, []).append(name)
    words = []
    for n, row in enumerate(summarise(explanation)):
        record: dict[str, Any] = {**asdict(row), "files": files[n]}
        if result.scores is not None:
            own = result.scores[n]
            record["localization"] = None if own is None else _named(own)
        if result.signs is not None:
            highlighted, random = result.signs[n].tolist()
            record["sign_check"] = {"highlighted": highlighted, "random": random}
        words.append(record)
    return {
        "picture": result.source,
        "prompt": explanation.prompt,
        "answer": explanation.answer,
        "words": words,
        "regime": trajectory.regime,
        "steps": trajectory.steps,
        "calls": len(trajectory.calls),
        "feasible_calls": len(trajectory.feasible),
        "settings": explanation.settings,
        "versions": explanation.versions,
        "output": str(result.folder),
        "sheet": SHEET,
    }


def _named(own: LocalizationScores) -> dict[str, float]:
    return {name: float(getattr(own, name)) for name in METRICS}


def print_json(result: Result) -> None:
    """One JSON document on standard output."""
    typer.echo(json.dumps(document(result), indent=1, ensure_ascii=False))


def print_models(records: Sequence[dict[str, Any]]) -> None:
    """A line a checkpoint, then what each family needs and what surprises in it."""
    table = table_of("Family", "Checkpoint", "Regimes", "Blocks", "Deepest", "Default")
    for r in records:
        for number, c in enumerate(r["checkpoints"] or [r | {"name": r["class"]}]):
            depths = (c["blocks"], c["deepest_usable_block"], c["recommended_block"])
            shown = ["–" if d is None else str(d) for d in depths]
            family = (r["family"], c["name"], ", ".join(r["regimes"]))
            table.add_row(*(family if number == 0 else ("", c["name"], "")), *shown)
    console = output_console()
    console.print(table)
    console.print(
        "Blocks count from 0. Deepest: the last one with a path from the image to the answer. "
        "Default: the one explained when --layer is not given.\n",
        style="dim",
    )
    for r in records:
        console.print(Text(r["family"], "bold"), Text(r["class"].rpartition(".")[2], "dim"))
        for line in _model_lines(r):
            console.print(Text(f"  {line}"))


def _model_lines(record: dict[str, Any]) -> list[str]:
    """What is to be known of a family, in lines."""
    calls = [f"{regime}: {text}" for regime, text in record["feasible"].items()]
    lines = [f"Image seen by {'; '.join(calls)}"]
    takes = ("batches", "several_images", "video")
    names = [n.replace("_images", " pictures") for n in takes if record[n]]
    lines.append(f"Takes {', '.join(names) or 'one picture, one example'}")
    lines.append(f"Needs transformers{record['transformers']}")
    if record["package"]:
        state = "installed" if record["installed"] else "not installed"
        lines.append(f"Needs the authors' package {record['package']} ({state})")
    if record["install"]:
        lines.append(f"Install: {record['install']}")
    if record["remote_code"]:
        lines.append("Needs trust_remote_code=True: the checkpoints hold the model's code")
    return [*lines, *(f"Note: {note}" for note in record["notes"])]


def show(made: Measured) -> None:
    """For people, on the terminal; columns without any figure are left out."""
    shown = made.shown()
    console = output_console(200)
    console.print(Text(shown.title, style="bold"))
    heads = [shown.first, *(c.head for c in shown.columns)]
    drawn = table_of(*heads, right=heads[1:])
    drawn.columns[0].no_wrap = True
    for row in shown.texts():
        drawn.add_row(*map(Text, row))
    console.print(drawn)
    for note in shown.notes:
        console.print(Text(note, style="dim"))
    console.print()
