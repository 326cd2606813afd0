r"""Crowded scenes: are objects still named, and are their words' maps still on them?

    python benchmarks/crowded.py measure --scenes 7
    python benchmarks/crowded.py table

The embedded model was trained on scenes of one to four objects; ``make_scene(max_objects=6)`` draws
up to six. ``measure`` takes the first scenes of the held-out stream that have each number of
objects, keeps one file per scene and goes on where it stopped; ``table`` prints what is stored. Of
"describe the image .": how many objects a phrase of colour and shape names, how many phrases name
none, and F3 of one shape and one colour word per scene, every row with affinity propagation.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # before torch is imported: see docs/COST.md

import torch
import typer
from maps import PROMPT, described, measure_words, some_of
from maps_tables import markdown
from reports import commit, machine
from tqdm import tqdm

from captum_dcam import DenoisingForward, load
from captum_dcam.data.scenes import HELD_OUT, Scene, make_scene, named_object
from captum_dcam.errors import StoreError
from captum_dcam.files import read_json, write_json
from captum_dcam.metrics import cluster_bootstrap
from captum_dcam.model.words import answer_token_texts, words_of

app = typer.Typer(add_completion=False)
MOST = 6
ROWS = ("diffusion_cam", "attention", "logit_lens")
FIRST = 5000
Folder = Annotated[Path, typer.Option(help="One file per scene.")]


def crowded(count: int, wanted: int) -> Iterator[Scene]:
    """The first ``wanted`` scenes from :data:`FIRST` on that have ``count`` objects."""
    found, index = 0, FIRST
    while found < wanted:
        scene = make_scene(HELD_OUT, index, max_objects=MOST)
        if len(scene.objects) == count:
            found += 1
            yield scene
        index += 1


def measure_scene(adapter: Any, scene: Scene) -> dict[str, Any]:
    """What one scene's description names, and F3 of its words' maps."""
    forward = DenoisingForward(adapter)
    trajectory = forward.generate(adapter.prepare([[scene.image]], [PROMPT]))
    tokens = trajectory.tokens[0].tolist()
    texts = answer_token_texts(adapter, tokens)
    named = described(scene, forward)
    things = {n.thing for n in named}
    phrases = {named_object(texts, word) for word in words_of(adapter, tokens)}
    said = {f"{color} {shape}" for color, shape in phrases if color and shape}
    f3, few = {}, some_of(named, 1, scene.index)
    for name in ROWS if few else ():
        _, scores, _ = measure_words(forward, few, name, scene.index, False)
        f3[name] = scores["affinity"]["f3"]
    return {
        "scene": scene.index,
        "objects": len(scene.objects),
        "named": sum(f"{o.color} {o.shape}" in things for o in scene.objects),
        "said": len(said),
        "invented": len(said - things),
        "words": len(few),
        "f3": f3,
    }


@app.command()
def measure(
    folder: Folder = Path("runs/crowded"),
    scenes: Annotated[int, typer.Option(min=1, help="Of each number of objects.")] = 12,
) -> None:
    """Measure scenes; those measured already are skipped."""
    torch.set_num_threads(1)
    made = {"commit": commit(Path(__file__).parent), "machine": machine()}
    adapter = load("mini")
    folder.mkdir(parents=True, exist_ok=True)
    streams = [crowded(count, scenes) for count in range(1, MOST + 1)]
    for scene in tqdm([s for row in zip(*streams, strict=True) for s in row]):
        path = folder / f"{scene.index:05d}.json"
        if not path.exists():
            write_json(path, {**made, **measure_scene(adapter, scene)})


def line_of(count: int, records: Sequence[dict[str, Any]]) -> list[str]:
    """The table's line of scenes with ``count`` objects."""
    drawn = torch.Generator().manual_seed(0)

    def share(part: str, whole: str) -> str:
        return f"{100 * sum(r[part] for r in records) / max(1, sum(r[whole] for r in records)):.0f}"

    line = [str(count), str(len(records)), share("named", "objects"), share("invented", "said")]
    for name in ROWS:
        values = [v for r in records for v in r["f3"].get(name, ())]
        scenes = [r["scene"] for r in records for _ in r["f3"].get(name, ())]
        of = cluster_bootstrap(torch.tensor(values).double(), torch.tensor(scenes), drawn)
        line.append(f"{100 * of.mean:.1f} [{100 * of.low:.1f}, {100 * of.high:.1f}]")
    return [*line, str(sum(r["words"] for r in records))]


@app.command()
def table(folder: Folder = Path("runs/crowded")) -> None:
    """Print the table of stored scenes as Markdown."""
    records = [
        read_json(p, StoreError, "delete it and measure again")
        for p in sorted(folder.glob("*.json"))
    ]
    if not records:
        raise typer.BadParameter(f"no scene is measured in {folder}")
    counts = sorted({r["objects"] for r in records})
    heads = ["objects", "scenes", "named, %", "invented, %", *(f"F3 {n}" for n in ROWS), "words"]
    lines = [line_of(c, [r for r in records if r["objects"] == c]) for c in counts]
    made = "; ".join(sorted({f"{r['machine']}; commit {r['commit']}" for r in records}))
    typer.echo(f"{made}\n\n{markdown(heads, lines)}")


if __name__ == "__main__":
    app()
