r"""What an explanation costs, as ratios from one run: ``python benchmarks/cost.py``.

Time: one word and all words of an answer against the floor (one forward and one backward of the
blocks above the tap) and against the generation they explain; a word with the default refinements
against Captum's LayerGradCam, when the maps of repeated words are still to be computed and after.
Memory: peak while generating and explaining over peak while generating. Refinements: against the
plain numpy loops of ``tests/refine/loops.py`` on a batch of maps.
"""

from __future__ import annotations

import json
import platform
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from captum.attr import LayerGradCam

from captum_dcam import DenoisingForward, DiffusionCAM, explain_generation, load
from captum_dcam.data.scenes import HELD_OUT, make_scene
from captum_dcam.model.gradients import target_gradients
from captum_dcam.model.words import Target, words_of
from captum_dcam.refine import AKD, CBA, DACG, SICD, RankGaussian, RefineContext

ROOT = Path(__file__).resolve().parent.parent


def seconds(work: Callable[[], Any], repeats: int) -> float:
    """Median time of ``work`` after two warm-ups."""
    times = []
    for i in range(repeats + 2):
        _synchronize()
        tick = time.perf_counter()
        work()
        _synchronize()
        times.append(time.perf_counter() - tick)
        del i
    return statistics.median(times[2:])


def _synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def peak_bytes(work: Callable[[], Any]) -> int:
    """Peak memory while ``work`` runs: CUDA's allocator, or the process's resident set (Linux)."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        work()
        return torch.cuda.max_memory_allocated()
    Path("/proc/self/clear_refs").write_text("5")  # resets the high-water mark
    work()
    status = Path("/proc/self/status").read_text()
    line = next(x for x in status.splitlines() if x.startswith("VmHWM"))
    return int(line.split()[1]) * 1024


def floor(forward: DenoisingForward, target: Target) -> Callable[[], Any]:
    """One forward and one backward of what lies above the tap, written without the library.

    With a prefix cache these are the blocks above over the prefix, then the response's step;
    without a cache the blocks above over the whole sequence.
    """
    model, adapter = forward.adapter.model, forward.adapter
    request, trajectory = forward.request, forward.trajectory
    step = trajectory.step_of(0, target.positions[0], "commit")
    canvas = trajectory.states[0][step]
    above = list(model.layers)[forward.layer + 1 :]
    prefix = adapter.embed(request.pixels, *request.extras)
    response = model.embed_words(canvas)
    p, t = prefix.embeds.shape[1], canvas.shape[1]
    rope = model.rope(torch.arange(p + t, device=canvas.device)[None], prefix.embeds.dtype)
    rope_p = tuple(r[:, :, :p] for r in rope)
    rope_t = tuple(r[:, :, p:] for r in rope)
    start = torch.randn_like(prefix.embeds)
    whole = torch.cat((start, response), dim=1)

    def prefix_regime() -> None:
        hidden = start.clone().requires_grad_()
        x, y = hidden, response
        for block in above:
            x, past = block(x, rope_p, (p,), (None,), use_cache=True)
            y, _ = block(y, rope_t, (t,), (None,), past=past)
        logit = model.unembed(y)[0, target.positions[0], target.token_ids[0]]
        torch.autograd.grad(logit, hidden)

    def full_regime() -> None:
        hidden = whole.clone().requires_grad_()
        x = hidden
        for block in above:
            x, _ = block(x, rope, (p + t,), (None,))
        logit = model.unembed(x[:, p:])[0, target.positions[0], target.token_ids[0]]
        torch.autograd.grad(logit, hidden)

    return prefix_regime if trajectory.cache == "prefix" else full_regime


def attribution(model: str, cache: str, layer: int | None, repeats: int, device: str) -> dict:
    """Times and peaks of one configuration."""
    adapter = load(model, cache=cache, device=device)
    scene = next(s for s in (make_scene(HELD_OUT, i) for i in range(100)) if len(s.groups) == 4)
    request = adapter.prepare([[scene.image]], ["describe the image in detail ."])
    forward = DenoisingForward(adapter, layer)
    forward.generate(request)
    words = words_of(adapter, forward.trajectory.tokens[0].tolist())
    one = words[-1:]

    def generate() -> None:
        forward.generate(request)

    def everything() -> None:
        forward.generate(request)
        explain_generation(forward, list(words))

    base = seconds(floor(forward, one[0]), repeats)
    single = seconds(lambda: target_gradients(forward, one), repeats)
    every = seconds(lambda: target_gradients(forward, words), max(3, repeats // 3))
    pixels, target = request.pixels, (one[0].positions[0], one[0].token_ids[0])
    captums, arguments = LayerGradCam(forward, forward.tap), forward.arguments(target)
    grad_cam = seconds(
        lambda: captums.attribute(pixels, target, additional_forward_args=arguments), repeats
    )
    first = seconds(lambda: DiffusionCAM(forward.again()).attribute(pixels, target), repeats)
    later = seconds(lambda: DiffusionCAM(forward).attribute(pixels, target), repeats)
    generation = seconds(generate, max(3, repeats // 3))
    plain, explained = peak_bytes(generate), peak_bytes(everything)
    return {
        "cache": cache,
        "layer": forward.layer,
        "words": len(words),
        "floor ms": base * 1e3,
        "one word / floor": single / base,
        "all words / one word": every / single,
        "first word refined / LayerGradCam": first / grad_cam,
        "next word refined / LayerGradCam": later / grad_cam,
        "one word / generation": single / generation,
        "all words / generation": every / generation,
        "peak memory / generation's": explained / plain,
    }


def refinements(repeats: int) -> dict[str, float]:
    """Speed of each module over its numpy loop on 64 maps of 24×24."""
    sys.path.insert(0, str(ROOT / "tests" / "refine"))
    import loops

    maps = torch.rand(64, 24, 24, generator=torch.Generator().manual_seed(0))
    own = maps.numpy().astype(np.float64)
    context = RefineContext(steps=32, image_size=(480, 640))
    pairs = {
        "rank Gaussian 3×3": (RankGaussian(3), lambda m: loops.rank_gaussian(m, 3)),
        "AKD": (AKD(), lambda m: loops.akd(m, steps=32, height=480)),
        "DACG": (DACG(), loops.dacg),
        "CBA": (CBA(), loops.cba),
        "SICD": (SICD(), loops.sicd),
    }
    out = {}
    for name, (ours, loop) in pairs.items():
        tick = time.perf_counter()
        for m in own:
            loop(m)
        slow = time.perf_counter() - tick
        out[name] = slow / seconds(lambda r=ours: r(maps, context), repeats)
    return out


def main(
    model: Annotated[str, typer.Option()] = "mini",
    device: Annotated[str, typer.Option()] = "cpu",
    layer: Annotated[list[int] | None, typer.Option(help="Blocks to tap. Default: all")] = None,
    repeats: Annotated[int, typer.Option()] = 9,
    threads: Annotated[int, typer.Option()] = 2,
    output: Annotated[Path | None, typer.Option(help="Write the figures here as JSON.")] = None,
) -> None:
    """Print ratios; every one compares two timings of this run."""
    torch.set_num_threads(threads)
    layers = layer or range(load(model).deepest_block + 1)
    found = [attribution(model, r, b, repeats, device) for r in ("prefix", "none") for b in layers]
    names = list(found[0])
    typer.echo("| " + " | ".join(names) + " |\n|" + "---|" * len(names))
    for row in found:
        cells = [f"{v:.2f}" if isinstance(v, float) else str(v) for v in row.values()]
        typer.echo("| " + " | ".join(cells) + " |")
    speed = refinements(repeats)
    typer.echo("\n| refinement | numpy loops / ours |\n|---|---|")
    for name, ratio in speed.items():
        typer.echo(f"| {name} | {ratio:.0f}× |")
    machine = {"machine": platform.machine(), "threads": threads, "torch": str(torch.__version__)}
    typer.echo(f"\n{machine}")
    if output is not None:
        content = {"machine": machine, "attribution": found, "refinements": speed}
        output.write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    typer.run(main)
