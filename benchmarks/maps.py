r"""Do a method's maps lie on what words name, when all methods have the same refinements?

    python benchmarks/maps.py measure --start 2000 --scenes 300
    python benchmarks/maps.py table --start 2000 --scenes 300

``measure`` keeps one file per scene and goes on where it stopped; shards (``--shard 0/2``) share a
folder. ``--curves 20`` adds deletion and insertion on the first twenty: minutes per scene.

Each method's maps are measured bare, with the paper's four modules (SICD subtracts the method's own
maps of repeated words, as ``compare`` does) and with affinity propagation: a table that refines one
method and leaves the others bare would say nothing about methods. Words are of kinds: shapes and
colours of "describe the image .", once more those of its plural phrases by themselves, and the
answers of "what shape …" and "what color …".
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # before torch is imported: see docs/COST.md

import torch
import typer
from reports import commit, machine
from torch import Tensor
from tqdm import tqdm

from captum_dcam import DenoisingForward, faithfulness, load, maps
from captum_dcam.comparing import generator_of, run_method
from captum_dcam.data.scenes import COLORS, HELD_OUT, SHAPE_OF, Scene, make_scene, named_object
from captum_dcam.errors import StoreError
from captum_dcam.evaluation import FLOORS, Word
from captum_dcam.evaluation.measure import numbers
from captum_dcam.files import read_json, write_json
from captum_dcam.methods import AttributionTask, Method, method
from captum_dcam.metrics import cluster_bootstrap, localization, pointing_game
from captum_dcam.model.words import Target, answer_token_texts, words_of
from captum_dcam.refine import Affinity, Compose, paper_refinements

app = typer.Typer(add_completion=False)
FOLDER = Path("runs/maps")
PROMPT = "describe the image ."
#: rows of the tables by name; the first is the default preset's base map
METHODS: dict[str, Method] = {
    "gradient, constant norms": method("diffusion_cam", refined=False),
    "gradient, exact norms": method("diffusion_cam", refined=False, backward="exact"),
    "Grad-CAM, last step": method("diffusion_cam_base"),
    "CP-LRP": method("cp_lrp"),
    "AttnLRP": method("attn_lrp"),
    "TAM": method("tam"),
    "attention": method("attention"),
    "grad-rollout": method("grad_rollout"),
}
#: maps that look at no model: the masks on the token grid, a blob in the middle, noise
LIMITS = ("oracle", "center_blob", "random")
REFINEMENTS = {
    "affinity": Compose([Affinity()]),
    "four modules": paper_refinements(),
    "bare": Compose([]),
}
#: the default preset
DEFAULT = ("gradient, constant norms", "affinity")
KINDS = {
    "shape": "Shape words",
    "color": "Colour words",
    "plural": "Of both, words for several objects",
    "what shape": "Answers to “what shape …”",
    "what color": "Answers to “what color …”",
}
SCORES = {
    "f3": "F3 %",
    "pointing": "pointing %",
    "share": "mass on the object %",
    "deletion": "deletion % ↓",
    "insertion": "insertion % ↑",
}


@dataclass(frozen=True, eq=False)
class Named:
    """A word, its kind, whether it names several objects, and their mask (H, W) bool."""

    target: Target
    kind: str
    plural: bool
    mask: Tensor = field(repr=False)


# -- measuring -------------------------------------------------------------------------------------


def described(scene: Scene, forward: DenoisingForward) -> list[Named]:
    """Shape and colour words of the bound answer that name objects of the scene."""
    tokens = forward.trajectory.tokens[0].tolist()
    texts, out = answer_token_texts(forward.adapter, tokens), []
    for word in words_of(forward.adapter, tokens):
        color, shape = named_object(texts, word)
        if color is None or shape is None:
            continue
        count = sum((o.color, o.shape) == (color, shape) for o in scene.objects)
        if count:
            kind = "shape" if word.text in SHAPE_OF else "color"
            mask = torch.from_numpy(scene.mask_of(color, shape))
            out.append(Named(word, kind, count > 1, mask))
    return out


def answered(
    scene: Scene, forward: DenoisingForward, kind: str, question: str, answer: str
) -> list[Named]:
    """The word of the bound answer that answers a question rightly; none where it is wrong.

    The question tells the object: "what shape is the red object ?" has one that is red.
    """
    asked = question.split()
    color = next((w for w in asked if w in COLORS), None)
    shape = next((SHAPE_OF[w] for w in asked if w in SHAPE_OF), None)
    mask = torch.from_numpy(scene.mask_of(color, shape))
    count = sum(color in (None, o.color) and shape in (None, o.shape) for o in scene.objects)
    words = words_of(forward.adapter, forward.trajectory.tokens[0].tolist())
    right = [w for w in words if w.text == answer][:1]
    return [Named(w, f"what {kind}", count > 1, mask) for w in right]


def raw_maps(
    forward: DenoisingForward, named: Sequence[Named], name: str, seed: int
) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...] | None]:
    """A method's or limit's maps (N, h, w) per grid, and those of repeated words that SICD takes.

    The oracle knows each word's mask as an object of the word's own.
    """
    targets = [n.target for n in named]
    if name in LIMITS:
        words = [Word(t, "", "object", None, (str(i),)) for i, t in enumerate(targets)]
        masks = {str(i): n.mask for i, n in enumerate(named)}
        return FLOORS[name](words, masks, forward.request.layout, seed)[0], None
    repeated = maps.repeated_words(forward)
    asked = maps.with_repeated(targets, repeated)
    task = AttributionTask(forward, asked, "commit", generator_of(seed, name))
    found = run_method(METHODS[name], task, errors="raise").found.maps
    return tuple(m[: len(targets)] for m in found), maps.mean_of(found, asked, repeated)


def measure_words(
    forward: DenoisingForward, named: Sequence[Named], names: Sequence[str], seed: int, curves: bool
) -> dict[str, dict[str, dict[str, list[float]]]]:
    """Scores of N words: method → refinement → score → N values."""
    masks, grid = torch.stack([n.mask for n in named]), forward.request.layout.grids[0]
    out: dict[str, dict[str, dict[str, list[float]]]] = {}
    for name in names:
        raw, own = raw_maps(forward, named, name, seed)
        out[name] = {}
        for label, stages in REFINEMENTS.items():
            refined = maps.refine_words(raw, stages, maps.contexts_of(forward, own, stages))
            pixels = grid.to_pixels(refined[0])
            found = localization(pixels, masks)
            scores = {
                "f3": found.f3,
                "pointing": pointing_game(pixels, masks),
                "share": found.concentration,
            }
            for test in (faithfulness.deletion, faithfulness.insertion) if curves else ():
                targets = [n.target for n in named]
                scores[test.__name__] = test(forward, targets, refined, controls=0).auc
            out[name][label] = {score: numbers(values) for score, values in scores.items()}
    return out


def measure_scene(
    adapter: Any, index: int, names: Sequence[str], questions: bool, curves: bool
) -> dict[str, Any]:
    """Everything of one scene: words and scores of each answer, and how many were asked for."""
    scene = make_scene(HELD_OUT, index)
    asked = [q for q in scene.questions if q[0] in ("shape", "color")] if questions else []
    answers = []
    for kind, prompt, answer in [("", PROMPT, ""), *asked]:
        forward = DenoisingForward(adapter)
        forward.generate(adapter.prepare([[scene.image]], [prompt]))
        if kind:
            named = answered(scene, forward, kind, prompt, answer)
        else:
            named = described(scene, forward)
        answers.append(
            {
                "prompt": prompt,
                "words": [
                    {"text": n.target.text, "kind": n.kind, "plural": n.plural} for n in named
                ],
                "scores": measure_words(forward, named, names, index, curves) if named else {},
            }
        )
    layer = DenoisingForward(adapter).layer
    return {"scene": index, "block": layer, "asked": len(asked), "answers": answers}


@app.command()
def measure(
    folder: Annotated[Path, typer.Option(help="One file per scene goes here.")] = FOLDER,
    cache: Annotated[str, typer.Option(help="prefix or none")] = "prefix",
    start: Annotated[int, typer.Option(min=0, help="First scene of the held-out stream.")] = 2000,
    scenes: Annotated[int, typer.Option(min=1)] = 300,
    questions: Annotated[int, typer.Option(min=0, help="Ask about the first so many.")] = 300,
    curves: Annotated[int, typer.Option(min=0, help="Deletion, insertion on so many.")] = 0,
    shard: Annotated[str, typer.Option(help="i/n: every n-th scene, from the i-th.")] = "0/1",
    methods: Annotated[
        list[str] | None, typer.Option("--method", "-M", help="Repeatable. Default: all")
    ] = None,
) -> None:
    """Measure scenes; those measured already are skipped."""
    torch.set_num_threads(1)
    names = list(methods or (*METHODS, *LIMITS))
    if unknown := [n for n in names if n not in METHODS and n not in LIMITS]:
        raise typer.BadParameter(f"{unknown[0]!r}: expected some of {[*METHODS, *LIMITS]}")
    part, parts = map(int, shard.split("/"))
    made = {"commit": commit(Path(__file__).parent), "machine": machine(), "cache": cache}
    adapter = load("mini", cache=cache)
    folder.mkdir(parents=True, exist_ok=True)
    for index in tqdm(range(start + part, start + scenes, parts)):
        path = folder / f"{cache}-{index:05d}.json"
        if not path.exists():
            at = index - start
            found = measure_scene(adapter, index, names, at < questions, at < curves)
            write_json(path, {**made, **found})


# -- tables ----------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Columns:
    """Scores (R, N) of R rows, (method, refinement), for N words of the scenes (N,)."""

    rows: tuple[tuple[str, str], ...]
    scenes: Tensor
    scores: dict[str, Tensor]

    def interval(self, values: Tensor) -> list[str]:
        """Mean and 95 % interval over scenes of values (R, N), each as "mean [low, high]"."""
        found = cluster_bootstrap(values, self.scenes, torch.Generator().manual_seed(0))
        return [
            f"{m:.1f} [{low:.1f}, {high:.1f}]"
            for m, low, high in zip(*(100 * x for x in found), strict=True)
        ]

    def ahead(self, values: Tensor, of: Sequence[tuple[str, str]]) -> list[str]:
        """By how much the row in ``of`` leads each row, paired on the same words; – by itself."""
        first = values[[self.rows.index(row) for row in of]]
        found = self.interval(first - values)
        return ["–" if a == b else cell for a, b, cell in zip(of, self.rows, found, strict=True)]


def columns(records: Sequence[dict[str, Any]], kind: str, scores: Sequence[str]) -> Columns | None:
    """Scores of all words of a kind for which every one of ``scores`` was measured."""
    rows: list[tuple[str, str]] = []
    scenes: list[int] = []
    values: list[list[list[float]]] = []  # words, scores, rows
    for record in records:
        for answer in record["answers"]:
            found = answer["scores"]
            own = [(name, label) for name in found for label in found[name]]
            rows = rows or own
            for n, word in enumerate(answer["words"]):
                fits = word["plural"] if kind == "plural" else word["kind"] == kind
                if kind == "plural" and word["kind"].startswith("what"):
                    fits = False
                if fits and all(s in found[name][label] for s in scores for name, label in own):
                    scenes.append(record["scene"])
                    values.append([[found[a][b][s][n] for a, b in rows] for s in scores])
    if not values:
        return None
    table = torch.tensor(values, dtype=torch.float64).permute(1, 2, 0)
    order = sorted(range(len(rows)), key=lambda i: list(REFINEMENTS).index(rows[i][1]))
    return Columns(
        tuple(rows[i] for i in order),
        torch.tensor(scenes),
        {s: table[i][order] for i, s in enumerate(scores)},
    )


def markdown(records: Sequence[dict[str, Any]], kind: str) -> str:
    """The table of one kind of words; a second one of deletion and insertion where measured."""
    out = [f"## {KINDS[kind]}\n"]
    for scores in (("f3", "pointing", "share"), ("deletion", "insertion")):
        if (found := columns(records, kind, scores)) is None:
            continue
        main, same = found.scores[scores[0]], [(DEFAULT[0], row[1]) for row in found.rows]
        heads = ["map", "refinements", SCORES[scores[0]], "default minus it"]
        heads.append(f"{DEFAULT[0]}, same refinements, minus it")
        heads += [SCORES[s] for s in scores[1:]]
        cells = [
            [name for name, _ in found.rows],
            [label for _, label in found.rows],
            found.interval(main),
            found.ahead(main, [DEFAULT] * len(found.rows)),
            found.ahead(main, same),
            *(found.interval(found.scores[s]) for s in scores[1:]),
        ]
        count = len(found.scenes.unique())
        out.append(f"{len(found.scenes)} words of {count} scenes.\n")
        out.append("| " + " | ".join(heads) + " |\n|" + "---|" * len(heads))
        out += ["| " + " | ".join(row) + " |" for row in zip(*cells, strict=True)]
        out.append("")
    return "\n".join(out) if len(out) > 1 else ""


def read(folder: Path, cache: str, start: int, scenes: int) -> list[dict[str, Any]]:
    """Stored results of scenes, which must all be there."""
    paths = [folder / f"{cache}-{i:05d}.json" for i in range(start, start + scenes)]
    if missing := [p.name for p in paths if not p.exists()]:
        raise typer.BadParameter(f"{len(missing)} scenes are not measured, {missing[0]} first")
    return [read_json(p, StoreError, "delete it and measure again") for p in paths]


@app.command()
def table(
    folder: Annotated[Path, typer.Option()] = FOLDER,
    cache: Annotated[str, typer.Option()] = "prefix",
    start: Annotated[int, typer.Option(min=0)] = 2000,
    scenes: Annotated[int, typer.Option(min=1)] = 300,
) -> None:
    """Print the tables of stored scenes as Markdown."""
    records = read(folder, cache, start, scenes)
    made = ["; ".join(sorted({str(r[k]) for r in records})) for k in ("block", "machine", "commit")]
    asked = sum(r["asked"] for r in records)
    right = sum(len(a["words"]) for r in records for a in r["answers"][1:])
    typer.echo(
        f"Embedded model, {cache} cache, float32, block {made[0]}; scenes {start} to "
        f"{start + scenes - 1} of the held-out stream; {right} of {asked} questions answered "
        f"rightly, the others left out. Seed: the scene's number; 0 for intervals. {made[1]}; "
        f"commit {made[2]}.\n"
    )
    for kind in KINDS:
        if made_of := markdown(records, kind):
            typer.echo(made_of)


if __name__ == "__main__":
    app()
