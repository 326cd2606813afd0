r"""``captum-dcam explain``: its options, what it does, and what it prints."""

from __future__ import annotations

import math
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
    DRAWN,
    HOW,
    OUT,
    WHAT,
    Answer,
    argument,
    command,
    layer_option,
    open_option,
    option,
    preset_option,
)
from captum_dcam.cli.several import Several, each, places_of

if TYPE_CHECKING:
    import torch

    from captum_dcam.metrics import LocalizationScores
    from captum_dcam.model.adapter import Adapter
    from captum_dcam.presets import Preset
    from captum_dcam.results.explanation import Explanation
    from captum_dcam.results.scores import WordScores
    from captum_dcam.results.trust import Trust

METRICS = ("obj_iou", "contrast", "concentration", "f3")


class Options(Answer):
    """The options of ``captum-dcam explain``."""

    images: list[Path] | None = argument(
        "IMAGES",
        f"Image files, or folders of them; each is explained by itself, unless --together. {DRAWN}",
        show_default=False,
    )
    video: list[Path] | None = option(
        None,
        WHAT,
        "A video: an animated GIF or WebP, or a folder of frames; repeatable.",
        metavar="PATH",
        shown="none",
    )
    frames: int = option(8, WHAT, "Number of frames of a video, evenly spaced.", min=1)
    together: bool = option(
        False, WHAT, "Ask one question about all images and videos, in this order.", "--together"
    )
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
    output: Path | None = option(
        None,
        OUT,
        "Folder for index.html (the explorer), one picture per word, sheet.png and the data; of "
        "several images in a folder each, with summary.json and an index.html of all; an earlier "
        "output is replaced, nothing else is.",
        "--output",
        "-o",
        shown="explanation, or explanations",
    )
    open_: bool = open_option()


@command
def explain(options: Options) -> None:
    """Explain the words of an answer about an image: one map per word.

    Examples: captum-dcam explain photo.jpg -p "what is in the image ?" -w nouns;
    captum-dcam explain photos/ -w nouns -o maps; captum-dcam explain --scene 3 --json
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


@dataclass(frozen=True)
class Asked:
    r"""The options of a call, checked before any work.

    Args:
        preset (Preset): of ``--preset``.
        own (dict): arguments of :func:`captum_dcam.explaining.explain_generation`.
        device (torch.device): where the model goes.
        places (dict): output folder → what is explained there.
    """

    preset: Preset
    own: dict[str, Any]
    device: torch.device
    places: dict[Path, parsing.Subject]


def run(options: Options) -> Result | Several:
    """Explain and write; everything that can be checked is checked before any work."""
    asked = _asked(options)
    with printing.progress(options.quiet) as say:
        adapter = parsing.loaded(options, asked.device, say)

        def one(folder: Path, subject: parsing.Subject, say: printing.Say) -> Result:
            return _explain_one(options, asked, adapter, folder, subject, say)

        if len(asked.places) > 1:
            return each(asked.places, "explanation", lambda *given: document(one(*given)), say)
        return one(*next(iter(asked.places.items())), say)


def _asked(options: Options) -> Asked:
    """What can be checked without a model."""
    from captum_dcam.explaining import check_steps, explain_generation
    from captum_dcam.model.answers import without_steps
    from captum_dcam.model.foils import check_foil
    from captum_dcam.presets import preset

    words = parsing.chosen_words(options.words)
    refinements = parsing.chosen_refinements(options.refine)
    chosen = preset(options.preset)
    score, foil = parsing.chosen_score(options.score), parsing.chosen_foil(options.foil)
    check_foil(foil)
    reading = chosen.reading(score=score, tagger=options.tagger)
    found = parsing.subjects(
        options.images, options.scene, options.video, options.frames, options.together
    )
    device = parsing.check_answer(options, reading.score)
    if options.every_step:
        check_steps(without_steps(options.given), None)
    own = options.shared(
        explain_generation,
        words=words,
        refinements=refinements,
        preset=chosen,
        score=score,
        foil=foil,
    )
    return Asked(chosen, own, device, places_of(options.output, found, "explanation"))


def _explain_one(
    options: Options,
    asked: Asked,
    adapter: Adapter,
    folder: Path,
    subject: parsing.Subject,
    say: printing.Say,
) -> Result:
    """One question, explained and written."""
    from captum_dcam.explaining import explain_generation
    from captum_dcam.results.summary import mask_scores, scene_masks
    from captum_dcam.viewer import write_folder

    forward = parsing.written(options, adapter, subject.read(), say, asked.preset.layer)
    say("Explaining its words")
    explanation = explain_generation(forward, **asked.own)
    scores = None
    if subject.scene is not None:
        masks = scene_masks(explanation, subject.scene)
        explanation, scores = replace(explanation, masks=masks), mask_scores(explanation, masks)
    write_folder(explanation, folder, progress=lambda name: say(f"Drawing {name}"))
    return Result(explanation, folder, subject.source, scores)


# -- what is printed -------------------------------------------------------------------------------


def print_report(result: Result | Several) -> None:
    """Print what was explained, and where the files are."""
    if isinstance(result, Several):
        print_several(result)
    else:
        print_one(result)


def print_several(result: Several) -> None:
    """Print one line per image: its answer, and how many of its words localise."""
    console = printing.output_console()
    table = printing.table_of("Image", "Answer", "Words", "Localise", right=("Words", "Localise"))
    for one in result.documents:
        words = one["words"]
        sure = sum(not word["doubtful"] for word in words)
        table.add_row(*map(Text, (one["picture"], one["answer"], str(len(words)), str(sure))))
    console.print(table)
    console.print("Localise: words whose maps single out a region, as far as known.", style="dim")
    printing.print_facts(console, result.places)


def print_one(result: Result) -> None:
    """Print image, prompt and answer, one line per word, and where the files are."""
    from captum_dcam.viewer.folder import SHEET

    console, explanation = printing.output_console(), result.explanation
    answer = "Given answer" if explanation.trajectory.forced else "Answer"
    facts = {"Beware": result.trust.warning} if result.trust.warning else {}
    facts |= {"Image": result.source, "Prompt": explanation.prompt}
    facts |= {"Given": explanation.template} if explanation.template else {}
    facts |= {answer: explanation.answer}
    printing.print_facts(console, facts)
    console.print(_words_table(result))
    if result.trusted:
        console.print(_scores_table(result))
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
    from captum_dcam.results.summary import given_words, summarise

    names = ["#", "Word", "Step", "Prob.", "Or", "Localises", "Looks at"]
    names += ["F3"] if result.scores is not None else []
    names += ["Fall", "Random", "Image", "Prompt", "Answer"] if result.trusted else []
    filled = bool(result.trusted and result.explanation.template)
    names += ["Given words"] if filled else []
    given = given_words(result.explanation) if filled else ()
    right = ("#", "Step", "Prob.", "Localises", "F3", "Fall", "Random", "Image", "Prompt", "Answer")
    table = printing.table_of(*names, right=right)
    for n, row in enumerate(summarise(result.explanation)):
        rival = "".join(f"{text} {p:.0%}" for text, p in row.instead[:1] if p >= 0.01)
        cells = [str(row.number), row.word, row.when]
        cells += [f"{row.confidence:.0%}", rival, f"{row.localises:.0%}"]
        cells.append("nothing" if row.doubtful else row.region)
        if result.scores is not None:
            own = result.scores[n]
            cells.append("" if own is None else printing.score("f3", float(own.f3)))
        if result.trusted:
            cells += [f"{value:+.2f}" for value in result.trust.signs[n].tolist()]
            cells += [f"{value:.0%}" for value in result.trust.shares[n].tolist()]
        if filled:
            cells.append(", ".join(f"{text} {v:+.2f}" for text, v in given[n][:2]))
        table.add_row(*map(Text, cells), style="dim" if row.doubtful else None)
    return table


def _scores_table(result: Result) -> Table:
    """What the steps say of every word, and which are probably not grounded."""
    scores = result.trust.scores
    columns = {
        "Sure": scores.probability,
        "Ahead": scores.margin,
        "Entropy": scores.entropy,
        "So far": scores.mean_entropy,
        "Flips": scores.flips,
        "Grey": scores.grey,
        "Blurred": scores.blurred,
        "Erased": scores.erased,
        "Overlap": scores.overlap,
        "Again": scores.repetition,
    }
    names = ["#", "Is it so?", *columns, *(["Grounded"] if scores.fitted else [])]
    table = printing.table_of(*names, right=("#", *columns, "Grounded"))
    for n, word in enumerate(scores.words):
        cells = [str(n + 1), word, *(_number(name, float(v[n])) for name, v in columns.items())]
        doubted = scores.doubted[n]
        if scores.fitted:
            cells.append(_number("Sure", float(scores.grounded[n])) + (" ?" if doubted else ""))
        table.add_row(*map(Text, cells), style="yellow" if doubted else None)
    return table


def _number(name: str, value: float) -> str:
    """A score as it is shown; nothing where it is not defined."""
    if math.isnan(value):
        return ""
    if name in ("Sure", "Ahead", "Overlap"):
        return f"{value:.0%}"
    if name in ("Flips", "Again"):
        return f"{value:.0f}"
    return f"{value:.2f}" if name in ("Entropy", "So far") else f"{value:+.2f}"


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
        lines.append(
            "Is it so? When the word was committed: its probability (Sure), how far Ahead of the "
            "next, the Entropy in nats then and on the way (So far), how often the likeliest word "
            "changed (Flips); the fall with a Grey and a Blurred picture, and where what its map "
            "highlights is Erased; Overlap of the maps in its phrase; how often it stood there "
            f"before (Again). {_verdict(result.trust.scores)}"
        )
    if result.trusted and result.explanation.template:
        lines.append(
            "Given words: which of them speak most for the filled word (+) or against it (-), on "
            "the scale of its map."
        )
    return lines


def _verdict(scores: WordScores) -> str:
    """Which words are probably not grounded, by whom; or why nobody says so."""
    if not scores.fitted:
        return f"No word is judged: {scores.calibrator}."
    named = [w for w, doubted in zip(scores.words, scores.doubted, strict=True) if doubted]
    said = f"Probably not grounded (?): {', '.join(named)}" if named else "No word is doubted"
    return f"{said}; calibrator, which doubts below {scores.below:.0%}: {scores.calibrator}."


def _calibrator(scores: WordScores) -> dict[str, Any]:
    """Who judges words, or why nobody does."""
    return {"fitted": scores.fitted, "source": scores.calibrator, "below": scores.below}


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


def document(result: Result | Several) -> dict[str, Any]:
    """The result as plain data."""
    if isinstance(result, Several):
        return result.document()
    from captum_dcam.files import without_nan
    from captum_dcam.model.trajectory import STORED_CACHES
    from captum_dcam.results.summary import given_words, summarise
    from captum_dcam.viewer.folder import SHEET, word_files

    explanation, trajectory = result.explanation, result.explanation.trajectory
    files: dict[int, list[str]] = {}
    for number, _, name in word_files(explanation):
        files.setdefault(number, []).append(name)
    words = []
    filled = bool(result.trusted and explanation.template)
    given = given_words(explanation) if filled else ()
    scores = result.trust.scores.records() if result.trusted else []
    for n, row in enumerate(summarise(explanation)):
        record: dict[str, Any] = {**asdict(row), "files": files[n]}
        del record["said"]  # scores say it in numbers
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
            if explanation.template:
                record["given"] = [{"word": w, "relevance": v} for w, v in given[n]]
            record["text"] = without_nan(result.trust.text.values[n].tolist())
            record["scores"] = scores[n]
        if "probabilities" in result.trust.parts:
            record["every_step"] = without_nan(result.trust.probabilities[:, n].tolist())
        words.append(record)
    return {
        "warning": result.trust.warning,
        "picture": result.source,
        "prompt": explanation.prompt,
        "answer": explanation.answer,
        "forced": trajectory.forced,
        "given": explanation.template or None,
        "words": words,
        "tokens": list(result.trust.text.tokens.token_texts) if result.trusted else None,
        "calibrator": _calibrator(result.trust.scores) if result.trusted else None,
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
