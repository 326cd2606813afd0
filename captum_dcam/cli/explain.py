r"""``captum-dcam explain``: its options, what it does, and what it prints."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
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
    open_option,
    option,
    output_option,
    preset_option,
)

if TYPE_CHECKING:
    from captum_dcam.metrics import LocalizationScores
    from captum_dcam.results.explanation import Explanation
    from captum_dcam.results.trust import Trust

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
    trust: bool = option(
        True,
        HOW,
        "Also find whether to believe the maps: remove what each highlights and read its word "
        "again, the relevance of the text, and the word's probability at every step.",
        "--trust/--no-trust",
    )
    seed: int = option(0, DECODE, "Of sampling.")
    output: Path = output_option(
        "explanation",
        "Folder for index.html (the explorer), one picture per word, sheet.png and the data; an "
        "earlier output is replaced, nothing else is.",
    )
    open_: bool = open_option()


@command
def explain(options: Options) -> None:
    """Explain the words of an answer about an image: one map per word.

    Examples: captum-dcam explain photo.jpg -p "what is in the image ?" -w nouns;
    captum-dcam explain --scene 3 --preset paper --json
    """
    done = printing.run_and_print(options, run, document, print_report)
    if options.open_:
        printing.open_page(done.page)


@dataclass(frozen=True)
class Result:
    r"""What was explained and written.

    Args:
        explanation (Explanation): the maps.
        folder (Path): where everything lies.
        source (str): the image's path, or which scene was drawn.
        scores (tuple or None): localisation of every target, where masks are known.
    """

    explanation: Explanation
    folder: Path
    source: str
    scores: tuple[LocalizationScores | None, ...] | None

    @property
    def page(self) -> Path:
        """The explorer."""
        from captum_dcam.viewer.explorer import PAGE

        return self.folder / PAGE

    @property
    def trust(self) -> Trust:
        """What the explanation says of itself."""
        assert self.explanation.trust is not None  # it was made just now
        return self.explanation.trust

    @property
    def trusted(self) -> bool:
        """Whether all of it was computed."""
        return "signs" in self.trust.parts


def run(options: Options) -> Result:
    """Explain and write; everything that can be checked is checked before any work."""
    from captum_dcam.explaining import check_steps, explain_generation
    from captum_dcam.model.foils import check_foil
    from captum_dcam.presets import preset
    from captum_dcam.results.summary import mask_scores, scene_masks
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
        scores = None
        if scene is not None:
            masks = scene_masks(explanation, scene)
            explanation, scores = replace(explanation, masks=masks), mask_scores(explanation, masks)
        write_folder(explanation, folder, progress=lambda name: say(f"Drawing {name}"))
    return Result(explanation, folder, source, scores)


# -- what is printed -------------------------------------------------------------------------------


def print_report(result: Result) -> None:
    """Print image, prompt and answer, one line per word, and where the files are."""
    from captum_dcam.viewer.folder import SHEET

    console, explanation = printing.output_console(), result.explanation
    answer = "Given answer" if explanation.trajectory.forced else "Answer"
    facts = {"Beware": result.trust.warning} if result.trust.warning else {}
    facts |= {"Image": result.source, "Prompt": explanation.prompt, answer: explanation.answer}
    printing.print_facts(console, facts)
    console.print(_words_table(result))
    for line in _captions(result):
        console.print(line, style="dim")
    if result.scores is not None:
        _print_scores(console, explanation.words, result.scores)
    several = "one picture per word, and explanation/ to load again"
    places = {
        "Page": str(result.page),
        "Sheet": str(result.folder / SHEET),
        "Folder": f"{result.folder} ({several})",
    }
    printing.print_facts(console, places)


def _words_table(result: Result) -> Table:
    from captum_dcam.results.summary import summarise

    names = ["#", "Word", "Step", "Prob.", "Or", "Localises", "Looks at"]
    names += ["F3"] if result.scores is not None else []
    names += ["Fall", "Random", "Image", "Prompt", "Answer"] if result.trusted else []
    right = ("#", "Step", "Prob.", "Localises", "F3", "Fall", "Random", "Image", "Prompt", "Answer")
    table = printing.table_of(*names, right=right)
    for n, row in enumerate(summarise(result.explanation)):
        rival = "".join(f"{text} {p:.0%}" for text, p in row.instead[:1] if p >= 0.01)
        cells = [str(row.number), row.word, ", ".join(map(str, row.steps))]
        cells += [f"{row.confidence:.0%}", rival, f"{row.localises:.0%}"]
        cells.append("nothing" if row.doubtful else row.region)
        if result.scores is not None:
            own = result.scores[n]
            cells.append("" if own is None else printing.score("f3", float(own.f3)))
        if result.trusted:
            cells += [f"{value:+.2f}" for value in result.trust.signs[n].tolist()]
            cells += [f"{value:.0%}" for value in result.trust.shares[n].tolist()]
        table.add_row(*map(Text, cells), style="dim" if row.doubtful else None)
    return table


def _captions(result: Result) -> list[str]:
    """What the columns mean."""
    lines = [
        "Or: the likeliest other token in the word's place, from 1%. Localises: how well the "
        "word's map, before refinements, singles out a region, as an object word's does and a "
        f"function word's does not; not whether the word is true ({result.trust.source})."
    ]
    if result.trusted:
        lines.append(
            "Fall: how much the word's log-probability falls when the tenth of the image tokens "
            "that its map highlights is removed; Random: when as many random ones are. Image, "
            "Prompt, Answer: where what speaks for the word lies."
        )
    return lines


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
        if result.scores is not None:
            own = result.scores[n]
            named = None if own is None else {m: float(getattr(own, m)) for m in METRICS}
            record["localization"] = named
        record["candidates"] = [
            [asdict(one) for one in token] for token in result.trust.candidates[n]
        ]
        if result.trusted:
            highlighted, random = result.trust.signs[n].tolist()
            record["sign_check"] = {"highlighted": highlighted, "random": random}
            image, prompt, answer = result.trust.shares[n].tolist()
            record["shares"] = {"image": image, "prompt": prompt, "answer": answer}
            record["text"] = without_nan(result.trust.text.values[n].tolist())
        if "probabilities" in result.trust.parts:
            record["every_step"] = without_nan(result.trust.probabilities[:, n].tolist())
        words.append(record)
    return {
        "warning": result.trust.warning,
        "picture": result.source,
        "prompt": explanation.prompt,
        "answer": explanation.answer,
        "forced": trajectory.forced,
        "words": words,
        "tokens": list(result.trust.text.tokens.token_texts) if result.trusted else None,
        "localises": {"calibrated": result.trust.calibrated, "source": result.trust.source},
        "regime": STORED_CACHES[trajectory.cache],
        "steps": trajectory.steps,
        "calls": len(trajectory.calls),
        "feasible_calls": len(trajectory.feasible),
        "settings": explanation.settings,
        "versions": explanation.versions,
        "output": str(result.folder),
        "page": result.page.name,
        "sheet": SHEET,
    }
