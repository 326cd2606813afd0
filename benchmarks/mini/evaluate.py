r"""Held-out accuracy of the embedded model or its twin: ``python -m benchmarks.mini.evaluate``.

Descriptions count an object as named when its colour and shape stand together in the answer (as
many times as the scene has them, by the number word); an object is invented when the answer names
a colour and shape, or more of it, that the scene does not hold. Both decoding caches are measured.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import torch
import typer
from tqdm import tqdm

from captum_dcam.data.scenes import COLORS, HELD_OUT, NUMBERS, SHAPE_OF, Scene, make_scene
from captum_dcam.files import write_json
from captum_dcam.model.adapter import Adapter
from captum_dcam.model.hub import load
from captum_dcam.model.words import answer_text

KINDS = ("exist", "color", "shape", "count", "relation")


def named_objects(answer: str) -> Counter:
    """How often an answer names each (colour, shape); ``two red circles`` counts twice."""
    words = answer.split()
    found: Counter = Counter()
    for i, word in enumerate(words):
        if word in SHAPE_OF and i > 0 and words[i - 1] in COLORS:
            number = words[i - 2] if i > 1 else ""
            count = NUMBERS.index(number) if number in NUMBERS else 1
            found[words[i - 1], SHAPE_OF[word]] += count
    return found


def answers(
    adapter: Adapter, scenes: list[Scene], prompts: list[str], gen_length: int
) -> list[str]:
    """Greedy answers, one token per step."""
    request = adapter.prepare([[s.image] for s in scenes], prompts)
    out = adapter.generate(request, generator=None, gen_length=gen_length)
    return [answer_text(adapter, row) for row in out.tokens.tolist()]


@dataclass
class Tally:
    """Right answers out of how many, by kind."""

    right: Counter
    total: Counter

    def add(self, kind: str, right: int, total: int = 1) -> None:
        self.right[kind] += right
        self.total[kind] += total

    def rates(self) -> dict[str, float]:
        return {k: self.right[k] / self.total[k] for k in sorted(self.total)}


def evaluate(
    adapter: Adapter,
    scenes: int,
    kinds: tuple[str, ...] = KINDS,
    batch: int = 25,
    progress: bool = True,
    first: int = 0,
) -> dict[str, float]:
    """Rates over held-out scenes from ``first`` on: objects, inventions, kinds of questions."""
    tally = Tally(Counter(), Counter())
    for start in tqdm(
        range(first, first + scenes, batch), disable=not progress, desc=f"cache {adapter.cache}"
    ):
        part = [make_scene(HELD_OUT, i) for i in range(start, min(start + batch, first + scenes))]
        texts = answers(adapter, part, ["describe the image ."] * len(part), 32)
        for scene, text in zip(part, texts, strict=True):
            truth = Counter((o.color, o.shape) for o in scene.objects)
            named = named_objects(text)
            tally.add("objects named", sum((truth & named).values()), truth.total())
            tally.add("answers without inventions", int(not named - truth))
            tally.add("descriptions exact", int(named == truth))
        asked = [(s, q) for i, s in enumerate(part) for q in _one_of_each(s, start + i, kinds)]
        for at in range(0, len(asked), batch):
            rows = asked[at : at + batch]
            texts = answers(adapter, [s for s, _ in rows], [q[1] for _, q in rows], 8)
            for (_, (kind, _, answer)), text in zip(rows, texts, strict=True):
                tally.add(f"question: {kind}", int(text == answer))
    return tally.rates()


def _one_of_each(scene: Scene, index: int, kinds: tuple[str, ...]) -> list[tuple[str, str, str]]:
    """A question of each of the kinds; of ``exist``, yes and no in turn over the scenes."""
    chosen: dict[str, tuple[str, str, str]] = {}
    for kind, question, answer in scene.questions:
        if kind not in kinds or (kind == "exist" and answer != ("yes", "no")[index % 2]):
            continue
        chosen.setdefault(kind, (kind, question, answer))
    return list(chosen.values())


def main(
    weights: Annotated[
        str, typer.Option(help="A folder of weights, or the packaged ones: mini, mini_ar.")
    ] = "mini",
    scenes: Annotated[int, typer.Option(help="Held-out scenes.")] = 500,
    first: Annotated[int, typer.Option(help="Number of the first scene.")] = 0,
    kinds: Annotated[
        str, typer.Option(help="Questions asked with the prefix cached; empty: none.")
    ] = ",".join(KINDS),
    full_kinds: Annotated[
        str, typer.Option(help="Questions asked without cache; empty: nothing is.")
    ] = "exist,color",
    full_dtype: Annotated[
        str, typer.Option(help="Type without cache: bfloat16 may be faster.")
    ] = "float32",
    output: Annotated[Path | None, typer.Option(help="Write the figures here as JSON.")] = None,
) -> None:
    """Print held-out accuracies in both decoding caches."""
    asked = tuple(filter(None, kinds.split(",")))
    table = {"prefix cache": evaluate(load(weights), scenes, asked, first=first)}
    if full_kinds:
        whole = load(weights, cache="none", dtype=getattr(torch, full_dtype))
        table["full sequence"] = evaluate(whole, scenes, tuple(full_kinds.split(",")), first=first)
    typer.echo(
        f"{scenes} held-out scenes (stream {HELD_OUT}), greedy; prefix cache in "
        f"float32, full sequence in {full_dtype}"
    )
    for kind in table["prefix cache"]:
        cells = [f"{n} {v[kind]:6.1%}" if kind in v else "" for n, v in table.items()]
        typer.echo(f"{kind:28s} " + "  ".join(cells))
    if output is not None:
        write_json(output, {"scenes": scenes, "full dtype": full_dtype, "rates": table})


if __name__ == "__main__":
    torch.manual_seed(0)
    typer.run(main)
