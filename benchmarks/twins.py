r"""Autoregressive methods on a diffusion model and on its autoregressive twin: docs/TWINS.md.

    python benchmarks/twins.py measure --scenes 150
    python benchmarks/twins.py table --scenes 150

``measure`` keeps one file per scene and goes on where it stopped; shards (``--shard 0/2``) share a
folder. For each scene both models describe it, and every row is measured on each model's own answer
at the step that committed the word, bare and with affinity propagation, as benchmarks/maps.py does.
Then the diffusion model's answer is forced into both (``compare_models``): how far do their maps
agree, and which words did the diffusion model write before the text to their left?
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # before torch is imported: see docs/COST.md

import torch
import typer
from maps import PROMPT, measure_scene
from maps_tables import markdown
from reports import commit, machine
from torch import Tensor
from tqdm import tqdm

from captum_dcam import compare_models, load
from captum_dcam.data.scenes import HELD_OUT, make_scene
from captum_dcam.errors import StoreError
from captum_dcam.files import read_json, write_json
from captum_dcam.metrics import cluster_bootstrap

FOLDER = Path("runs/twins")
MODELS = ("mini", "mini_ar")
#: the paper's method, then rivals; those made for autoregressive models are marked
ROWS = (
    "diffusion_cam",
    "diffusion_cam_base",
    "llava_cam",
    "tam",
    "msea_arc",
    "attention",
    "attn_lrp",
    "logit_lens",
    "layer_grad_cam",
    "oracle",
    "center_blob",
)
#: rows whose authors made them for autoregressive models
AUTOREGRESSIVE = ("llava_cam", "tam", "msea_arc")
#: whose maps of one answer in both models are compared
AGREEING = ("diffusion_cam", "tam")
REFINED = ("bare", "affinity")
app = typer.Typer(add_completion=False)


@app.command()
def measure(
    folder: Annotated[Path, typer.Option(help="One file per scene goes here.")] = FOLDER,
    start: Annotated[int, typer.Option(min=0, help="First scene of the held-out stream.")] = 3000,
    scenes: Annotated[int, typer.Option(min=1)] = 150,
    words: Annotated[int, typer.Option(min=0, help="Of a kind, per scene; 0: all.")] = 1,
    shard: Annotated[str, typer.Option(help="i/n: every n-th scene, from the i-th.")] = "0/1",
) -> None:
    """Measure scenes; those measured already are skipped."""
    torch.set_num_threads(1)
    part, parts = map(int, shard.split("/"))
    made = {"commit": commit(Path(__file__).parent), "machine": machine()}
    models = {name: load(name) for name in MODELS}
    folder.mkdir(parents=True, exist_ok=True)
    for index in tqdm(range(start + part, start + scenes, parts)):
        path = folder / f"{index:05d}.json"
        if path.exists():
            continue
        own = {
            name: measure_scene(one, index, ROWS, words, {"described"})
            for name, one in models.items()
        }
        image = make_scene(HELD_OUT, index).image
        both = compare_models(models, image, PROMPT, "nouns", AGREEING)
        content = {
            "scene": index,
            "own": own,
            "agreement": both.records(),
            "orders": [asdict(order) for order in both.orders],
        }
        write_json(path, {**made, **content})


# -- tables ----------------------------------------------------------------------------------------


def interval(values: Tensor, scenes: Tensor, percent: bool = True) -> str:
    """Mean and 95 % interval over scenes of values (N,)."""
    drawn = torch.Generator().manual_seed(0)
    mean, low, high = (float(x[0]) for x in cluster_bootstrap(values[None], scenes, drawn))
    if percent:
        return f"{100 * mean:.1f} [{100 * low:.1f}, {100 * high:.1f}]"
    return f"{mean:+.2f} [{low:+.2f}, {high:+.2f}]"


def scored(
    records: Sequence[dict[str, Any]], model: str, row: str, refined: str, score: str
) -> dict[tuple[int, str, str], float]:
    """A score by scene, word and kind."""
    return {
        (record["scene"], word["text"], word["kind"]): value
        for record in records
        for answer in record["own"][model]["answers"]
        if row in answer["scores"]
        for word, value in zip(answer["words"], answer["scores"][row][refined][score], strict=True)
    }


def paired(first: dict[Any, float], second: dict[Any, float]) -> tuple[Tensor, Tensor, Tensor]:
    """Values of both at what they share, and its scenes."""
    keys = sorted(first.keys() & second.keys())
    one, other = (torch.tensor([f[k] for k in keys], dtype=torch.float64) for f in (first, second))
    return one, other, torch.tensor([k[0] for k in keys])


def localisation(records: Sequence[dict[str, Any]], refined: str) -> str:
    """F3 and pointing of every row on each model, and the difference, words of both answers."""
    lines = []
    for row in ROWS:
        cells: list[str] = []
        for score in ("f3", "pointing"):
            found = [scored(records, model, row, refined, score) for model in MODELS]
            one, other, scenes = paired(*found)
            cells += [interval(one, scenes), interval(other, scenes), interval(other - one, scenes)]
        lines.append([row + (" (AR)" if row in AUTOREGRESSIVE else ""), *cells])
    heads = [f"{what} %, {where}" for what in ("F3", "pointing") for where in
             ("diffusion", "twin", "twin minus diffusion")]  # fmt: skip
    return markdown(["map", *heads], lines)


def lead(records: Sequence[dict[str, Any]], refined: str) -> str:
    """How far the default is ahead of each row, on each model."""
    lines = []
    for row in ROWS[1:]:
        cells = []
        for model in MODELS:
            default, own, scenes = paired(
                scored(records, model, "diffusion_cam", refined, "f3"),
                scored(records, model, row, refined, "f3"),
            )
            cells.append(interval(default - own, scenes))
        lines.append([row + (" (AR)" if row in AUTOREGRESSIVE else ""), *cells])
    return markdown(["Diffusion-CAM minus", "on the diffusion model", "on the twin"], lines)


def agreeing(records: Sequence[dict[str, Any]]) -> str:
    """How far the two models' maps of the same words agree."""
    lines = []
    for row in AGREEING:
        own = [(r["scene"], a) for r in records for a in r["agreement"] if a["method"] == row]
        scenes = torch.tensor([scene for scene, _ in own])
        cells = []
        for what in ("rank", "overlap", "distance"):
            values = torch.tensor([float(a[what]) for _, a in own], dtype=torch.float64)
            cells.append(interval(values, scenes, percent=what == "overlap"))
        lines.append([row, str(len(own)), *cells])
    heads = ["method", "words", "rank correlation", "overlap of highest tenths %", "peaks apart"]
    return markdown(heads, lines)


def written_early(records: Sequence[dict[str, Any]]) -> str:
    """How many words each model writes before the text to their left."""
    lines = []
    for n, model in enumerate(MODELS):
        own = [(r["scene"], missing) for r in records for missing in r["orders"][n]["missing"]]
        scenes = torch.tensor([scene for scene, _ in own])
        early = torch.tensor([missing > 0 for _, missing in own], dtype=torch.float64)
        same = [r["orders"][0]["answer"] == r["orders"][n]["answer"] for r in records]
        lines.append([model, str(len(own)), interval(early, scenes), f"{sum(same)} of {len(same)}"])
    heads = ["model", "words written", "before their left context %", "answers as the first's"]
    return markdown(heads, lines)


@app.command()
def table(
    folder: Annotated[Path, typer.Option()] = FOLDER,
    start: Annotated[int, typer.Option(min=0)] = 3000,
    scenes: Annotated[int, typer.Option(min=1)] = 150,
) -> None:
    """Print the tables of stored scenes as Markdown."""
    paths = [folder / f"{i:05d}.json" for i in range(start, start + scenes)]
    if missing := [p.name for p in paths if not p.exists()]:
        raise typer.BadParameter(f"{len(missing)} scenes are not measured, {missing[0]} first")
    records = [read_json(p, StoreError, "delete it and measure again") for p in paths]
    made = ["; ".join(sorted({str(r[k]) for r in records})) for k in ("machine", "commit")]
    typer.echo(
        f"Scenes {start} to {start + scenes - 1} of the held-out stream, float32, prefix cache. "
        f"Seed: the scene's number; 0 for intervals. {made[0]}; commit {made[1]}.\n"
    )
    for refined in REFINED:
        typer.echo(f"## Localisation, {refined}\n\n{localisation(records, refined)}\n")
        typer.echo(f"### How far the default leads\n\n{lead(records, refined)}\n")
    typer.echo(f"## The same words in both\n\n{agreeing(records)}\n")
    typer.echo(f"## Order of writing\n\n{written_early(records)}\n")


if __name__ == "__main__":
    app()
