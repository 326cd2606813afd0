r"""Is the word true? The embedded model's calibrator, what it marks on clean scenes, and the page.

    captum-dcam evaluate --suite inventions --data start=6000 --data count=40 -o runs/inventions
    python benchmarks/truth.py fit --results runs/inventions --out captum_dcam/mini/calibrator.json
    python benchmarks/truth.py clean --start 7000 --scenes 150
    python benchmarks/truth.py page --results runs/inventions

``clean`` keeps one file per scene and goes on where it stopped.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Any

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # before torch is imported: see docs/COST.md

import torch
import typer
from reports import commit, machine, rewritten
from tqdm import tqdm

from captum_dcam import DenoisingForward, load
from captum_dcam.calibration import fit_calibrator
from captum_dcam.data import dataset
from captum_dcam.errors import CalibrationError
from captum_dcam.evaluation.tables import table
from captum_dcam.files import read_json, write_json
from captum_dcam.model.words import located_words
from captum_dcam.presets import preset
from captum_dcam.truth.grounding import judged, shipped
from captum_dcam.truth.scores import scores_of
from captum_dcam.truth.steps import StepRecord

app = typer.Typer(add_completion=False)
PAGE = Path(__file__).parents[1] / "docs" / "TRUTH.md"
TABLES = ("inventions", "inventions-more", "inventions-calibrated")
CACHE = "prefix"
Results = Annotated[Path, typer.Option(help="What evaluate --suite inventions wrote.")]


@app.command()
def fit(
    out: Annotated[Path, typer.Option(help="The JSON file that the library reads.")],
    results: Results = Path("runs/inventions"),
    below: Annotated[float, typer.Option(help="Words less probable are marked.")] = 0.5,
) -> None:
    """Fit the calibrator that ships with the embedded model, on half of the images."""
    found, tried = fit_calibrator(results, below=below)
    out.write_text(found.to_json() + "\n")
    typer.echo(f"{found.fitted_on}; on the other half: {tried}")


@app.command()
def clean(
    start: Annotated[int, typer.Option(min=0, help="First scene of the held-out stream.")] = 7000,
    scenes: Annotated[int, typer.Option(min=1)] = 150,
    folder: Annotated[Path, typer.Option(help="One file per scene.")] = Path("runs/clean"),
) -> None:
    """What the shipped calibrator marks on scenes of which nothing was changed."""
    torch.set_num_threads(1)
    adapter, data = load("mini", cache=CACHE), dataset("degraded", damage="none", strength=0,
                                                       start=start, count=scenes)  # fmt: skip
    folder.mkdir(parents=True, exist_ok=True)
    files = {index: folder / f"{CACHE}-{index:05d}.json" for index in data.ids}
    for index, path in tqdm(files.items()):
        if not path.exists():
            write_json(path, _judged(adapter, data.sample(index)))
    fit = shipped()
    again = "remove the folder: the calibrator has changed since"
    found = [read_json(path, CalibrationError, again) for path in files.values()]
    if any(one["calibrator"] != fit.fitted_on for one in found):
        raise CalibrationError(f"{folder}: {again}")
    words = [word for one in found for word in one["words"]]
    marked = [word for word in words if word["doubted"]]
    wrong = [word for word in words if word["label"] == "invented"]
    least = min(w["grounded"] for w in words if w["grounded"] is not None)
    typer.echo(
        f"{len(found)} scenes, {len(words)} colours and shapes, {len(wrong)} of them not in the "
        f"scene; marked: {len(marked)} {[w['word'] for w in marked]}; least probable: {least:.3f}, "
        f"marked below {fit.below:g}"
    )


def _judged(adapter: Any, sample: Any) -> dict[str, Any]:
    """The labelled words of a scene's answer, and what the calibrator says of them."""
    forward = DenoisingForward(adapter)
    forward.generate(adapter.prepare([[sample.image()]], [sample.prompt]))
    text, located = located_words(adapter, forward.trajectory.tokens[0].tolist())
    found = []
    for span in sample.judged(text):
        inside = [w for (a, b), w in located if span.start < b and a < span.stop]
        found += [(word, span.label) for word in inside]
    targets = [word for word, _ in found]
    scores = judged(scores_of(StepRecord(forward, targets)), forward, targets, preset("default"))
    rows = zip(found, scores.records(), strict=True)
    names = ("grounded", "doubted", "probability")
    return {
        "answer": text,
        "calibrator": scores.calibrator,
        "words": [
            {"word": word.text, "label": label, **{name: row[name] for name in names}}
            for (word, label), row in rows
        ],
    }


@app.command()
def page(results: Results = Path("runs/inventions")) -> None:
    """Write the tables of docs/TRUTH.md anew."""
    made = "\n".join(table(name, results).markdown() for name in TABLES)
    told = f"{machine()}; commit {commit(Path(__file__).parent)}."
    marks = ("<!-- truth: begin -->", "<!-- truth: end -->")
    PAGE.write_text(rewritten(PAGE.read_text(), marks, f"\n{made}\n{told}\n"))


if __name__ == "__main__":
    app()
