r"""Which score, layer, product and refinement put a word's map on its object?

``python benchmarks/scores.py measure --start 0 --scenes 40 --folder runs/scores`` measures scenes
of the held-out stream, one file a scene, resumable and shardable (``--shard 0/2``);
``python benchmarks/scores.py table --folder … --start 60 --scenes 200`` prints Markdown. The
default preset was chosen on scenes 0-39 and is reported on others.
"""

from __future__ import annotations

import itertools
import os
from pathlib import Path
from typing import Annotated

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # before torch is imported: see docs/COST.md

import torch
import typer
from torch import Tensor
from tqdm import tqdm

from captum_dcam import DenoisingForward, load, sign_check
from captum_dcam.data.scenes import COLORS, HELD_OUT, SHAPE_OF, Scene, make_scene
from captum_dcam.maps import cam
from captum_dcam.metrics import (
    bootstrap_ci,
    center_blob_map,
    f3_score,
    localization,
    oracle_map,
    random_map,
)
from captum_dcam.model import gradients as vjp
from captum_dcam.model.trajectory import SCORES
from captum_dcam.model.words import Target, repeated_function_words, words_of
from captum_dcam.refine import (
    AKD,
    CBA,
    DACG,
    SICD,
    Compose,
    MinMax,
    RefineContext,
    min_max,
    paper_refinements,
)

app = typer.Typer(add_completion=False)
#: maps and masks are compared at this side in pixels
SIDE = 96
FORMS = (
    ("pooled", False),
    ("pooled", True),
    ("positionwise", False),
    ("positionwise", True),
    ("plus_plus", False),
)
REFINEMENTS = {
    "base": Compose([]),
    "+ AKD": Compose([MinMax(), AKD()]),
    "+ DACG": Compose([MinMax(), DACG()]),
    "+ CBA": Compose([MinMax(), CBA()]),
    "+ SICD": Compose([MinMax(), SICD()]),
    "all four": paper_refinements(),
}
COLUMNS = ("Obj-IoU", "contrast", "concentration", "F3")


def object_words(scene: Scene, words: tuple[Target, ...]) -> list[tuple[Target, Tensor]]:
    """Shape words of the answer that name objects of the scene, with their masks (SIDE, SIDE)."""
    out = []
    for before, word in itertools.pairwise(words):
        shape = SHAPE_OF.get(word.text)
        if shape is None or before.text not in COLORS:
            continue
        mask = torch.from_numpy(scene.mask_of(before.text, shape)).float()
        if mask.any():
            small = torch.nn.functional.adaptive_avg_pool2d(mask[None], SIDE)[0]
            out.append((word, small >= 0.5))
    return [(w, m) for w, m in out if m.any()]


def scores_of(maps: Tensor, mask: Tensor) -> Tensor:
    """(N, 4) metrics of maps (N, 24, 24) against one mask; contrast capped at 20."""
    big = torch.nn.functional.interpolate(
        maps[:, None].float(), (SIDE, SIDE), mode="bilinear", align_corners=False
    )[:, 0]
    found = localization(big, mask.expand_as(big))
    return torch.stack(
        (found.obj_iou, found.contrast.clamp_max(20), found.concentration, found.f3), dim=1
    )


def measure_scene(adapter: object, scene: Scene, signs: bool) -> dict[str, Tensor]:
    """Per object word: metrics of every (layer, score, form, refinement), floors and ceiling."""
    forward = DenoisingForward(adapter, 0)
    request = adapter.prepare([[scene.image]], ["describe the image ."])
    trajectory = forward.generate(request, keep=False)
    words = words_of(adapter, trajectory.tokens[0].tolist())
    found = object_words(scene, words)
    if not found:
        return {}
    targets = [w for w, _ in found]
    repeated = list(repeated_function_words(words))
    generator = torch.Generator().manual_seed(scene.index)
    table, sign_rows = [], []
    for layer, score in itertools.product(range(adapter.deepest_block + 1), SCORES):
        tapped = DenoisingForward(adapter, layer)
        tapped.bind(request, trajectory)
        rows = vjp.target_gradients(tapped, targets + repeated, score=score)
        for product, center in FORMS:
            maps = _cams(rows, len(targets) + len(repeated), product, center)
            own = min_max(maps[len(targets) :].mean(0)) if repeated else None
            maps = maps[: len(targets)]
            context = RefineContext(trajectory.steps, request.layout.grids[0].image_size, own)
            table.append(torch.stack([r(maps, context) for r in REFINEMENTS.values()]))
            if signs:
                sign_rows.append(sign_check(tapped, targets, [maps], generator, score=score))
    stacked = torch.cat(table).transpose(0, 1)  # words, configurations, 24, 24
    floor = [_floors(mask, generator) for _, mask in found]
    out = {
        "metrics": torch.stack(
            [scores_of(m, mask) for m, (_, mask) in zip(stacked, found, strict=True)]
        ),
        "floors": torch.stack(floor),
    }
    if signs:
        out["signs"] = torch.stack(sign_rows, dim=1)
    return out


def _cams(rows: list[vjp.TargetGradients], count: int, product: str, center: bool) -> Tensor:
    """ReLU maps (count, 24, 24); the rows of one target add up first."""
    maps = torch.zeros(count, *rows[0].features[0].shape[-2:])
    for row in rows:
        maps[row.target] += cam(row.features[0], row.gradients[0], product, center).detach()
    return maps.relu()


def _floors(mask: Tensor, generator: torch.Generator) -> Tensor:
    """Metrics (3, 4) of the oracle, the centre blob and a random map."""
    maps = (
        oracle_map(mask, (24, 24)).float(),
        center_blob_map((24, 24)).float(),
        random_map((24, 24), generator).float(),
    )
    return scores_of(torch.stack(maps), mask)


def configurations(layers: int) -> list[tuple[int, str, str, bool, str]]:
    """(layer, score, product, center, refinement) in the order of the stored columns."""
    return [
        (layer, score, product, center, name)
        for layer, score in itertools.product(range(layers), SCORES)
        for product, center in FORMS
        for name in REFINEMENTS
    ]


@app.command()
def measure(
    folder: Annotated[Path, typer.Option(help="One file a scene goes here.")] = Path("runs/scores"),
    model: Annotated[str, typer.Option(help="'mini' or a folder.")] = "mini",
    cache: Annotated[str, typer.Option()] = "prefix",
    start: Annotated[int, typer.Option(help="First scene of the held-out stream.")] = 0,
    scenes: Annotated[int, typer.Option()] = 60,
    signs: Annotated[int, typer.Option(help="Sign check on the first so many scenes.")] = 0,
    shard: Annotated[str, typer.Option(help="i/n: every n-th scene, from the i-th.")] = "0/1",
) -> None:
    """Measure scenes; those measured already are skipped."""
    folder.mkdir(parents=True, exist_ok=True)
    adapter = load(model, cache=cache)
    part, parts = map(int, shard.split("/"))
    for index in tqdm(range(start + part, start + scenes, parts)):
        path = folder / f"{cache}-{index:05d}.pt"
        if not path.exists():
            scene = make_scene(HELD_OUT, index)
            result = measure_scene(adapter, scene, index - start < signs)
            torch.save(result, path.with_suffix(".tmp"))
            path.with_suffix(".tmp").replace(path)


def read(folder: Path, cache: str, start: int, scenes: int) -> list[dict[str, Tensor]]:
    """Stored results of scenes in which the answer named an object."""
    paths = [folder / f"{cache}-{i:05d}.pt" for i in range(start, start + scenes)]
    missing = [p.name for p in paths if not p.exists()]
    if missing:
        raise typer.BadParameter(f"{len(missing)} scenes are not measured, {missing[0]} first")
    return [r for r in (torch.load(p, weights_only=True) for p in paths) if r]


def interval(values: list[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """Mean and 95 % interval over scenes (bootstrap of scene means) of per-word values (W, …)."""
    means = torch.stack([v.double().mean(0) for v in values])  # scenes, …
    low_high = bootstrap_ci(means.movedim(0, -1), torch.Generator().manual_seed(0))
    return low_high.mean, low_high.low, low_high.high


def line(name: str, mean: Tensor, low: Tensor, high: Tensor) -> str:
    """A Markdown row: four metrics with half-widths of their intervals, and F3 of the means."""
    scale = (100, 1, 100, 100)
    cells = [
        f"{float(m) * s:.2f} ± {float(h - l) * s / 2:.2f}"
        for m, l, h, s in zip(mean, low, high, scale, strict=True)  # noqa: E741
    ]
    whole = float(f3_score(mean[0], mean[1], mean[2])) * 100
    return f"| {name} | " + " | ".join(cells) + f" | {whole:.2f} |"


HEADER = (
    "| | Obj-IoU % | contrast | concentration % | F3 % | F3 of means % |\n|---|---|---|---|---|---|"
)


@app.command()
def table(
    folder: Annotated[Path, typer.Option()] = Path("runs/scores"),
    cache: Annotated[str, typer.Option()] = "prefix",
    start: Annotated[int, typer.Option()] = 60,
    scenes: Annotated[int, typer.Option()] = 200,
    best: Annotated[int, typer.Option(help="Print the best so many alone; 0: all.")] = 0,
) -> None:
    """Print the table of stored scenes as Markdown."""
    results = read(folder, cache, start, scenes)
    words = sum(len(r["metrics"]) for r in results)
    kept = {"prefix": "prefix cache", "none": "no cache"}[cache]
    typer.echo(f"{len(results)} scenes, {words} object words, {kept}; ± is half a 95 % interval.\n")
    typer.echo(HEADER)
    for i, name in enumerate(("oracle: mask on the grid", "centre blob", "random")):
        typer.echo(line(name, *interval([r["floors"][:, i] for r in results])))
    mean, low, high = interval([r["metrics"] for r in results])
    rows = configurations(mean.shape[0] // (len(SCORES) * len(FORMS) * len(REFINEMENTS)))
    order = range(len(rows))
    if best:
        order = sorted(order, key=lambda i: -float(mean[i, 3]))[:best]
    for i in order:
        layer, score, product, center, name = rows[i]
        form = f"{product}{', centred' if center else ''}"
        typer.echo(line(f"block {layer}, {score}, {form}, {name}", mean[i], low[i], high[i]))
    _print_signs([r["signs"] for r in results if "signs" in r], rows)


def _print_signs(signs: list[Tensor], rows: list[tuple[int, str, str, bool, str]]) -> None:
    """Fall of log-probability when the highlighted tenth of the image tokens is erased."""
    if not signs:
        return
    mean, low, high = interval(signs)
    typer.echo(
        f"\nSign check on {len(signs)} scenes: fall of log-probability, highlighted / random.\n"
    )
    typer.echo("| | highlighted | random |\n|---|---|---|")
    for i, (layer, score, product, center, _) in enumerate(rows[:: len(REFINEMENTS)]):
        form = f"{product}{', centred' if center else ''}"
        cells = [f"{mean[i, k]:.3f} [{low[i, k]:.3f}, {high[i, k]:.3f}]" for k in (0, 1)]
        typer.echo(f"| block {layer}, {score}, {form} | {cells[0]} | {cells[1]} |")


if __name__ == "__main__":
    app()
