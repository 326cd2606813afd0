r"""Is the word true? The embedded model's calibrator, what it marks on clean scenes, and the page.

    captum-dcam evaluate --suite inventions --data start=6000 --data count=28 -o runs/inventions
    python benchmarks/truth.py fit --results runs/inventions --below 0.2 \
        --out captum_dcam/mini/calibrator.json
    python benchmarks/truth.py clean --start 7000 --scenes 150
    python benchmarks/truth.py page --results runs/inventions

``clean`` keeps one file per ten scenes and goes on where it stopped.
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
from captum_dcam.model.forward import single
from captum_dcam.model.words import located_words
from captum_dcam.truth.grounding import shipped
from captum_dcam.truth.scores import scores_of
from captum_dcam.truth.steps import StepRecord

app = typer.Typer(add_completion=False)
PAGE = Path(__file__).parents[1] / "docs" / "TRUTH.md"
TABLES = ("inventions", "inventions-more", "inventions-calibrated")
CACHE, BATCH, CLEAN = "prefix", 10, Path("runs/clean")
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
    folder: Annotated[Path, typer.Option(help="One file per batch of scenes.")] = CLEAN,
) -> None:
    """What the shipped calibrator marks on scenes of which nothing was changed."""
    torch.set_num_threads(1)
    adapter = load("mini", cache=CACHE)
    folder.mkdir(parents=True, exist_ok=True)
    found = []
    for first in tqdm(range(start, start + scenes, BATCH)):
        path = folder / f"{CACHE}-{first:05d}.json"
        if not path.exists():
            count = min(BATCH, start + scenes - first)
            write_json(path, {"scenes": _words(adapter, first, count)})
        found += read_json(path, CalibrationError, f"remove {path}")["scenes"]
    fit, words = shipped(), [word for one in found for word in one["words"]]
    features = torch.tensor([word["features"] for word in words], dtype=torch.float64)
    grounded = fit.probability(features)
    marked = [w["word"] for w, p in zip(words, grounded.tolist(), strict=True) if p < fit.below]
    wrong = [word["word"] for word in words if word["label"] == "invented"]
    typer.echo(
        f"{len(found)} scenes, {len(words)} colours and shapes, {len(wrong)} of them in phrases "
        f"that are not in the scene {wrong}; marked: {len(marked)} {marked}; least probable: "
        f"{float(grounded.min()):.3f}, marked below {fit.below:g}"
    )


def _words(adapter: Any, first: int, count: int) -> list[dict[str, Any]]:
    """The labelled words of some scenes' answers, and what a calibrator reads of them."""
    data = dataset("degraded", damage="none", strength=0, start=first, count=count)
    samples, forward = list(data), DenoisingForward(adapter)
    images = [[sample.image()] for sample in samples]
    forward.generate(adapter.prepare(images, [str(sample.prompt) for sample in samples]))
    out = []
    for number, sample in enumerate(samples):
        one = single(forward, number)
        text, located = located_words(adapter, one.trajectory.tokens[0].tolist())
        labelled = [
            (word, span.label)
            for span in sample.judged(text)
            for (start, stop), word in located
            if span.start < stop and start < span.stop
        ]
        scores = scores_of(StepRecord(one, [word for word, _ in labelled]), pictures=False)
        rows = zip(labelled, scores.features.tolist(), strict=True)
        words = [{"word": w.text, "label": label, "features": row} for (w, label), row in rows]
        out.append({"scene": sample.image_id, "answer": text, "words": words})
    return out


@app.command()
def page(results: Results = Path("runs/inventions")) -> None:
    """Write the tables of docs/TRUTH.md anew."""
    made = "\n".join(table(name, results).markdown() for name in TABLES)
    told = f"{machine()}; commit {commit(Path(__file__).parent)}."
    marks = ("<!-- truth: begin -->", "<!-- truth: end -->")
    PAGE.write_text(rewritten(PAGE.read_text(), marks, f"\n{made}\n{told}\n"))


if __name__ == "__main__":
    app()
