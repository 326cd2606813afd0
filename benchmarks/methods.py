r"""Every method on held-out scenes: what it costs and whether its maps lie on the objects.

    python benchmarks/methods.py measure --scenes 100 --shard 0/2 &
    python benchmarks/methods.py measure --scenes 100 --shard 1/2; wait
    python benchmarks/methods.py table --scenes 100

``measure`` keeps one file a scene and goes on where it stopped. Scores are taken at the picture's
own resolution; contrast is capped at 20. Times are ratios to the default Diffusion-CAM on the same
scene and machine, each process on one thread. Methods that their facts call expensive explain one
word a scene, the others all object words.
"""

from __future__ import annotations

import itertools
import json
import platform
import statistics
from pathlib import Path
from typing import Annotated

import torch
import typer

from captum_dcam import DenoisingForward, load
from captum_dcam.comparing import chosen_methods, compare_bound
from captum_dcam.comparison import METRICS
from captum_dcam.data.language import plural
from captum_dcam.data.scenes import COLORS, SHAPES, Scene, make_scene
from captum_dcam.methods import METHODS, method_names
from captum_dcam.metrics import bootstrap_ci
from captum_dcam.mini.evaluate import HELD_OUT_SEED
from captum_dcam.targets import Target, words_of

PROMPT = "describe the image ."
FIRST = 60  # scenes before this one were looked at in training
FOLDER = Path("runs/methods")
FLOOR = "diffusion_cam"
#: states that quick methods are read at; the others are read at the first
STATES = ("commit", "final")
SHAPE_OF = {**{s: s for s in SHAPES}, **{plural(s): s for s in SHAPES}}
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
    scene = make_scene(HELD_OUT_SEED, index)
    forward = DenoisingForward(adapter, layer)
    trajectory = forward.generate(adapter.prepare([[scene.image]], [PROMPT]))
    tokens = trajectory.tokens[0].tolist()
    named = object_words(scene, words_of(adapter, tokens))
    if not named:
        return {"scene": index, "words": 0, "rows": []}
    targets, own = [w for w, _ in named], [m for _, m in named]
    compare_bound(forward, targets, [FLOOR], masks=own)  # warms caches, so that times compare
    quick = [m for m in methods if not is_long(m)]
    long = [m for m in methods if is_long(m)]
    found = []
    if quick:
        found = [compare_bound(forward, targets, quick, masks=own, score=s) for s in STATES]
    if long:  # one word a scene
        found.append(compare_bound(forward, targets[:1], long, masks=own[:1]))
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


def machine() -> str:
    """Class of the machine and versions, without its name."""
    import captum

    model = next(
        (x.split(":")[1].strip() for x in open("/proc/cpuinfo") if x.startswith("model name")),
        platform.processor(),
    )
    return (
        f"{model}, one thread a process; torch {torch.__version__}, captum {captum.__version__}, "
        f"Python {platform.python_version()}"
    )


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


def read(folder: Path, start: int, scenes: int) -> list[dict]:
    files = [folder / f"{i:05d}.json" for i in range(start, start + scenes)]
    missing = [f.name for f in files if not f.exists()]
    if missing:
        raise typer.BadParameter(f"{len(missing)} scenes are missing, first {missing[0]}")
    return [r for f in files if (r := json.loads(f.read_text()))["words"]]


def summary(records: list[dict], name: str) -> dict:
    """Means over words, the interval of F3, and costs of one method."""
    rows = [next((r for r in record["rows"] if r["method"] == name), None) for record in records]
    scored = [
        (s, record["scene"])
        for row, record in zip(rows, records, strict=True)
        if row is not None
        for s in row["scores"]
        if s is not None
    ]
    failed = [r for r in rows if r is None or r["status"] != "done"]
    out = {"method": name, "words": len(scored), "unfinished": len(failed)}
    if failed:
        out["note"] = "not measured" if failed[0] is None else failed[0]["note"]
    if scored:
        values = torch.tensor([s for s, _ in scored], dtype=torch.float64)
        values[:, 1].clamp_(max=20)
        low, high = bootstrap_ci(values[:, 3], generator=torch.Generator().manual_seed(0))[1:]
        out |= dict(zip(METRICS, values.mean(0).tolist(), strict=True))
        out |= {"low": float(low), "high": float(high)}
    ratios, passes = [], []
    for row, record in zip(rows, records, strict=True):
        floor = next((r for r in record["rows"] if r["method"] == FLOOR), None)
        if row is not None and row["status"] == "done":
            passes.append((row["forwards"] + row["backwards"]) / row["words"])
            if floor is not None:
                each = floor["seconds"] / floor["words"]
                ratios.append(row["seconds"] / row["words"] / each)
    if ratios:
        out |= {"time": statistics.median(ratios)}
    if passes:
        out |= {"passes": statistics.mean(passes)}
    return out


@app.command()
def table(
    scenes: Annotated[int, typer.Option(min=1)] = 100,
    start: Annotated[int, typer.Option(min=0)] = FIRST,
    folder: Annotated[Path, typer.Option()] = FOLDER,
) -> None:
    """Print the table as Markdown, group after group."""
    records = read(folder, start, scenes)
    words = sum(r["words"] for r in records)
    print(
        f"Scenes {start}–{start + scenes - 1}, {words} object words ({len(records)}, one a scene, "
        f"for methods marked *), block {records[0]['layer']}; {records[0]['machine']}.\n"
    )
    print(
        "| method | name | source | needs | passes a word | gives | runs on | time | Obj-IoU % "
        "| contrast | conc. % | F3 % |"
    )
    print("|---|---|---|---|---|---|---|---|---|---|---|---|")
    group = None
    for name in method_names():
        facts, own = METHODS[name].facts, summary(records, name)
        if facts.group != group:
            group = facts.group
            print(f"| **{group}** | | | | | | | | | | | |")
        print(line(name, facts, own))


def line(name: str, facts, own: dict) -> str:
    needs = ", ".join(n for n in facts.needs if n != "pixel tokens") or "–"
    gives = "image, text" if facts.text else "image"
    gives += ", same for every word" if facts.target_blind else ""
    start = f"| {facts.label} | `{name}` | {facts.source} | {needs} "
    if "f3" not in own:
        return (
            f"{start}| – | {gives} | {', '.join(facts.runs_on)} | {own.get('note', '')} | | | | |"
        )
    f3 = f"{own['f3']:.1%} [{own['low']:.1%}, {own['high']:.1%}]".replace("%", "")
    return (
        f"{start}| {own['passes']:.0f} | {gives} | {runs_on} "
        f"| {own['time']:.3g}× | {own['obj_iou'] * 100:.1f} | {own['contrast']:.1f} "
        f"| {own['concentration'] * 100:.1f} | {f3} |"
    )


if __name__ == "__main__":
    app()
