r"""``captum-dcam compare-models``: its options, what it does, and what it prints."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.text import Text

from captum_dcam.cli import parsing, printing
from captum_dcam.cli.options import (
    DECODE,
    DRAWN,
    HOW,
    Answer,
    argument,
    backward_option,
    command,
    layer_option,
    open_option,
    option,
    output_option,
    refine_option,
    score_option,
    tagger_option,
    words_option,
)

if TYPE_CHECKING:
    from captum_dcam.model.words import Target
    from captum_dcam.results.model_comparison import ModelComparison

#: a comparison, the folder where it lies, and the image's path, or which scene was drawn
Compared = tuple["ModelComparison", Path, str]


class Options(Answer):
    """The options of ``captum-dcam compare-models``; those of loading and decoding, and the block,
    are the first model's."""

    image: Path | None = argument("IMAGE", f"An image file. {DRAWN}", show_default=False)
    others: list[str] | None = option(
        None,
        HOW,
        "A model to compare with, as --model names one; repeatable.",
        "--with",
        metavar="MODEL",
        names="models",
        shown="mini_ar",
    )
    words: list[str] | None = words_option("nouns")
    methods: list[str] | None = option(
        None,
        HOW,
        "As of compare: names, with settings after a colon; each runs on each model.",
        "--methods",
        "-M",
        metavar="NAMES",
        names="methods",
        shown="diffusion_cam",
    )
    score: str | None = score_option("commit")
    backward: str | None = backward_option("exact")
    tagger: str | None = tagger_option("phrases")
    refine: list[str] | None = refine_option("none")
    layer: int | None = layer_option("recommended")
    seed: int = option(0, DECODE, "Of sampling, and of methods that draw.")
    output: Path = output_option(
        "models",
        "Folder for index.html (the explorer), panel.png, the numbers (.json, .csv) and the maps; "
        "an earlier output is replaced, nothing else is.",
    )
    open_: bool = open_option()


@command
def compare_models(options: Options) -> None:
    """Force one answer into several models: whose maps agree, and in which order each writes.

    Examples: captum-dcam compare-models --scene 3 -M diffusion_cam,tam;
    captum-dcam compare-models photo.jpg -m GSAI-ML/LLaDA-V --with llava-hf/llava-1.5-7b-hf
    """
    _, folder, _ = printing.run_and_print(options, run, document, print_comparison, allow_nan=False)
    if options.open_:
        from captum_dcam.viewer.explorer import PAGE

        printing.open_page(folder / PAGE)


def run(options: Options) -> Compared:
    """Compare and write; everything that can be checked is checked before any work."""
    from captum_dcam.comparing import compare_models
    from captum_dcam.data.scenes import scene_mask
    from captum_dcam.model.words import answer_text
    from captum_dcam.viewer import prepare_folder, write_models

    how = parsing.chosen_comparison(options, "diffusion_cam")
    (subject,) = parsing.subjects([] if options.image is None else [options.image], options.scene)
    device = parsing.check_answer(options, how["score"])
    folder = prepare_folder(options.output, "comparison")
    others = options.others or ["mini_ar"]
    with printing.progress(options.quiet) as say:
        pictures, scene = subject.read(), subject.scene
        first = parsing.loaded(options, device, say)
        text, written = options.answer, None
        if text is None:
            written = parsing.written(options, first, pictures, say).trajectory
            text = answer_text(first, written.tokens[0].tolist())
        models = {options.model: first}
        for name in others:
            say(f"Loading {name}")
            own = parsing.load_model(
                name, {}, cache=options.cache, device=device, dtype=options.dtype
            )
            models[name if name not in models else f"{name}#{len(models) + 1}"] = own
        token_texts = first.token_texts(first.whole_answer(first.encode(text))) if text else []

        def mask(target: Target) -> Any:
            return None if scene is None else scene_mask(scene, token_texts, target)

        found = compare_models(
            models,
            pictures,
            options.prompt,
            **how,
            answer=text,
            layers=[options.layer, *[None] * len(others)],
            masks=None if scene is None else mask,
            internal_batch_size=options.internal_batch_size,
            progress=lambda name: say(f"Explaining its words in {name}"),
            # an answer of its own is not written again
            generation=[{} if written is None or options.reveals else written, *[{}] * len(others)],
        )
        say("Drawing panel.png")
        write_models(found, folder)
    return found, folder, subject.source


def print_comparison(compared: Compared) -> None:
    """Print prompt, answer, what each model writes, how far maps agree, and where the files are."""
    from captum_dcam.viewer.folder import PAGE, PANEL

    console, (found, folder, source) = printing.output_console(110), compared
    facts = {"Image": source, "Prompt": found.comparison.prompt, "Answer": found.comparison.answer}
    printing.print_facts(console, facts)
    console.print(_writing_table(found))
    console.print(
        "Early: words that a model writes before all words to their left are written.", style="dim"
    )
    console.print(_agreement_table(found))
    console.print(
        "Ranks: Spearman's correlation. Tenth: overlap of the highest tenths. Apart: distance of "
        "the peaks, in diagonals.",
        style="dim",
    )
    for row in found.comparison.rows:
        if row.status != "done":
            console.print(Text.assemble((f"{row.name} ", "bold"), f"{row.status}: {row.note}"))
    files = f"{folder} (comparison.csv, .json, and all maps)"
    places = {"Page": str(folder / PAGE), "Panel": str(folder / PANEL), "Folder": files}
    printing.print_facts(console, places)


def _writing_table(found: ModelComparison) -> Any:
    table = printing.table_of("Model", "Writes itself", "Early", whole=True)
    for order in found.orders:
        table.add_row(*map(Text, (order.model, order.answer, ", ".join(order.early) or "none")))
    return table


def _agreement_table(found: ModelComparison) -> Any:
    names = ("Method", "Models", "Word", "Ranks", "Tenth", "Apart", "F3", "F3")
    table = printing.table_of(*names, right=names[3:], whole=True)
    for one in found.agreement:
        cells = [one.method, f"{one.first}, {one.second}", found.comparison.words[one.word]]
        cells += [f"{one.rank:+.2f}", f"{one.overlap:.0%}", f"{one.distance:.2f}"]
        for model in (one.first, one.second):
            scores = found.comparison.row(f"{model}: {one.method}").scores
            own = None if scores is None else scores[one.word]
            cells.append(printing.score("f3", None if own is None else float(own.f3)))
        table.add_row(*map(Text, cells))
    return table


def document(compared: Compared) -> dict[str, Any]:
    """The comparison as plain data."""
    from captum_dcam.results.comparison import document
    from captum_dcam.viewer.folder import PAGE, PANEL

    found, folder, source = compared
    return {
        "picture": source,
        **document(found.comparison),
        "agreement": found.records(),
        "orders": [asdict(order) for order in found.orders],
        "output": str(folder),
        "page": PAGE,
        "panel": PANEL,
    }
