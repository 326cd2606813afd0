r"""The tables of benchmarks/maps.py, as Markdown, from the scenes that it stored."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import Tensor

from captum_dcam.errors import StoreError
from captum_dcam.files import read_json
from captum_dcam.methods import METHODS, method_names
from captum_dcam.metrics import cluster_bootstrap

app = typer.Typer(add_completion=False)
#: refinements of every row, as stored
REFINED = ("bare", "four modules", "affinity", "both")
#: with affinity it is the default preset; all else is paired with it
DEFAULT = "diffusion_cam"
KINDS = {
    "shape": "Shape words",
    "color": "Colour words",
    "plural": "Of both, words for several objects",
    "what shape": "Answers to “what shape …”",
    "what color": "Answers to “what color …”",
    "wrong": "Wrong answers about noisy images, explained as the right ones",
}


@dataclass(frozen=True)
class Column:
    r"""One column of a table.

    Args:
        head (str): what stands above it.
        score (str): which stored score.
        refined (str): with which refinements.
        versus (str, optional): the default preset with these refinements minus the row, paired,
            instead of the row's own value. Default: none
    """

    head: str
    score: str
    refined: str
    versus: str | None = None


LOCALISATION = (
    *(Column(f"F3 %, {label}", "f3", label) for label in REFINED),
    Column("default minus it, both with affinity", "f3", "affinity", "affinity"),
    Column("default's bare map minus it, bare", "f3", "bare", "bare"),
    Column("pointing %, bare", "pointing", "bare"),
    Column("pointing %, affinity", "pointing", "affinity"),
    Column("mass on the object %, bare", "share", "bare"),
    Column("mass on the object %, affinity", "share", "affinity"),
)
CURVES = tuple(
    column
    for what, arrow in (("deletion", "↓"), ("insertion", "↑"))
    for column in (
        Column(f"{what} % {arrow}, bare", what, "bare"),
        Column(f"{what} % {arrow}, affinity", what, "affinity"),
        Column(f"default minus it, bare: {what}", what, "bare", "affinity"),
        Column(f"default minus it, affinity: {what}", what, "affinity", "affinity"),
    )
)
PLACEBO = tuple(
    Column(f"{head}, {label}", score, label)
    for label in ("bare", "affinity")
    for head, score in (("F3 %", "f3"), ("another object's", "placebo"))
)
CORRECTIONS = tuple(
    Column(f"{head}, {label}", score, label)
    for head, score in (("AMCR % ↓", "amcr"), ("CSR@10 % ↑", "csr"))
    for label in ("bare", "affinity")
)
SANITY = tuple(
    Column(f"{change}, {label}", change, label)
    for change in ("last block", "all weights", "other answer")
    for label in ("bare", "affinity")
)


@dataclass(frozen=True, eq=False)
class Rows:
    """Scores (R, N) by score and refinements, of rows for N words of scenes (N,)."""

    names: tuple[str, ...]
    scenes: Tensor
    values: dict[tuple[str, str], Tensor]

    def interval(self, values: Tensor) -> list[tuple[float, str]]:
        """Mean and 95 % interval over scenes of values (R, N), each as "mean [low, high]"."""
        found = cluster_bootstrap(values, self.scenes, torch.Generator().manual_seed(0))
        return [
            (float(m), f"{m:.1f} [{low:.1f}, {high:.1f}]")
            for m, low, high in zip(*(100 * x for x in found), strict=True)
        ]

    def cells(self, column: Column) -> list[tuple[float, str]]:
        """A column's value and text for every row."""
        own = self.values[column.score, column.refined]
        if column.versus is None:
            return self.interval(own)
        ahead = self.values[column.score, column.versus][self.names.index(DEFAULT)] - own
        return [
            (0.0, "–") if name == DEFAULT and column.refined == column.versus else cell
            for name, cell in zip(self.names, self.interval(ahead), strict=True)
        ]


def rows_of(records: Sequence[dict[str, Any]], kind: str, columns: Sequence[Column]) -> Rows | None:
    """What was stored of all words of a kind, for rows that have every score of the columns."""
    wanted = list(dict.fromkeys((c.score, c.refined) for c in columns))
    words = [
        (record["scene"], answer["scores"], n)
        for record in records
        for answer in [*record["answers"], *record.get("corrected", ())]
        for n, word in enumerate(answer["words"])
        if word["kind"] == kind or (kind == "plural" and word["plural"] and "what" not in kind)
        if kind != "plural" or not word["kind"].startswith("what")
    ]
    names = [
        name
        for name in (words[0][1] if words else ())
        if all(s in found.get(name, {}).get(r, {}) for _, found, _ in words for s, r in wanted)
    ]
    values = {
        (s, r): [[found[name][r][s][n] for _, found, n in words] for name in names]
        for s, r in wanted
    }
    # a placebo is missing where the scene has no other object
    whole = [
        n
        for n in range(len(words))
        if all(row[n] is not None for v in values.values() for row in v)
    ]
    if not names or not whole:
        return None
    return Rows(
        tuple(names),
        torch.tensor([words[n][0] for n in whole]),
        {
            key: torch.tensor([[row[n] for n in whole] for row in rows], dtype=torch.float64)
            for key, rows in values.items()
        },
    )


def markdown(heads: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    """A table."""
    out = ["| " + " | ".join(heads) + " |", "|" + "---|" * len(heads)]
    return "\n".join([*out, *("| " + " | ".join(line) + " |" for line in lines)])


def table_of(
    records: Sequence[dict[str, Any]],
    kind: str,
    columns: Sequence[Column],
    by: str,
    costs: bool = False,
) -> str:
    """Title, how many words, and a line per row, highest first by the score ``by`` with affinity,
    perhaps with what a word costs; empty where nothing was measured."""
    found = rows_of(records, kind, columns)
    if found is None:
        return ""
    cells = [found.cells(c) for c in columns]
    first = columns.index(
        next(c for c in columns if (c.score, c.refined, c.versus) == (by, "affinity", None))
    )
    order = sorted(range(len(found.names)), key=lambda r: -cells[first][r][0])
    lines = [[found.names[r], *(column[r][1] for column in cells)] for r in order]
    heads = ["map", *(c.head for c in columns)]
    if costs:
        heads += ["passes a word", "time", "seconds"]
        lines = [[*line, *costs_of(records, line[0])] for line in lines]
    scenes = len(found.scenes.unique())
    title = f"### {KINDS[kind]}\n\n{len(found.scenes)} words of {scenes} scenes.\n\n"
    return title + markdown(heads, lines) + "\n"


def costs_of(records: Sequence[dict[str, Any]], name: str) -> tuple[str, str, str]:
    """Passes of a row per word, its time over the default's on the same scenes, and the median of
    its seconds; dashes for maps that look at no model."""
    found = [
        (answer["costs"][name], answer["costs"][DEFAULT])
        for record in records
        for answer in [*record["answers"], *record.get("corrected", ())]
        if answer["costs"].get(name)
    ]
    if not found:
        return "–", "–", "–"
    forwards, backwards = (
        statistics.mean(own[kind] for own, _ in found) for kind in ("forwards", "backwards")
    )
    time = statistics.median(own["seconds"] / other["seconds"] for own, other in found)
    passes = f"{forwards:.3g}" + (f" + {backwards:.3g} back" if backwards else "")
    return passes, f"{time:.2g}×", f"{statistics.median(own['seconds'] for own, _ in found):.2g}"


def method_lines(records: Sequence[dict[str, Any]]) -> list[list[str]]:
    """A line per method: what it needs, gives and costs, and F3 of shape and colour words."""
    columns = [Column(label, "f3", label) for label in ("bare", "affinity")]
    found = [rows_of(records, kind, columns) for kind in ("shape", "color")]
    cells = [
        dict(zip(rows.names, rows.cells(column), strict=True))
        for rows in found
        if rows is not None
        for column in columns
    ]
    lines = []
    for name in (n for n in method_names() if all(n in column for column in cells)):
        facts = METHODS[name].facts
        needs = ", ".join(n for n in facts.needs if n != "pixel tokens") or "–"
        gives = "image, text" if facts.text else "image"
        gives += "; one map for all words" if facts.target_blind else ""
        own = [facts.group, facts.label, f"`{name}` · {facts.source}", needs, gives]
        lines.append([*own, *costs_of(records, name)[:2], *(column[name][1] for column in cells)])
    return lines


def read(folder: Path, cache: str, start: int, scenes: int) -> list[dict[str, Any]]:
    """Stored results of scenes, which must all be there."""
    paths = [folder / f"{cache}-{i:05d}.json" for i in range(start, start + scenes)]
    if missing := [p.name for p in paths if not p.exists()]:
        raise typer.BadParameter(f"{len(missing)} scenes are not measured, {missing[0]} first")
    return [read_json(p, StoreError, "delete it and measure again") for p in paths]


@app.command()
def table(
    folder: Annotated[Path, typer.Option()] = Path("runs/maps"),
    cache: Annotated[str, typer.Option()] = "prefix",
    start: Annotated[int, typer.Option(min=0)] = 2000,
    scenes: Annotated[int, typer.Option(min=1)] = 300,
    methods: Annotated[bool, typer.Option(help="What each method needs and costs.")] = False,
) -> None:
    """Print the tables of stored scenes as Markdown."""
    records = read(folder, cache, start, scenes)
    made = ["; ".join(sorted({str(r[k]) for r in records})) for k in ("block", "machine", "commit")]
    typer.echo(
        f"Embedded model, {cache} cache, float32, block {made[0]}; scenes {start} to "
        f"{start + scenes - 1} of the held-out stream. Seed: the scene's number; 0 for intervals. "
        f"{made[1]}; commit {made[2]}.\n"
    )
    if asked := sum(r["asked"] for r in records):
        right = sum(len(a["words"]) for r in records for a in r["answers"][1:])
        typer.echo(f"{right} of {asked} questions answered rightly, the others left out.\n")
    if methods:
        heads = ["group", "method", "`name` · source", "needs", "gives", "passes a word", "time"]
        heads += [f"F3 %, {k}, {r}" for k in ("shape", "colour") for r in ("bare", "affinity")]
        typer.echo(markdown(heads, method_lines(records)))
        return
    for title, columns, by, kinds in (
        ("", LOCALISATION, "f3", tuple(KINDS)),
        ("Deletion and insertion", CURVES, "insertion", ("shape", "color")),
        ("Placebo", PLACEBO, "f3", ("shape", "color")),
        ("Sanity", SANITY, "last block", ("shape", "color")),
        ("Correction", CORRECTIONS, "csr", ("wrong",)),
    ):
        costs = title in ("Deletion and insertion", "Correction")
        made_of = [table_of(records, kind, columns, by, costs) for kind in kinds]
        if any(made_of):
            typer.echo(f"## {title}\n" if title else "")
            typer.echo("\n".join(t for t in made_of if t))
