r"""Is damage to what was saved seen? Change a byte or a digit at a time, and load.

``python benchmarks/damages.py --count 10000 --seed 0`` saves an explanation, a comparison and a
preset of the embedded model, an evaluation that is complete and one that was stopped, and changes
them ``--count`` times: one byte of a file becomes another, or one digit another digit. Each change
is loaded and undone. It is *refused* where loading raises the error of that kind of saved thing,
*harmless* where everything that is loaded is the same, and *unseen* where a number or a text
changed. Unseen changes are listed, and the command ends with 1 if there is any. Five minutes;
tests/bad_input/test_damages.py makes 500 of them.
"""

from __future__ import annotations

import json
import random
import shutil
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, fields, is_dataclass
from pathlib import Path
from typing import Annotated, Any

import typer
from PIL import Image
from torch import Tensor

from captum_dcam import Comparison, Explanation
from captum_dcam.errors import SavedError
from captum_dcam.evaluation import Plan, Store, evaluate
from captum_dcam.evaluation.frame import Frame
from captum_dcam.presets import read_preset_file

#: what an outcome is called
REFUSED, HARMLESS, UNSEEN = "refused", "harmless", "unseen"
#: how a byte changes
KINDS = ("byte", "digit")


@dataclass(frozen=True)
class Saved:
    r"""Something saved.

    Args:
        name (str): what it is.
        place (Path): its file or folder.
        load (callable): everything that it says, in a form that can be compared.
    """

    name: str
    place: Path
    load: Callable[[Path], Any]

    @property
    def files(self) -> list[Path]:
        """Every file of it that holds anything."""
        found = sorted(self.place.rglob("*")) if self.place.is_dir() else [self.place]
        return [path for path in found if path.is_file() and path.stat().st_size]


def content(value: Any) -> Any:
    """Everything in a result, down to bytes."""
    if isinstance(value, Tensor):
        return str(value.dtype), tuple(value.shape), value.contiguous().numpy().tobytes()
    if isinstance(value, Image.Image):
        return value.mode, value.size, value.tobytes()
    if is_dataclass(value):
        return [content(getattr(value, one.name)) for one in fields(value)]
    if isinstance(value, dict):
        return {key: content(one) for key, one in value.items()}
    return [content(one) for one in value] if isinstance(value, list | tuple) else repr(value)


def of_store(folder: Path) -> Any:
    """A store as tables and evaluations read it."""
    store = Store.read(folder)
    frame = Frame(folder)
    names = [(v, m) for v in frame.variants for m in frame.metrics]
    scores = [content(frame.values(*name).scores) for name in names]
    return [store.header, list(store.records()), list(store.costs()), store.missing(), scores]


LOADERS: dict[str, Callable[[Path], Any]] = {
    "explanation": lambda folder: content(Explanation.load(folder)),
    "comparison": lambda folder: content(Comparison.load(folder)),
    "preset": read_preset_file,
    "store": of_store,
    "stopped": of_store,
}


@dataclass(frozen=True)
class Damage:
    """One change: which byte of which file became what, and what came of it."""

    saved: str
    file: str
    kind: str
    at: int
    before: int
    after: int
    outcome: str


def damages(
    things: Iterable[Saved], count: int, seed: int, say: Callable[[int], None] = lambda _: None
) -> list[Damage]:
    r"""Make changes, one at a time.

    Args:
        things (iterable of Saved): all are as they were afterwards.
        count (int): how many changes; every thing gets as many.
        seed (int): draws them.
        say (callable, optional): is told how many were made.

    Raises:
        Exception: loading raised anything but a SavedError: that is a bug.
    """
    draw, out = random.Random(seed), list[Damage]()
    things = list(things)
    whole = {one.name: one.load(one.place) for one in things}
    for number in range(count):
        one = things[number % len(things)]
        files = one.files
        weights = [1 if draw.random() < 0.5 else file.stat().st_size for file in files]
        (file,) = draw.choices(files, weights)
        data = file.read_bytes()
        kind = draw.choice(KINDS)
        digits = [n for n, byte in enumerate(data) if 48 <= byte <= 57] if kind == "digit" else []
        kind = "digit" if digits else "byte"
        at = draw.choice(digits) if digits else draw.randrange(len(data))
        others = b"0123456789" if digits else bytes(range(256))
        after = draw.choice([byte for byte in others if byte != data[at]])
        file.write_bytes(data[:at] + bytes([after]) + data[at + 1 :])
        try:
            same = one.load(one.place) == whole[one.name]
            outcome = HARMLESS if same else UNSEEN
        except SavedError:
            outcome = REFUSED
        finally:
            file.write_bytes(data)
        out.append(Damage(one.name, file.name, kind, at, data[at], after, outcome))
        say(number + 1)
    return out


def table(found: Iterable[Damage]) -> str:
    """How many of each kind came to what, in Markdown."""
    counts = Counter((one.saved, one.kind, one.outcome) for one in found)
    lines = [
        f"| Saved | Change | {' | '.join((REFUSED, HARMLESS, UNSEEN))} |",
        "|---|---|--:|--:|--:|",
    ]
    for saved, kind in sorted({key[:2] for key in counts}):
        cells = [str(counts[saved, kind, outcome]) for outcome in (REFUSED, HARMLESS, UNSEEN)]
        lines.append(f"| {saved} | {kind} | {' | '.join(cells)} |")
    return "\n".join(lines)


def made(folder: Path) -> list[Saved]:
    """One of each kind, by the embedded model."""
    import captum_dcam
    from captum_dcam.data.scenes import HELD_OUT, make_scene
    from captum_dcam.presets import preset, write_preset

    adapter = captum_dcam.load("mini")
    image = make_scene(HELD_OUT, 12).image
    question = "describe the image ."
    captum_dcam.explain(adapter, image, question, gen_length=8).save(folder / "explanation")
    quick = ["diffusion_cam", "attention"]
    found = captum_dcam.compare(adapter, image, question, "all", quick, gen_length=8)
    found.save(folder / "comparison")
    chosen = preset("default")
    write_preset(
        folder / "preset.json", "default", chosen, chosen.refinements().stages, {"seed": 0}
    )
    data = {"name": "scenes", "count": 4}
    plan = Plan(("diffusion_cam", "oracle", "random"), data, generation={"gen_length": 8})
    evaluate(plan, folder / "store", adapter=adapter, shard=(0, 1))
    stop = iter((False, False, False, True)).__next__
    evaluate(plan, folder / "stopped", adapter=adapter, shard=(0, 1), stop=stop)
    places = {name: folder / name for name in LOADERS} | {"preset": folder / "preset.json"}
    return [Saved(name, places[name], load) for name, load in LOADERS.items()]


def main(
    count: Annotated[int, typer.Option(help="Number of changes.", min=1)] = 10_000,
    seed: Annotated[int, typer.Option(help="Draws them.")] = 0,
    keep: Annotated[Path | None, typer.Option(help="Folder for what is saved; kept.")] = None,
) -> None:
    """Change what was saved, a byte at a time, and see whether it is noticed."""
    folder = Path(tempfile.mkdtemp(prefix="damages-")) if keep is None else keep

    def say(number: int) -> None:
        if number % 500 == 0:
            typer.echo(f"{number} of {count}", err=True)

    try:
        found = damages(made(folder), count, seed, say)
    finally:
        if keep is None:
            shutil.rmtree(folder)
    typer.echo(table(found))
    unseen = [one for one in found if one.outcome == UNSEEN]
    for one in unseen:
        typer.echo(json.dumps(vars(one)))
    sys.exit(1 if unseen else 0)


if __name__ == "__main__":
    typer.run(main)
