r"""Every method's maps with every refinement: are they on what words name, are they faithful?

    python benchmarks/maps.py measure --start 2000 --scenes 300 -M quick
    python benchmarks/maps.py table --start 2000 --scenes 300

``measure`` keeps one file per scene and goes on where it stopped; shards (``--shard 0/2``) share a
folder. ``--modules`` says on how many scenes the paper's four modules are applied, for which every
method explains the repeated words too. ``--curves`` adds deletion and insertion, ``--sanity`` how
much of a map is left when the model or the answer around its word changes: minutes per scene, so
``--words 1`` takes one word of each kind per scene. ``--wrong`` asks questions about noisy images
until one is answered wrongly, and measures how little must be removed by a map of the right answer
until the model would give it (EAGLE's AMCR and CSR@10 %).

Each raw map is computed once, and measured bare, with the paper's four modules (SICD subtracts the
method's own maps of repeated words, as ``compare`` does), with affinity propagation, and with both:
a table that refines one method and leaves the others bare would say nothing about methods. Words
are of kinds: shapes and colours of "describe the image .", once more those of its plural phrases by
themselves, and the answers of "what shape …" and "what color …".
"""

from __future__ import annotations

import os
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # before torch is imported: see docs/COST.md

import numpy as np
import torch
import typer
from maps_tables import REFINED, app
from PIL import Image
from reports import commit, machine
from torch import Tensor
from tqdm import tqdm

from captum_dcam import DenoisingForward, faithfulness, load, maps
from captum_dcam.comparing import generator_of, run_method
from captum_dcam.data.scenes import COLORS, HELD_OUT, SHAPE_OF, Scene, make_scene, named_object
from captum_dcam.evaluation import FLOORS, Word
from captum_dcam.evaluation.measure import numbers
from captum_dcam.files import write_json
from captum_dcam.methods import AttributionTask, Method, method, method_names
from captum_dcam.metrics import localization, pointing_game, rank_correlation
from captum_dcam.model.foils import with_foils
from captum_dcam.model.words import Target, answer_token_texts, words_of
from captum_dcam.refine import Affinity, Compose, paper_refinements

FOLDER = Path("runs/maps")
PROMPT = "describe the image ."
#: presets without their refinements; the paper's is the base preset's
BARE = {"diffusion_cam": method("diffusion_cam", refined=False)}
EAGLE = "eagle, 16 regions"
#: rows beside the methods as they are: another setting, or the last step's logits, at which these
#: methods were better on scenes 60 to 159
MORE: dict[str, tuple[Method, str]] = {
    "diffusion_cam, exact norms": (
        method("diffusion_cam", refined=False, backward="exact"),
        "commit",
    ),
    **{
        f"{name}, last step": (method(name), "final")
        for name in ("finer_cam", "llava_cam", "pgc_dff", "pgc_gradcam_plus_plus", "pgc_xgradcam")
    },
    # of its authors' 64 regions a quarter: 1412 passes a word are minutes on a CPU
    EAGLE: (method("eagle", regions=16, search="full"), "commit"),
}
#: what a row is: a method, and the state it reads
METHODS: dict[str, tuple[Method, str]] = {
    name: (BARE.get(name, method(name)), "commit")
    for name in method_names()
    if name != "diffusion_cam_paper"
} | MORE
#: maps that look at no model: the masks on the token grid, a blob in the middle, noise
LIMITS = ("oracle", "center_blob", "random")
#: methods of so many passes a word, without those that explain all words together; of so many that
#: they are only measured by their names
LONG, TOO_MANY = 8, 100
STAGES = {
    "bare": Compose([]),
    "four modules": paper_refinements(),
    "affinity": Compose([Affinity()]),
    "both": Compose([*paper_refinements(), Affinity()]),
}
#: the refinements that long measurements are made with
PAIR = ("bare", "affinity")
#: of deletion and insertion; the first and the last are the same for all maps
FRACTIONS = (0.0, 0.05, 0.2, 0.5, 1.0)
#: standard deviation of the noise on images whose questions are to be answered wrongly
NOISE = 0.7
assert tuple(STAGES) == REFINED
#: of N words; None where there is nothing to score against
Scores = list[float | None]


def is_long(name: str) -> bool:
    """Whether a row takes many passes a word."""
    return name not in LIMITS and (METHODS[name][0].facts.expensive or passes_of(name) >= LONG)


def passes_of(name: str) -> int:
    """Passes of a row per word, as its method's facts have them."""
    return 0 if name in LIMITS else int(METHODS[name][0].facts.passes.split()[0])


def rows_of(asked: Sequence[str] | None) -> list[str]:
    """Names of rows: ``quick`` and ``long`` stand for all of a kind that do not take too many
    passes, with the default and limits beside them; the default always comes first, so that all is
    paired with it."""
    names: list[str] = ["diffusion_cam"]
    for one in asked or ("quick", "long"):
        if one in ("quick", "long"):
            few = (n for n in (*METHODS, *LIMITS) if passes_of(n) < TOO_MANY)
            names += [n for n in few if is_long(n) == (one == "long")]
        elif one in METHODS or one in LIMITS:
            names.append(one)
        else:
            raise typer.BadParameter(f"{one!r}: expected quick, long or of {[*METHODS, *LIMITS]}")
    return list(dict.fromkeys(names))


@dataclass(frozen=True, eq=False)
class Named:
    """A word, its kind, the objects that it names and how many, and their mask (H, W) bool."""

    target: Target
    kind: str
    thing: str
    plural: bool
    mask: Tensor = field(repr=False)


# -- words -----------------------------------------------------------------------------------------


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
            out.append(Named(word, kind, f"{color} {shape}", count > 1, mask))
    return out


def some_of(named: Sequence[Named], count: int, index: int) -> list[Named]:
    """At most ``count`` words of each kind, from another place in every scene; 0: all."""
    if not count:
        return list(named)
    kept = []
    for kind in dict.fromkeys(n.kind for n in named):
        own = [n for n in named if n.kind == kind]
        turned = [own[(index + i) % len(own)] for i in range(min(count, len(own)))]
        kept += [n for n in own if n in turned]
    return kept


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
    return [Named(w, f"what {kind}", answer, count > 1, mask) for w in right]


def mistaken(adapter: Any, scene: Scene, index: int) -> tuple[DenoisingForward, Named, str] | None:
    """The first question about a noisy image of a scene that is answered wrongly by one word: the
    right answer's token in its place, and the question; None where all are answered otherwise."""
    drawn = np.random.default_rng(index).normal(0, 255 * NOISE, (*scene.image.size[::-1], 3))
    noisy = np.clip(np.asarray(scene.image) + drawn, 0, 255).astype(np.uint8)
    for kind, prompt, answer in scene.questions:
        if kind not in ("shape", "color"):
            continue
        forward = DenoisingForward(adapter)
        forward.generate(adapter.prepare([[Image.fromarray(noisy)]], [prompt]))
        words = words_of(adapter, forward.trajectory.tokens[0].tolist())
        known = COLORS if kind == "color" else SHAPE_OF
        said = [w for w in words if w.text in known]
        if len(said) == 1 and said[0].text != answer and len(said[0].token_ids) == 1:
            (right,) = with_foils(adapter, forward.trajectory.tokens[0].tolist(), said, answer)
            assert right.foil_ids is not None
            target = replace(right, text=answer, token_ids=right.foil_ids, foil_ids=None)
            return forward, Named(target, "wrong", answer, False, torch.empty(0)), prompt
    return None


# -- measuring -------------------------------------------------------------------------------------


def raw_maps(
    forward: DenoisingForward, named: Sequence[Named], name: str, seed: int, sicd: bool = False
) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...] | None, dict[str, float]]:
    """A row's maps (N, h, w) per grid, those of repeated words where SICD wants them, and what a
    word costs.

    The oracle knows each word's mask as an object of the word's own.
    """
    targets = [n.target for n in named]
    if name in LIMITS:
        words = [Word(t, "", "object", None, (str(i),)) for i, t in enumerate(targets)]
        masks = {str(i): n.mask for i, n in enumerate(named)}
        return FLOORS[name](words, masks, forward.request.layout, seed)[0], None, {}
    made_by, score = METHODS[name]
    repeated = maps.repeated_words(forward) if sicd else ()
    asked = maps.with_repeated(targets, repeated)
    task = AttributionTask(forward, asked, score, generator_of(seed, made_by.name))
    run = run_method(made_by, task, errors="raise")
    found, cost = run.found.maps, run.cost
    cost_of = {"forwards": cost.forwards, "backwards": cost.backwards, "seconds": cost.seconds}
    each = {kind: value / len(asked) for kind, value in cost_of.items()}
    return (
        tuple(m[: len(targets)] for m in found),
        maps.mean_of(found, asked, repeated) if repeated else None,
        each,
    )


def localized(pixels: Tensor, named: Sequence[Named]) -> dict[str, Scores]:
    """Scores of maps (N, H, W) against their words' masks; ``placebo``: against the first other
    object's, None where the scene has none that is named."""
    masks = torch.stack([n.mask for n in named])
    found = localization(pixels, masks)
    others = [next((m for m in named if m.thing != n.thing), None) for n in named]
    placebo = [
        None if other is None else float(localization(one, other.mask).f3)
        for one, other in zip(pixels, others, strict=True)
    ]
    return {
        "f3": numbers(found.f3),
        "pointing": numbers(pointing_game(pixels, masks)),
        "share": numbers(found.concentration),
        "placebo": placebo,
    }


def measure_words(
    forward: DenoisingForward, named: Sequence[Named], name: str, seed: int, modules: bool
) -> tuple[dict[str, tuple[Tensor, ...]], dict[str, dict[str, Scores]], dict[str, float]]:
    """One row's maps of N words, refinement → one (N, h, w) per grid; their scores, refinement →
    score → N values; and what a word costs."""
    grid = forward.request.layout.grids[0]
    raw, own, cost = raw_maps(forward, named, name, seed, modules)
    refined = {
        label: maps.refine_words(raw, stages, maps.contexts_of(forward, own, stages))
        for label, stages in STAGES.items()
        if modules or label in PAIR
    }
    scores = {label: localized(grid.to_pixels(m[0]), named) for label, m in refined.items()}
    return refined, scores, cost


def faithful(
    forward: DenoisingForward, named: Sequence[Named], found: Sequence[tuple[Tensor, ...]]
) -> list[dict[str, list[float]]]:
    """Areas under the curves of R maps of N words each; what R maps share is computed once."""
    targets = [n.target for n in named] * len(found)
    together = [torch.cat([m[i] for m in found]) for i in range(len(found[0]))]
    areas = {
        test.__name__: test(forward, targets, together, controls=0, fractions=FRACTIONS).auc
        for test in (faithfulness.deletion, faithfulness.insertion)
    }
    shape = len(found), len(named)
    return [
        {what: numbers(row) for what, row in zip(areas, rows, strict=True)}
        for rows in zip(*(a.view(shape) for a in areas.values()), strict=True)
    ]


def sanity(
    forward: DenoisingForward, named: Sequence[Named], name: str, seed: int
) -> dict[str, dict[str, list[float]]]:
    """Rank correlation of N maps with those after a change, refinement → change → N values."""
    seen: list[dict[str, Tensor]] = []

    def explain(one: DenoisingForward, targets: tuple[Target, ...]) -> tuple[Tensor, ...]:
        own = [n for n in named if n.target in targets]
        raw = raw_maps(one, own, name, seed)[0]
        rows = {}
        for label in PAIR:
            stages = STAGES[label]
            refined = maps.refine_words(raw, stages, maps.contexts_of(one, None, stages))
            rows[label] = torch.cat([m.flatten(1) for m in refined], 1).cpu().double()
        seen.append(rows)
        return raw

    targets = [n.target for n in named]
    drawn = torch.Generator().manual_seed(seed)
    faithfulness.parameter_randomization(forward, targets, explain, drawn, stages=(1, -1))
    first, last, everything = seen
    seen.clear()
    faithfulness.answer_shuffle(forward, targets, explain, drawn)
    shuffled = {label: torch.cat([one[label] for one in seen[1:]]) for label in first}
    changes = {"last block": last, "all weights": everything, "other answer": shuffled}
    return {
        label: {w: numbers(rank_correlation(rows, m[label])) for w, m in changes.items()}
        for label, rows in first.items()
    }


def corrected(adapter: Any, index: int, names: Sequence[str]) -> list[dict[str, Any]]:
    """What a wrong answer about a noisy image of a scene needs to become right, row by row."""
    found = mistaken(adapter, make_scene(HELD_OUT, index), index)
    if found is None:
        return []
    forward, word, prompt = found
    shown, costs = {}, {}
    for name in names:
        if name != "oracle":
            raw, _, costs[name] = raw_maps(forward, [word], name, index)
            for label in PAIR:
                contexts = maps.contexts_of(forward, None, STAGES[label])
                shown[name, label] = maps.refine_words(raw, STAGES[label], contexts)
    together = [torch.cat([m[i] for m in shown.values()]) for i in range(len(raw))]
    area = faithfulness.correction(forward, [word.target] * len(shown), together).area.tolist()
    scores: dict[str, dict[str, dict[str, Scores]]] = {}
    for (name, label), own in zip(shown, area, strict=True):
        within = {"amcr": [own], "csr": [float(own <= 0.1)]}
        scores.setdefault(name, {})[label] = within
    words = [{"text": word.target.text, "kind": word.kind, "plural": False}]
    return [{"prompt": prompt, "words": words, "scores": scores, "costs": costs}]


def measure_scene(
    adapter: Any, index: int, names: Sequence[str], words: int, at: Collection[str]
) -> dict[str, Any]:
    """Everything of one scene: words, scores and costs of each answer, and how many were asked."""
    scene = make_scene(HELD_OUT, index)
    asked = [q for q in scene.questions if q[0] in ("shape", "color")] if "questions" in at else []
    answers = []
    for kind, prompt, answer in [("", PROMPT, ""), *asked] if "described" in at else []:
        forward = DenoisingForward(adapter)
        forward.generate(adapter.prepare([[scene.image]], [prompt]))
        found = (
            answered(scene, forward, kind, prompt, answer) if kind else described(scene, forward)
        )
        named = some_of(found, words, index)
        shown: dict[tuple[str, str], tuple[Tensor, ...]] = {}
        scores: dict[str, dict[str, dict[str, Scores]]] = {}
        costs: dict[str, dict[str, float]] = {}
        for name in names if named else ():
            refined, scores[name], costs[name] = measure_words(
                forward, named, name, index, "modules" in at
            )
            shown |= {(name, label): refined[label] for label in PAIR}
            if "sanity" in at and not kind and name not in LIMITS:
                for label, values in sanity(forward, named, name, index).items():
                    scores[name][label] |= values
        if "curves" in at and shown:
            areas = faithful(forward, named, list(shown.values()))
            for (name, label), values in zip(shown, areas, strict=True):
                scores[name][label] |= values
        own = [{"text": n.target.text, "kind": n.kind, "plural": n.plural} for n in named]
        answers.append({"prompt": prompt, "words": own, "scores": scores, "costs": costs})
    layer = DenoisingForward(adapter).layer
    wrong = corrected(adapter, index, names) if "wrong" in at else []
    found = {"answers": answers, "corrected": wrong}
    return {"scene": index, "block": layer, "asked": len(asked), **found}


@app.command()
def measure(
    folder: Annotated[Path, typer.Option(help="One file per scene goes here.")] = FOLDER,
    cache: Annotated[str, typer.Option(help="prefix or none")] = "prefix",
    start: Annotated[int, typer.Option(min=0, help="First scene of the held-out stream.")] = 2000,
    scenes: Annotated[int, typer.Option(min=1)] = 300,
    words: Annotated[int, typer.Option(min=0, help="Of a kind, per scene; 0: all.")] = 0,
    questions: Annotated[int, typer.Option(min=0, help="Ask about the first so many.")] = 0,
    modules: Annotated[int, typer.Option(min=0, help="The four modules on so many.")] = 300,
    curves: Annotated[int, typer.Option(min=0, help="Deletion, insertion on so many.")] = 0,
    sanity: Annotated[int, typer.Option(min=0, help="Changed models on so many.")] = 0,
    described: Annotated[int, typer.Option(min=0, help="Words of right answers on so many.")] = 300,
    wrong: Annotated[int, typer.Option(min=0, help="A wrong answer of so many.")] = 0,
    shard: Annotated[str, typer.Option(help="i/n: every n-th scene, from the i-th.")] = "0/1",
    methods: Annotated[
        list[str] | None,
        typer.Option("--method", "-M", help="Repeatable: rows, quick, long. Default: all"),
    ] = None,
) -> None:
    """Measure scenes; those measured already are skipped."""
    torch.set_num_threads(1)
    names = rows_of(methods)
    part, parts = map(int, shard.split("/"))
    made = {"commit": commit(Path(__file__).parent), "machine": machine(), "cache": cache}
    adapter = load("mini", cache=cache)
    folder.mkdir(parents=True, exist_ok=True)
    for index in tqdm(range(start + part, start + scenes, parts)):
        path = folder / f"{cache}-{index:05d}.json"
        if not path.exists():
            first = index - start
            asked = {
                "questions": questions,
                "modules": modules,
                "curves": curves,
                "sanity": sanity,
                "described": described,
                "wrong": wrong,
            }
            at = {what for what, count in asked.items() if first < count}
            write_json(path, {**made, **measure_scene(adapter, index, names, words, at)})


if __name__ == "__main__":
    app()
