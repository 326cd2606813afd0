r"""``captum-dcam explain``: its options, what it does, and what it prints."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from captum_dcam.cli import parsing, printing
from captum_dcam.cli.options import (
    DECODE,
    HOW,
    Answer,
    command,
    layer_option,
    option,
    output_option,
    preset_option,
)

if TYPE_CHECKING:
    from torch import Tensor

    from captum_dcam.metrics import LocalizationScores
    from captum_dcam.results.explanation import Explanation

METRICS = ("obj_iou", "contrast", "concentration", "f3")


class Options(Answer):
    """The options of ``captum-dcam explain``."""

    preset: str = preset_option("A preset")
    layer: int | None = layer_option("the preset file's, or recommended")
    product: str | None = option(
        None,
        HOW,
        "Of gradient and feature: {products}.",
        names="products",
        strict=True,
        shown="the preset's",
    )
    center: bool | None = option(
        None,
        HOW,
        "Centre features over positions first.",
        "--center/--no-center",
        shown="the preset's",
    )
    every_step: bool = option(
        False,
        HOW,
        "Also keep the map and the probability of every word at every denoising step.",
        "--every-step",
    )
    check_sign: bool = option(
        False,
        HOW,
        "Remove what each map highlights, and see whether its word becomes less likely.",
        "--check-sign",
    )
    seed: int = option(0, DECODE, "Of sampling and the sign check.")
    output: Path = output_option(
        "explanation",
        "Folder for one picture per word, sheet.png and the data; an earlier output is replaced, "
        "nothing else is.",
    )


@command
def explain(options: Options) -> None:
    """Explain the words of an answer about an image: one map per word.

    Examples: captum-dcam explain photo.jpg -p "what is in the image ?" -w nouns;
    captum-dcam explain --scene 3 --preset paper --json
    """
    printing.run_and_print(options, run, document, print_report)


@dataclass(frozen=True)
class Result:
    r"""What was explained and written.

    Args:
        explanation (Explanation): the maps.
        folder (Path): where everything lies.
        source (str): the image's path, or which scene was drawn.
        scores (tuple or None): localisation of every target, where masks are known.
        signs (Tensor or None): (N, 2) from :func:`captum_dcam.sign_check`.
    """

    explanation: Explanation
    folder: Path
    source: str
    scores: tuple[LocalizationScores | None, ...] | None
    signs: Tensor | None


def run(options: Options) -> Result:
    """Explain and write; everything that can be checked is checked before any work."""
    from captum_dcam.explaining import check_steps, explain_generation, sign_check
    from captum_dcam.model.foils import check_foil
    from captum_dcam.presets import preset
    from captum_dcam.results.summary import scene_scores
    from captum_dcam.viewer import prepare_folder, write_folder

    words = parsing.chosen_words(options.words)
    refinements = parsing.chosen_refinements(options.refine)
    chosen = preset(options.preset)
    score, foil = parsing.chosen_score(options.score), parsing.chosen_foil(options.foil)
    check_foil(foil)
    reading = chosen.reading(score=score, tagger=options.tagger)
    device = parsing.check_answer(options, reading.score)
    if options.every_step:
        check_steps(options.answer is not None, None)
    folder = prepare_folder(options.output)
    with printing.progress() as say:
        image, scene, source = parsing.image_of(options)
        forward = parsing.written(options, image, device, say, chosen.layer)
        say("Explaining its words")
        own = options.shared(
            explain_generation,
            words=words,
            refinements=refinements,
            preset=chosen,
            score=score,
            foil=foil,
        )
        explanation = explain_generation(forward, **own)
        targets, signs = explanation.targets, None
        if options.check_sign:
            say("Checking signs")
            drawn, at = parsing.generator(options.seed), explanation.settings["score"]
            signs = sign_check(forward, targets, explanation.maps, drawn, score=at)
        scores = None if scene is None else scene_scores(explanation, scene)
        write_folder(explanation, folder, progress=lambda name: say(f"Drawing {name}"))
    return Result(explanation, folder, source, scores, signs)


# -- what is printed -------------------------------------------------------------------------------


def print_report(result: Result) -> None:
    """Print image, prompt and answer, one line per word, and where the files are."""
    from captum_dcam.viewer.folder import SHEET

    console, explanation = printing.output_console(), result.explanation
    answer = "Given answer" if explanation.trajectory.forced else "Answer"
    facts = {"Image": result.source, "Prompt": explanation.prompt, answer: explanation.answer}
    printing.print_facts(console, facts)
    console.print(_words_table(result))
    if result.scores is not None:
        _print_scores(console, explanation.words, result.scores)
    if result.signs is not None:
        console.print(
            "Fall: how much the word's log-probability falls when the tenth of the image tokens "
            "that its map highlights is removed. Random: the same with as many random tokens.",
            style="dim",
        )
    several = "one picture per word, and explanation/ to load again"
    places = {"Sheet": str(result.folder / SHEET), "Folder": f"{result.folder} ({several})"}
    printing.print_facts(console, places)


def _words_table(result: Result) -> Table:
    from captum_dcam.results.summary import summarise

    names = ["#", "Word", "Step", "Sure", "Looks at", "Peak box (px)"]
    names += ["F3"] if result.scores is not None else []
    names += ["Fall", "Random"] if result.signs is not None else []
    table = printing.table_of(*names, right=("#", "Step", "Sure", "F3", "Fall", "Random"))
    for n, row in enumerate(summarise(result.explanation)):
        steps, box = ", ".join(map(str, row.steps)), "–"
        if row.peak is not None:
            x0, y0, x1, y1 = map(round, row.peak)
            box = f"x {x0}–{x1}, y {y0}–{y1}"
        cells = [str(row.number), row.word, steps, f"{row.confidence:.0%}", row.region, box]
        if result.scores is not None:
            own = result.scores[n]
            cells.append("" if own is None else printing.score("f3", float(own.f3)))
        if result.signs is not None:
            cells += [f"{value:+.3f}" for value in result.signs[n].tolist()]
        table.add_row(*map(Text, cells))
    return table


def _print_scores(
    console: Console, words: Sequence[str], scores: Sequence[LocalizationScores | None]
) -> None:
    """All four localisation scores of the words that name objects, and their means."""
    import torch

    from captum_dcam.metrics import f3_score

    rows = [
        (Text(word), [getattr(own, name) for name in METRICS])
        for word, own in zip(words, scores, strict=True)
        if own is not None
    ]
    if not rows:
        console.print("No explained word names an object of the scene.", style="dim")
        return
    if len(rows) > 1:
        columns = zip(*(values[:3] for _, values in rows), strict=True)
        iou, contrast, concentration = (torch.stack(column).mean() for column in columns)
        means = [iou, contrast, concentration, f3_score(iou, contrast, concentration)]
        rows.append((Text("mean (F3 of the means)", style="bold"), means))
    heads = ("Obj-IoU", "Contrast", "Concentration", "F3")
    table = printing.table_of("Localisation", *heads, right=heads)
    for word, values in rows:
        table.add_row(
            word, *(printing.score(m, float(v)) for m, v in zip(METRICS, values, strict=True))
        )
    console.print(table)


def document(result: Result) -> dict[str, Any]:
    """The result as plain data."""
    from captum_dcam.files import without_nan
    from captum_dcam.model.trajectory import STORED_CACHES
    from captum_dcam.results.summary import summarise
    from captum_dcam.viewer.folder import SHEET, word_files

    explanation, trajectory = result.explanation, result.explanation.trajectory
    files: dict[int, list[str]] = {}
    for number, _, name in word_files(explanation):
        files.setdefault(number, []).append(name)
    words = []
    for n, row in enumerate(summarise(explanation)):
        record: dict[str, Any] = {**asdict(row), "files": files[n]}
        if explanation.steps is not None:
            record["every_step"] = without_nan(explanation.steps.probabilities[:, n].tolist())
        if result.scores is not None:
            own = result.scores[n]
            named = None if own is None else {m: float(getattr(own, m)) for m in METRICS}
            record["localization"] = named
        if result.signs is not None:
            highlighted, random = result.signs[n].tolist()
            record["sign_check"] = {"highlighted": highlighted, "random": random}
        words.append(record)
    return {
        "picture": result.source,
        "prompt": explanation.prompt,
        "answer": explanation.answer,
        "forced": trajectory.forced,
        "words": words,
        "regime": STORED_CACHES[trajectory.cache],
        "steps": trajectory.steps,
        "calls": len(trajectory.calls),
        "feasible_calls": len(trajectory.feasible),
        "settings": explanation.settings,
        "versions": explanation.versions,
        "output": str(result.folder),
        "sheet": SHEET,
    }
