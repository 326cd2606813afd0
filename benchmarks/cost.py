r"""What maps cost, as ratios from one run: ``python benchmarks/cost.py --write``.

Everything that is compared runs in turn, one after the other, again and again, and medians are
divided: what else the machine does meets all alike. The unit is the floor of as many words: one
forward of what lies above the tap and a backward for every word, written without the library.
What runs on one thread is timed by the processor's time, in which other processes hardly show.
Refinements are timed by the clock, alone and beside a busy process, and the plain numpy loops of
``tests/refine/loops.py`` beside them.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Annotated, Any

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # before torch is imported: see docs/COST.md

import numpy as np
import torch
import typer
from captum.attr import LayerGradCam
from reports import commit, machine, rewritten
from torch import Tensor

from captum_dcam import DenoisingForward, DiffusionCAM, explain_generation, explain_steps, load
from captum_dcam.comparing import generator_of, run_method
from captum_dcam.data.scenes import HELD_OUT, SHAPE_OF, make_scene
from captum_dcam.methods import AttributionTask, method
from captum_dcam.model.words import Target, words_of
from captum_dcam.refine import AKD, CBA, DACG, SICD, Affinity, RankGaussian, RefineContext

ROOT = Path(__file__).resolve().parent.parent
DOCUMENT, FIGURES = ROOT / "docs" / "COST.md", ROOT / "docs" / "cost.json"
MARKS = "<!-- cost -->", "<!-- end -->"
COUNTS, BATCHES = (1, 5, 10, 26), (1, 4, 16)
DEFAULT, FLOOR = "default, explain_generation", "floor"
MAPS, LOOP = 64, "numpy loop, one map"
#: works that take a call per word: one call is timed, and counts once for every word
CALLS = ("default, attribute", "Captum's LayerGradCam", "Grad-CAM by hand")
Work, Clock = Callable[[], Any], Callable[[], float]
#: (step, response position, token): a logit that is read
Read = tuple[int, int, int]


# -- measuring -------------------------------------------------------------------------------------


def seconds(work: Work, repeats: int, clock: Clock = time.perf_counter) -> float:
    """Median time of ``work`` after two warm-ups."""
    return interleaved({"": work}, repeats, warm=2, clock=clock)[""]


def interleaved(
    works: Mapping[str, Work], repeats: int, warm: int = 1, clock: Clock = time.perf_counter
) -> dict[str, float]:
    """Median seconds of every work; all run in turn, and each turn begins with another one."""
    times: dict[str, list[float]] = {name: [] for name in works}
    names = list(works)
    for turn in range(-warm, repeats):
        first = turn % len(names)
        for name in names[first:] + names[:first]:
            _synchronize()
            tick = clock()
            works[name]()
            _synchronize()
            if turn >= 0:
                times[name].append(clock() - tick)
    return {name: statistics.median(own) for name, own in times.items()}


def _synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def peak_bytes(work: Work) -> int:
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


@contextmanager
def busy() -> Iterator[None]:
    """Another process computes while the context is open."""
    other = subprocess.Popen([sys.executable, "-c", "while True: pass"])
    try:
        yield
    finally:
        other.kill()
        other.wait()


# -- what is compared ------------------------------------------------------------------------------


def floor(forward: DenoisingForward, reads: Sequence[Read]) -> Work:
    """The least that maps of R reads need above the tap.

    With a prefix cache: the blocks above over the prefix and R step rows, one backward of the rows
    to the cache, and R backwards through the prefix. Without: a forward and a backward of the
    blocks above over the whole sequence for each read, whose image states are its own.
    """
    model, request, trajectory = forward.adapter.model, forward.request, forward.trajectory
    steps, positions, tokens = (list(column) for column in zip(*reads, strict=True))
    above = list(model.layers)[forward.layer + 1 :]
    with torch.no_grad():
        prefix = forward.adapter.embed(request.pixels, *request.extras).embeds
        response = model.embed_words(trajectory.states[0][steps, 0])
    p, t = prefix.shape[1], response.shape[1]
    rope = model.rope(torch.arange(p + t, device=prefix.device)[None], prefix.dtype)
    rope_p, rope_t = (tuple(r[:, :, at] for r in rope) for at in (slice(p), slice(p, None)))

    def prefix_cache() -> None:
        hidden, x, y = (start := prefix.clone().requires_grad_()), start, response
        links: list[Tensor] = []
        leaves: list[Tensor] = []
        for block in above:
            x, made = block(x, rope_p, (p,), (None,), use_cache=True)
            own = [m.detach().expand(len(reads), -1, -1, -1).requires_grad_() for m in made]
            y, _ = block(y, rope_t, (t,), (None,), past=tuple(own))
            links, leaves = [*links, *made], [*leaves, *own]
        logits = model.unembed(y)[range(len(reads)), positions, tokens]
        gradients = torch.autograd.grad(logits.sum(), leaves)
        for row in range(len(reads)):
            own = [g[row : row + 1] for g in gradients]
            torch.autograd.grad(links, hidden, own, retain_graph=row < len(reads) - 1)

    def no_cache() -> None:
        for row, (_, position, token) in enumerate(reads):
            hidden = torch.cat((prefix, response[row : row + 1]), dim=1).requires_grad_()
            x = hidden
            for block in above:
                x, _ = block(x, rope, (p + t,), (None,))
            torch.autograd.grad(model.unembed(x[:, p:])[0, position, token], hidden)

    def work() -> None:
        with forward.held():
            (prefix_cache if trajectory.cache == "prefix" else no_cache)()

    return work


def grad_cam(forward: DenoisingForward, target: tuple[int, int]) -> Tensor:
    """Grad-CAM (1, h, w) on the tap, written without Captum and this library's gradients."""
    leaves: list[Tensor] = []

    def leaf(_module: Any, _inputs: Any, out: Tensor) -> Tensor:
        leaves.append(out.detach().requires_grad_())
        return leaves[-1]

    with forward.held():
        handle = forward.tap.register_forward_hook(leaf)
        try:
            logits = forward(forward.request.pixels, *forward.arguments(target))
        finally:
            handle.remove()
        (gradient,) = torch.autograd.grad(logits[0, target[0], target[1]], leaves)
    return (gradient.mean((-2, -1), keepdim=True) * leaves[0].detach()).sum(1).relu()


def works_of(forward: DenoisingForward, words: Sequence[Target]) -> dict[str, Work]:
    """Everything that makes maps of words of the bound generation, the default first."""
    pairs = [(w.positions[0], w.token_ids[0]) for w in words]
    reads = [(forward.trajectory.step_of(0, p, "commit"), p, token) for p, token in pairs]
    cam, captums = DiffusionCAM(forward), LayerGradCam(forward, forward.tap)
    pixels, first = forward.request.pixels, pairs[0]

    def explained(**settings: Any) -> Work:
        return lambda: explain_generation(forward, list(words), **settings)

    def by(name: str) -> Work:
        task = AttributionTask(forward, tuple(words), "commit", generator_of(0, name))
        return lambda: run_method(method(name), task, errors="raise")

    def captum() -> Tensor:
        arguments = forward.arguments(first)
        return captums.attribute(pixels, first, additional_forward_args=arguments).detach()

    return {
        DEFAULT: explained(),
        CALLS[0]: lambda: cam.attribute(pixels, first),
        "raw map, constant norms": explained(refinements=[]),
        "raw map, exact norms": explained(refinements=[], backward="exact"),
        CALLS[1]: captum,
        CALLS[2]: lambda: grad_cam(forward, first),
        "TAM": by("tam"),
        "CP-LRP": by("cp_lrp"),
        "attention": by("attention"),
        FLOOR: floor(forward, reads),
    }


def bound(model: str, cache: str, block: int) -> tuple[DenoisingForward, tuple[Target, ...]]:
    """A recorded generation that describes a scene of four objects, and its words, those of
    shapes first."""
    adapter = load(model, cache=cache)
    scene = next(s for s in (make_scene(HELD_OUT, i) for i in range(100)) if len(s.groups) == 4)
    forward = DenoisingForward(adapter, block)
    forward.generate(adapter.prepare([[scene.image]], ["describe the image in detail ."]))
    words = words_of(adapter, forward.trajectory.tokens[0].tolist())
    return forward, tuple(sorted(words, key=lambda word: word.text not in SHAPE_OF))


def configuration(
    forward: DenoisingForward, words: Sequence[Target], counts: Sequence[int], repeats: int
) -> dict[str, Any]:
    """Milliseconds of all works by the number of words, of all steps of a word, and of batches;
    all of them of the processor's time, on one thread."""

    def timed(works: Mapping[str, Work], turns: int, warm: int = 0) -> dict[str, float]:
        return milliseconds(interleaved(works, turns, warm, time.process_time))

    trajectory, request = forward.trajectory, forward.request
    word = words[0]
    reads = [(s, word.positions[0], word.token_ids[0]) for s in range(trajectory.steps)]
    steps = {DEFAULT: lambda: explain_steps(forward, [word]), FLOOR: floor(forward, reads)}
    batches: dict[str, Work] = {}
    for n in BATCHES:
        own = DenoisingForward(forward.adapter, forward.layer, internal_batch_size=n)
        own.bind(request, trajectory)
        batches[str(n)] = lambda own=own: explain_generation(own, list(words))
    generating = DenoisingForward(forward.adapter, forward.layer)

    def generate() -> None:
        generating.generate(request)

    memory = {"generation": generate, **batches}
    by_count = {}
    for n in counts:
        turns = max(1, 10 * repeats // max(10, n))  # fewer where each takes long
        works = works_of(forward, words[:n])
        found = timed(works, turns, warm=n == counts[0])
        by_count[str(n)] = {k: v * n if k in CALLS else v for k, v in found.items()}
    return {
        "cache": trajectory.cache,
        "block": forward.layer,
        "answer": len(words),
        "generation": seconds(generate, repeats, time.process_time) * 1e3,
        "words": by_count,
        "steps": {"count": trajectory.steps, **timed(steps, repeats)},
        "batches": timed(batches, repeats),
        "peak MiB": {name: peak_bytes(work) / 2**20 for name, work in memory.items()},
    }


def milliseconds(found: Mapping[str, float]) -> dict[str, float]:
    return {name: value * 1e3 for name, value in found.items()}


def refinements(repeats: int) -> dict[str, dict[str, float]]:
    """Milliseconds of each refinement on 64 maps, alone and beside a busy process, and of its
    numpy loop on one map."""
    sys.path.insert(0, str(ROOT / "tests" / "refine"))
    import loops

    generator = torch.Generator().manual_seed(0)
    maps, states = (torch.rand(n, 24, 24, generator=generator) for n in (MAPS, 256))
    one, tokens = (x.numpy().astype(np.float64) for x in (maps[0], states.flatten(1).T))
    context = RefineContext(steps=32, image_size=(480, 640), features=states)
    settings = 6.0, 2.0, True
    pairs = {
        "affinity": (
            Affinity(*settings),
            lambda: loops.affinity(one.ravel(), tokens, np.ones(len(tokens)), *settings),
        ),
        "rank Gaussian 3×3": (RankGaussian(3), lambda: loops.rank_gaussian(one, 3)),
        "AKD": (AKD(), lambda: loops.akd(one, steps=32, height=480)),
        "DACG": (DACG(), lambda: loops.dacg(one)),
        "CBA": (CBA(), lambda: loops.cba(one)),
        "SICD": (SICD(), lambda: loops.sicd(one)),
    }
    ours = {name: lambda r=r: r(maps, context) for name, (r, _) in pairs.items()}
    out: dict[str, dict[str, float]] = {name: {} for name in pairs}
    before = torch.get_num_threads()
    for threads in (1, 2):
        torch.set_num_threads(threads)
        for where, beside in (("alone", nullcontext()), ("beside a busy process", busy())):
            with beside:
                for name, value in milliseconds(interleaved(ours, repeats)).items():
                    out[name][f"{threads} thread{'s'[: threads - 1]}, {where}"] = value
    torch.set_num_threads(before)
    by_loops = {name: loop for name, (_, loop) in pairs.items()}
    for name, value in milliseconds(interleaved(by_loops, 1, warm=0)).items():
        out[name][LOOP] = value
    return out


# -- telling ---------------------------------------------------------------------------------------

Cell = Callable[[Mapping[str, Any]], float]


def _ms(count: int, name: str) -> Cell:
    return lambda case: case["words"][str(count)][name]


def _over(first: Cell, second: Cell) -> Cell:
    return lambda case: first(case) / second(case)


def markdown(report: Mapping[str, Any]) -> str:
    """The tables of docs/COST.md."""
    cases, counts = report["configurations"], report["counts"]
    heads = [f"{case['cache']}, block {case['block']}" for case in cases]

    def row(name: str, *cells: Cell, digits: int = 2) -> list[str]:
        return [name, *(" / ".join(f"{of(case):.{digits}f}" for of in cells) for case in cases)]

    def by_count(name: str, second: Callable[[int], Cell]) -> list[str]:
        return row(name, *(_over(_ms(n, DEFAULT), second(n)) for n in counts))

    words = [[f"time over the floor, {' / '.join(map(str, counts))} words", *heads]]
    for name in cases[0]["words"][str(counts[0])]:
        if name != FLOOR:
            words.append(row(name, *(_over(_ms(n, name), _ms(n, FLOOR)) for n in counts)))
    words.append(row("the floor in ms", *(_ms(n, FLOOR) for n in counts), digits=0))
    words.append(by_count(f"{DEFAULT}, over LayerGradCam", lambda n: _ms(n, CALLS[1])))
    words.append(by_count(f"{DEFAULT}, over the generation", lambda _: lambda c: c["generation"]))

    def every(case: Mapping[str, Any]) -> float:
        return case["steps"][DEFAULT]

    steps = [
        ["a word at all steps", *heads],
        row("steps", lambda c: c["steps"]["count"], digits=0),
        row("explain_steps over its floor", _over(every, lambda c: c["steps"][FLOOR])),
        row("explain_steps over a map of one step", _over(every, _ms(counts[0], DEFAULT))),
    ]
    most = str(BATCHES[-1])
    title = f"`internal_batch_size`: time over that of {most} / peak memory over the generation's"
    batches = [[title, *heads]]
    for n in map(str, BATCHES):
        time_of = _over(lambda c, n=n: c["batches"][n], lambda c: c["batches"][most])
        peak_of = _over(lambda c, n=n: c["peak MiB"][n], lambda c: c["peak MiB"]["generation"])
        batches.append(row(n, time_of, peak_of))
    facts = (
        f"Embedded model, an answer of {cases[0]['answer']} words, medians of {report['repeats']} "
        f"(fewer above 10 words); {report['machine']}; commit {report['commit']}."
    )
    stages = _stages(report["refinements"])
    return "\n\n".join((facts, *map(_grid, (words, steps, batches, stages))))


def _stages(found: Mapping[str, Mapping[str, float]]) -> list[list[str]]:
    """Rows of the refinements."""
    columns = [name for name in next(iter(found.values())) if name != LOOP]
    rows = [[f"{MAPS} maps of 24×24, ms", *columns, "numpy loops over the first"]]
    for name, own in found.items():
        ratio = MAPS * own[LOOP] / own[columns[0]]
        rows.append([name, *(f"{own[c]:.1f}" for c in columns), f"{ratio:.0f}×"])
    return rows


def _grid(rows: Sequence[Sequence[str]]) -> str:
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    return "\n".join([lines[0], "|" + "---|" * len(rows[0]), *lines[1:]])


def main(
    model: Annotated[str, typer.Option(help="'mini' or a folder of it.")] = "mini",
    block: Annotated[list[int] | None, typer.Option(help="Repeatable. Default: 2, 4")] = None,
    words: Annotated[
        list[int] | None, typer.Option(help="Repeatable. Default: 1, 5, 10, 26")
    ] = None,
    repeats: Annotated[int, typer.Option(min=1)] = 3,
    write: Annotated[bool, typer.Option(help="Into docs/COST.md and docs/cost.json.")] = False,
) -> None:
    """Print ratios; every one compares two timings of this run, on one thread."""
    torch.set_num_threads(1)
    counts = words or list(COUNTS)
    found = []
    for cache in ("prefix", "none"):
        for number in block or (2, 4):
            forward, answer = bound(model, cache, number)
            if len(answer) < counts[-1]:
                raise typer.BadParameter(f"the answer has {len(answer)} words, not {counts[-1]}")
            found.append(configuration(forward, answer, counts, repeats))
    report = {
        "machine": machine(),
        "commit": commit(ROOT),
        "counts": counts,
        "repeats": repeats,
        "configurations": found,
        "refinements": refinements(max(repeats, 5)),
    }
    made = markdown(report)
    typer.echo(made)
    if write:
        FIGURES.write_text(json.dumps(report, indent=1, ensure_ascii=False) + "\n")
        DOCUMENT.write_text(rewritten(DOCUMENT.read_text(), MARKS, made))


if __name__ == "__main__":
    typer.run(main)
