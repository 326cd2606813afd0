r"""Do maps favour image tokens for their place in the sequence, whatever the image shows there?

    python benchmarks/position_bias.py --scenes 40
    python benchmarks/position_bias.py --model mini_ar --scenes 40
    python benchmarks/position_bias.py --model FOLDER --images PICTURES --method diffusion_cam

Behind a causal mask an image token sees those before it and not those behind. To tell the place
from what is shown there, every image is explained twice, as it is and turned by 180°, which
reverses the order of its tokens: over both, each place and its mirror place have shown the same. So
without a bias, and as far as a model reads turned images alike, the mean share of a map at place i
is that at place N - 1 - i, and has no correlation with i.

Reported over images, with intervals of a bootstrap over them: the correlation (Pearson) of the mean
share with the order of tokens; with the order inside a row alone, which is a placebo where rows are
many; and the share of a map in the later half of the tokens, 0.5 without a bias.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # before torch is imported: see docs/COST.md

import torch
import typer
from maps_tables import markdown
from PIL import Image
from reports import commit, machine
from torch import Tensor
from tqdm import tqdm

from captum_dcam import DenoisingForward, load
from captum_dcam.data.scenes import HELD_OUT, make_scene
from captum_dcam.errors import InputError
from captum_dcam.files import write_json
from captum_dcam.methods import AttributionTask, method
from captum_dcam.model.words import resolve

PROMPT = "describe the image ."
ROOT = Path(__file__).parents[1]
#: resamples of the images
RESAMPLES = 2000


def shares(adapter: Any, image: Image.Image, prompt: str, methods: Sequence[str]) -> Tensor | None:
    """(methods, h, w) positive parts of the nouns' maps as shares of their sums, averaged over
    nouns; None where the answer has no noun, or no method a map."""
    forward = DenoisingForward(adapter)
    request = adapter.prepare([[image]], [prompt])
    if len(request.layout.grids) != 1:
        raise InputError(
            f"{adapter.family} lays the image out in {len(request.layout.grids)} grids: expected "
            "one, whose order of tokens a turned image reverses"
        )
    trajectory = forward.generate(request)
    targets = resolve(adapter, trajectory.tokens[0].tolist(), "nouns")
    if not targets:
        return None
    found = []
    for name in methods:
        maps = method(name).attribute(AttributionTask(forward, targets)).maps[0]
        positive = maps.detach().double().cpu().relu()
        sums = positive.sum((-2, -1), keepdim=True)
        some = sums[:, 0, 0] > 0
        if not bool(some.any()):
            return None
        found.append((positive[some] / sums[some]).mean(0))
    return torch.stack(found)


def balanced(
    adapter: Any, images: Iterator[Image.Image], prompt: str, methods: Sequence[str]
) -> tuple[Tensor, int]:
    """(images, methods, h, w) shares of maps in the order of tokens, averaged over an image and the
    same turned by 180°; and the number of images left out for want of a map."""
    rows, left = [], 0
    for image in images:
        both = [shares(adapter, one, prompt, methods) for one in (image, image.rotate(180))]
        if any(one is None for one in both):
            left += 1
        else:
            rows.append(torch.stack([one for one in both if one is not None]).mean(0))
    if len(rows) < 2:
        raise InputError(
            f"{len(rows)} images have maps of nouns, {left} none: expected two or more"
        )
    return torch.stack(rows), left


def statistics_of(mean: Tensor) -> Tensor:
    """(…, 3) of mean shares (…, h, w): correlation with the order of tokens, with that inside a
    row, and the share of the later half."""
    high, wide = mean.shape[-2:]
    flat, count = mean.flatten(-2), high * wide
    place = torch.arange(count, dtype=torch.float64)
    later = (place > (count - 1) / 2).double() + (place == (count - 1) / 2).double() / 2
    return torch.stack(
        (correlation(flat, place), correlation(flat, place % wide), (flat * later).sum(-1)), -1
    )


def correlation(values: Tensor, order: Tensor) -> Tensor:
    """Pearson's, over the last axis; 0 where values do not vary."""
    values = values - values.mean(-1, keepdim=True)
    order = order - order.mean()
    lengths = values.norm(dim=-1) * order.norm()
    return torch.where(lengths > 0, values @ order / lengths.clamp_min(1e-300), 0.0)


def intervals(rows: Tensor, seed: int) -> Tensor:
    """(methods, 3, 3) of (images, methods, h, w): every statistic, and the ends of its interval of
    95 % over images that are drawn again."""
    draws = torch.Generator().manual_seed(seed)
    count = len(rows)
    picked = torch.randint(count, (RESAMPLES, count), generator=draws)
    weights = torch.zeros(RESAMPLES, count, dtype=rows.dtype)
    weights.scatter_add_(1, picked, torch.full_like(weights, 1 / count))
    drawn = statistics_of(torch.tensordot(weights, rows, 1))
    ends = drawn.quantile(torch.tensor([0.025, 0.975], dtype=drawn.dtype), dim=0)
    return torch.stack((statistics_of(rows.mean(0)), *ends), -1)


def images_of(folder: Path | None, first: int, count: int) -> Iterator[Image.Image]:
    """Held-out scenes, or the files of a folder in the order of their names."""
    if folder is None:
        for index in tqdm(range(first, first + count), desc="images"):
            yield make_scene(HELD_OUT, index).image
        return
    for path in tqdm(sorted(p for p in folder.iterdir() if p.is_file())[:count], desc="images"):
        with Image.open(path) as image:
            yield image.convert("RGB")


def main(
    model: Annotated[str, typer.Option(help="As captum_dcam.load takes it.")] = "mini",
    scenes: Annotated[int, typer.Option(min=2, help="Number of images.")] = 40,
    start: Annotated[int, typer.Option(min=0, help="First held-out scene.")] = 60,
    images: Annotated[Path | None, typer.Option(help="A folder of images instead.")] = None,
    prompt: Annotated[str, typer.Option()] = PROMPT,
    methods: Annotated[list[str] | None, typer.Option("--method")] = None,
    seed: Annotated[int, typer.Option(help="Of the bootstrap.")] = 0,
    output: Annotated[Path | None, typer.Option(help="JSON file.")] = None,
) -> None:
    names = methods or ["diffusion_cam", "attention"]
    adapter = load(model)
    rows, left = balanced(adapter, images_of(images, start, scenes), prompt, names)
    found = intervals(rows, seed)
    columns = ("correlation with order", "inside a row", "share of the later half")
    table = [
        [name, *(f"{v:+.3f} [{low:+.3f}, {high:+.3f}]" for v, low, high in one.tolist())]
        for name, one in zip(names, found, strict=True)
    ]
    print(markdown(["method", *columns], table))
    print(f"{model}: {len(rows)} images, each as it is and turned; {left} without a map")
    if output is not None:
        record = {
            "model": model, "images": len(rows), "left out": left, "start": start,
            "prompt": prompt, "seed": seed, "commit": commit(ROOT), "machine": machine(),
            "rows": {n: dict(zip(columns, one.tolist(), strict=True))
                     for n, one in zip(names, found, strict=True)},
        }  # fmt: skip
        write_json(output, record)


if __name__ == "__main__":
    typer.run(main)
