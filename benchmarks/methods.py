r"""Every method on held-out scenes: what it costs and whether its maps lie on the objects.

    python benchmarks/methods.py measure --scenes 100 --shard 0/2 &
    python benchmarks/methods.py measure --scenes 100 --shard 1/2; wait
    python benchmarks/methods.py table --scenes 100

``measure`` keeps one file a scene and goes on where it stopped. Scores are taken at the picture's
own resolution; intervals (95 %) resample words. Times are ratios to the default Diffusion-CAM on
the same scene and machine, each process on one thread. Methods of many passes (8 or more, marked *)
explain one word a scene at the commit step, the others all object words at two states.
"""

from __future__ import annotations

import itertools
import json
import os
import statistics
from pathlib import Path
from typing import Annotated

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # before torch is imported: see docs/COST.md

import torch
import typer
from reports import machine

from captum_dcam import DenoisingForward, load
from captum_dcam.comparing import chosen_methods, compare_generation
from captum_dcam.data.scenes import COLORS, HELD_OUT, SHAPE_OF, Scene, make_scene
from captum_dcam.methods import METHODS, method_names
from captum_dcam.metrics import bootstrap_ci
from captum_dcam.model.words import Target, words_of
from captum_dcam.results.comparison import METRICS

PROMPT = "describe the image ."
FIRST = 60  # scenes before this one were looked at in training
FOLDER = Path("runs/methods")
FLOOR = "diffusion_cam"
#: states that quick methods are read at; the others are read at the first, but for some
STATES = ("commit", "final")
TWICE = ("llava_cam",)
app = typer.Typer(add_completion=False)


def object_words(scene: Scene, words: tuple[Target, ...]) -> list[tuple[Target, torch.Tensor]]:
    """Shape words of the answer that name objects of the scene, with their masks (H, W)."""
    out = []
    for before, word in itertools.pairwise(words):
        shape = SHAPE_OF.get(word.text)
        if shape is not None and before.text in COLORS:
            mask = torch.from_numpy(scene.mask_of(before.text, shape))
            if mask.any():
                out.append((word, mask))
    return out


def is_long(name: str) -> bool:
    """Many passes a word: one word a scene is measured."""
    facts = METHODS[name].facts
    return facts.expensive or int(facts.passes.split()[0]) >= 8


def measure_scene(adapter, index: int, methods: list[str], layer: int | None) -> dict:
    """Records of every method on the object words of one scene."""
    scene = make_scene(HELD_OUT, index)
    forward = DenoisingForward(adapter, layer)
    trajectory = forward.generate(adapter.prepare([[scene.image]], [PROMPT]))
    tokens = trajectory.tokens[0].tolist()
    named = object_words(scene, words_of(adapter, tokens))
    if not named:
        return {"scene": index, "words": 0, "rows": []}
    targets, own = [w for w, _ in named], [m for _, m in named]
    compare_generation(forward, targets, [FLOOR], masks=own)  # warms caches, so that times compare
    quick = [m for m in methods if not is_long(m)]
    long = [m for m in methods if is_long(m)]
    found = []
    if quick:
        found = [compare_generation(forward, targets, quick, masks=own, score=s) for s in STATES]
    for state in STATES:  # one word a scene
        names = [m for m in long if state == STATES[0] or m in TWICE]
        if names:
            found.append(
                compare_generation(forward, targets[:1], names, masks=own[:1], score=state)
            )
    rows = [
        {
            "method": r.name,
            "score": one.settings["score"],
            "words": len(one.targets),
            "status": r.status,
            "note": r.note,
            "seconds": r.cost.seconds,
            "forwards": r.cost.forwards,
            "backwards": r.cost.backwards,
            "peak_bytes": r.cost.peak_bytes,
            "scores": [
                None if s is None else [float(getattr(s, m)) for m in METRICS] for s in r.scores
            ],
        }
        for one in found
        for r in one.rows
    ]
    return {"scene": index, "words": len(named), "layer": forward.layer, "rows": rows}


@app.command()
def measure(
    scenes: Annotated[int, typer.Option(min=1)] = 100,
    start: Annotated[int, typer.Option(min=0)] = FIRST,
    shard: Annotated[str, typer.Option(help="i/n: every n-th scene from the i-th")] = "0/1",
    methods: Annotated[list[str] | None, typer.Option("--method", "-M")] = None,
    layer: Annotated[int | None, typer.Option(help="block; default: recommended")] = None,
    folder: Annotated[Path, typer.Option()] = FOLDER,
) -> None:
    """Measure; one file a scene, those that exist are kept."""
    torch.set_num_threads(1)
    part, parts = (int(x) for x in shard.split("/"))
    names = list(methods or method_names())
    chosen_methods(names)  # unknown names end it here
    folder.mkdir(parents=True, exist_ok=True)
    adapter = load("mini")
    for index in range(start + part, start + scenes, parts):
        file = folder / f"{index:05d}.json"
        if file.exists():
            continue
        record = {**measure_scene(adapter, index, names, layer), "machine": machine()}
        new = file.with_suffix(".new")
        new.write_text(json.dumps(record))
        new.rename(file)
        print(index, record["words"], flush=True)


def read(folders: list[Path], start: int, scenes: int) -> list[dict]:
    """Records of all scenes; rows that an earlier folder has already are not taken again."""
    whole = [read_folder(f, start, scenes) for f in folders]
    for records in whole[1:]:
        for first, more in zip(whole[0], records, strict=True):
            known = {(r["method"], r["score"]) for r in first["rows"]}
            first["rows"] += [r for r in more["rows"] if (r["method"], r["score"]) not in known]
    return whole[0]


def read_folder(folder: Path, start: int, scenes: int) -> list[dict]:
    files = [folder / f"{i:05d}.json" for i in range(start, start + scenes)]
    missing = [f.name for f in files if not f.exists()]
    if missing:
        raise typer.BadParameter(f"{len(missing)} scenes are missing, first {missing[0]}")
    return [r for f in files if (r := json.loads(f.read_text()))["words"]]


def summary(records: list[dict], name: str, score: str) -> dict:
    """Means over words, the interval of F3, and costs of one method read at one state."""
    rows = [
        next((r for r in record["rows"] if (r["method"], r["score"]) == (name, score)), None)
        for record in records
    ]
    floors = [next(r for r in record["rows"] if r["method"] == FLOOR) for record in records]
    if all(row is None for row in rows):
        return {}
    there = [(row, floor) for row, floor in zip(rows, floors, strict=True) if row is not None]
    unfinished = [row for row, _ in there if row["status"] != "done"]
    scored = [s for row, _ in there for s in row["scores"] if s is not None]
    out: dict = {"words": len(scored), "unfinished": len(unfinished)}
    if unfinished:
        out["note"] = unfinished[0]["note"]
    if scored:
        values = torch.tensor(scored, dtype=torch.float64)
        values[:, METRICS.index("contrast")].clamp_(max=20)
        own = bootstrap_ci(values.T, generator=torch.Generator().manual_seed(0))
        out |= dict(zip(METRICS, own.mean.tolist(), strict=True))
        out |= {"low": float(own.low[-1]), "high": float(own.high[-1])}
    finished = [(row, floor) for row, floor in there if row["status"] == "done"]
    if finished:
        out["passes"] = [
            statistics.mean(row[kind] / row["words"] for row, _ in finished)
            for kind in ("forwards", "backwards")
        ]
        out["time"] = statistics.median(
            row["seconds"] / row["words"] / (floor["seconds"] / floor["words"])
            for row, floor in finished
        )
    return out


@app.command()
def table(
    scenes: Annotated[int, typer.Option(min=1)] = 100,
    start: Annotated[int, typer.Option(min=0)] = FIRST,
    folder: Annotated[list[Path] | None, typer.Option(help="repeatable: rows add up")] = None,
) -> None:
    """Print README's table as Markdown, group after group."""
    records = read(folder or [FOLDER], start, scenes)
    words = sum(r["words"] for r in records)
    print(
        f"Scenes {start}–{start + scenes - 1}, {words} object words ({len(records)}, one a scene, "
        f"for methods marked *), block {records[0]['layer']}; {records[0]['machine']}.\n"
    )
    print(
        "| method | `name` · source | needs | gives | runs on | passes a word | time "
        "| F3 %, commit | F3 %, final |"
    )
    print("|---|---|---|---|---|---|---|---|---|")
    group = None
    for name in method_names():
        facts = METHODS[name].facts
        if facts.group != group:
            group = facts.group
            print(f"| **{group}** | | | | | | | | |")
        print(line(name, [summary(records, name, state) for state in STATES]))


def line(name: str, found: list[dict]) -> str:
    """One method's row; ``found`` holds its figures at each of the states."""
    facts, own = METHODS[name].facts, found[0]
    needs = ", ".join(n for n in facts.needs if n != "pixel tokens") or "–"
    gives = "image, text" if facts.text else "image"
    gives += "; one map for all words" if facts.target_blind else ""
    passes = "–"
    if "passes" in own:
        forwards, backwards = own["passes"]
        passes = f"{forwards:.3g}" + (f" + {backwards:.3g} back" if backwards else "")
    cells = [
        facts.label + ("*" if is_long(name) else ""),
        f"`{name}` · {facts.source}",
        needs,
        gives,
        ", ".join(facts.runs_on),
        passes,
        f"{own['time']:.2g}×" if "time" in own else own.get("note", "not measured"),
        *(
            f"{one['f3'] * 100:.1f} [{one['low'] * 100:.1f}, {one['high'] * 100:.1f}]"
            if "f3" in one
            else ""
            for one in found
        ),
    ]
    return f"| {' | '.join(cells)} |"


if __name__ == "__main__":
    app()
