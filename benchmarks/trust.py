r"""How well does a map say that it localises? Fitted on some scenes, tried on others.

    python benchmarks/trust.py measure --start 60 --scenes 100
    python benchmarks/trust.py measure --start 2000 --scenes 300
    python benchmarks/trust.py fit --start 60 --scenes 100 --out captum_dcam/mini/reliability.json
    python benchmarks/trust.py table --start 2000 --scenes 300

``measure`` keeps one file per scene and goes on where it stopped: features of the maps of words for
objects and of function words, before and after refinements, at the default preset.
"""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # before torch is imported: see docs/COST.md

import torch
import typer
from maps import PROMPT, described
from maps_tables import markdown, read
from reports import commit, machine
from torch import Tensor
from tqdm import tqdm

from captum_dcam import DenoisingForward, explain, load, maps
from captum_dcam.data.scenes import FUNCTION_WORDS, HELD_OUT, make_scene
from captum_dcam.files import write_json
from captum_dcam.metrics import (
    Reliability,
    auroc,
    expected_calibration_error,
)
from captum_dcam.model.words import words_of
from captum_dcam.presets import preset
from captum_dcam.truth.localising import FEATURES, features, shipped
from captum_dcam.truth.steps import word_probabilities

app = typer.Typer(add_completion=False)
FOLDER = Path("runs/trust")
KINDS = ("bare", "affinity")
CACHE = "prefix"
Start = Annotated[int, typer.Option(min=0, help="First scene of the held-out stream.")]
Scenes = Annotated[int, typer.Option(min=1)]
Folder = Annotated[Path, typer.Option(help="One file per scene.")]


def measure_scene(adapter: Any, index: int) -> dict[str, Any]:
    """Features of every map of one scene's description, and which words name an object."""
    forward = DenoisingForward(adapter)
    trajectory = forward.generate(adapter.prepare([[make_scene(HELD_OUT, index).image]], [PROMPT]))
    objects = [n.target for n in described(make_scene(HELD_OUT, index), forward)]
    every = words_of(adapter, trajectory.tokens[0].tolist())
    targets = [*objects, *(w for w in every if w.text in FUNCTION_WORDS)]
    if not targets:
        return {"labels": [], **{kind: [] for kind in KINDS}}
    chosen = preset("default")
    found = maps.explained(forward, targets, chosen.reading(), chosen.refinements())
    contexts = maps.contexts_of(forward)
    values = (features(one, contexts).tolist() for one in found)
    return {
        "labels": [n < len(objects) for n in range(len(targets))],
        "words": [t.text for t in targets],
        **dict(zip(KINDS, values, strict=True)),
    }


@app.command()
def measure(start: Start = 60, scenes: Scenes = 100, folder: Folder = FOLDER) -> None:
    """Measure scenes; those measured already are skipped."""
    torch.set_num_threads(1)
    adapter = load("mini", cache=CACHE)
    made = {"commit": commit(Path(__file__).parent), "machine": machine()}
    folder.mkdir(parents=True, exist_ok=True)
    for index in tqdm(range(start, start + scenes)):
        path = folder / f"{CACHE}-{index:05d}.json"
        if not path.exists():
            write_json(path, {**made, **measure_scene(adapter, index)})


def gathered(folder: Path, start: int, scenes: int) -> tuple[dict[str, Tensor], Tensor]:
    """Features (M, 7) before and after refinements, and labels (M,)."""
    records = read(folder, CACHE, start, scenes)
    rows = {
        kind: torch.tensor([f for r in records for f in r[kind]], dtype=torch.float64)
        for kind in KINDS
    }
    return rows, torch.tensor([label for r in records for label in r["labels"]])


@app.command()
def fit(
    out: Annotated[Path, typer.Option(help="The JSON file that the library reads.")],
    start: Start = 60,
    scenes: Scenes = 100,
    folder: Folder = FOLDER,
) -> None:
    """Fit the reliability of maps before refinements."""
    rows, labels = gathered(folder, start, scenes)
    told = (
        f"probability, fitted on {int(labels.sum())} words for objects and {int((~labels).sum())} "
        f"function words of the embedded model, scenes {start} to {start + scenes - 1}"
    )
    out.write_text(
        Reliability.fit(rows["bare"], labels, fitted_on=told, names=FEATURES).to_json() + "\n"
    )


@app.command()
def table(
    start: Start = 2000,
    scenes: Scenes = 300,
    folder: Folder = FOLDER,
    fitted: Annotated[int, typer.Option(help="First scene of the fit.")] = 60,
    fit_scenes: Annotated[int, typer.Option()] = 100,
) -> None:
    """Print how well the fit tells the words apart on other scenes, and its calibration curve."""
    rows, labels = gathered(folder, start, scenes)
    before, truth = gathered(folder, fitted, fit_scenes)
    lines = []
    for kind in KINDS:
        score = Reliability.fit(before[kind], truth, names=FEATURES).probability(rows[kind])
        entropy, agreement = rows[kind][:, 0], rows[kind][:, -1]
        lines.append(
            [
                kind,
                f"{auroc(score, labels):.3f}",
                f"{auroc(1 - entropy, labels):.3f}",
                f"{auroc(agreement, labels):.3f}",
                f"{expected_calibration_error(score, labels):.3f}",
            ]
        )
    typer.echo(f"{int(labels.sum())} words for objects, {int((~labels).sum())} function words.\n")
    heads = ["map", "AUROC, fitted", "AUROC, 1 − entropy", "AUROC, agreement", "calibration error"]
    typer.echo(markdown(heads, lines) + "\n")
    score = shipped().probability(rows["bare"])
    bins = (score * 10).long().clamp(max=9)
    curve = [
        [f"{b / 10:.1f} to {(b + 1) / 10:.1f}", str(int(own.sum()))]
        + [f"{100 * float(v[own].double().mean()):.0f} %" for v in (score, labels)]
        for b in range(10)
        if (own := bins == b).any()
    ]
    typer.echo(markdown(["probability", "words", "mean", "are for objects"], curve))


@app.command()
def cost(scenes: Scenes = 5, rounds: Annotated[int, typer.Option(min=1)] = 3) -> None:
    """Time of an explanation with all parts of its trust over one without, and without the
    probabilities by step; in turns, generation included, pictures not."""
    torch.set_num_threads(1)
    adapter, ratios = load("mini", cache=CACHE), []
    for index in range(2000, 2000 + scenes):
        image = make_scene(HELD_OUT, index).image
        spent: dict[str, list[float]] = {"without": [], "with": [], "steps": []}
        for _ in range(rounds + 1):  # the first warms up
            found, seconds = timed(lambda: explain(adapter, image, PROMPT))  # noqa: B023
            spent["without"].append(seconds)
            spent["with"].append(timed(lambda: explain(adapter, image, PROMPT, trust=True))[1])  # noqa: B023
            forward = DenoisingForward(adapter)
            forward.generate(adapter.prepare([[image]], [PROMPT]))
            targets = found.targets
            spent["steps"].append(timed(lambda: word_probabilities(forward, targets))[1])  # noqa: B023
        least = {name: min(seconds[1:]) for name, seconds in spent.items()}
        whole = least["with"] / least["without"]
        ratios.append((whole, (least["with"] - least["steps"]) / least["without"]))
        typer.echo(f"scene {index}: {len(found.words)} words, {whole:.2f} ×")
    medians = [statistics.median(column) for column in zip(*ratios, strict=True)]
    typer.echo(f"median {medians[0]:.2f} ×, {medians[1]:.2f} × without probabilities by step")


def timed(work: Callable[[], Any]) -> tuple[Any, float]:
    """What it gave, and the seconds that it took."""
    start = time.perf_counter()
    found = work()
    return found, time.perf_counter() - start


if __name__ == "__main__":
    app()
