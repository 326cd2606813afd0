r"""``captum-dcam compare``: its options, what it does, and what it prints."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import MISSING, Field, asdict, fields
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.text import Text

from captum_dcam.cli import parsing, printing
from captum_dcam.cli.options import (
    DECODE,
    DRAWN,
    HOW,
    OUT,
    Answer,
    argument,
    backward_option,
    command,
    open_option,
    option,
    refine_option,
    score_option,
    tagger_option,
    words_option,
)
from captum_dcam.cli.several import Several, each, places_of
from captum_dcam.errors import InputError

if TYPE_CHECKING:
    from captum_dcam.model.forward import DenoisingForward
    from captum_dcam.model.words import Target
    from captum_dcam.results.comparison import Comparison, ComparisonRow

#: columns that ``--sort`` knows
SORTS = ("f3", "seconds", "name")
#: the method that the others' times are compared with, where it is there
REFERENCE = "diffusion_cam"
STATUS = {"done": "", "partial": "yellow", "failed": "red"}
#: a comparison, the folder where it lies, and the image's path, or which scene was drawn
Compared = tuple["Comparison", Path, str]


class Options(Answer):
    """The options of ``captum-dcam compare``."""

    images: list[Path] | None = argument(
        "IMAGES",
        f"Image files, or folders of them; each is compared by itself. {DRAWN}",
        show_default=False,
    )
    words: list[str] | None = words_option("nouns")
    methods: list[str] | None = option(
        None,
        HOW,
        "'quick' (one of each kind), 'all', or names; repeatable, or with commas between. "
        "Settings after a colon: tam:eci=false,filter=5. Known: {methods}.",
        "--methods",
        "-M",
        metavar="NAMES",
        names="methods",
        shown="quick",
    )
    list_methods: bool = option(False, None, "List all methods and stop.", "--list-methods")
    score: str | None = score_option("commit")
    backward: str | None = backward_option("exact")
    tagger: str | None = tagger_option("phrases")
    refine: list[str] | None = refine_option("none")
    budget_passes: int | None = option(
        None,
        HOW,
        "Number of forward passes after which a method stops, with the words done so far.",
        shown="none",
    )
    budget_seconds: float | None = option(None, HOW, "The same, in seconds.", shown="none")
    seed: int = option(0, DECODE, "Of sampling, and of methods that draw.")
    output: Path | None = option(
        None,
        OUT,
        "Folder for index.html (the explorer), panel.png, the numbers (.json, .csv) and the maps; "
        "of several images in a folder each, with summary.json and an index.html of all; an "
        "earlier output is replaced, nothing else is.",
        "--output",
        "-o",
        shown="comparison, or comparisons",
    )
    open_: bool = open_option()
    scale: str = option(
        "map",
        OUT,
        "Colours of the panel: 'map' (each map to its own maximum) or 'row' (one scale per "
        "method, so that faint words stay faint).",
        names="scales",
        strict=True,
    )
    sort: str | None = option(
        None, OUT, "Order of the table: {sorts}.", names="sorts", strict=True, shown="as given"
    )


@command
def compare(options: Options) -> None:
    """Compare methods on the same answer: maps, time, passes, memory, localisation.

    Examples: captum-dcam compare -M diffusion_cam,tam,attention --sort f3;
    captum-dcam compare photo.jpg -w nouns -M all --budget-seconds 60
    """
    if options.list_methods:
        found = list_methods()
        printing.print_json(found, default=str) if options.json else print_methods(found)
        return
    show = partial(print_comparison, sort=options.sort)
    done = printing.run_and_print(options, run, document, show, allow_nan=False)
    if options.open_:
        folder = done.folder if isinstance(done, Several) else done[1]
        printing.open_page(folder / "index.html")


def run(options: Options) -> Compared | Several:
    """Compare and write; everything that can be checked is checked before any work."""
    from captum_dcam.methods import Budget

    how = parsing.chosen_comparison(options, "quick")
    how["budget"] = Budget(options.budget_passes, options.budget_seconds)
    found = parsing.subjects(options.images, options.scene)
    device = parsing.check_answer(options, how["score"])
    places = places_of(options.output, found, "comparison")
    with printing.progress(options.quiet) as say:
        adapter = parsing.loaded(options, device, say)

        def one(folder: Path, subject: parsing.Subject, say: printing.Say) -> Compared:
            forward = parsing.written(options, adapter, subject.read(), say)
            return _compare_one(options, how, forward, folder, subject, say)

        if len(places) > 1:
            return each(places, "comparison", lambda *given: document(one(*given)), say)
        return one(*next(iter(places.items())), say)


def _compare_one(
    options: Options,
    how: dict[str, Any],
    forward: DenoisingForward,
    folder: Path,
    subject: parsing.Subject,
    say: printing.Say,
) -> Compared:
    """The methods on one answer, written."""
    from captum_dcam.comparing import compare_generation
    from captum_dcam.data.scenes import scene_mask
    from captum_dcam.viewer import write_comparison

    token_texts = forward.adapter.token_texts(forward.trajectory.tokens[0].tolist())
    total, scene = len(how["methods"]), subject.scene
    count = iter(range(1, total + 1))

    def mask(target: Target) -> Any:
        return None if scene is None else scene_mask(scene, token_texts, target)

    comparison = compare_generation(
        forward,
        **how,
        masks=None if scene is None else mask,
        progress=lambda name: say(f"Method {next(count)} of {total}: {name}"),
    )
    if not any(any(row.complete) or any(m.any() for m in row.maps) for row in comparison.rows):
        reasons = "; ".join(f"{row.name}: {row.note}" for row in comparison.rows)
        raise InputError(f"no method gave a map. {reasons}")  # and nothing is written
    say("Drawing panel.png")
    write_comparison(comparison, folder, scale=options.scale)
    return comparison, folder, subject.source


# -- what is printed -------------------------------------------------------------------------------


def print_several(several: Several) -> None:
    """Print one line per image: its answer, its words, and the methods that gave no map."""
    console = printing.output_console()
    table = printing.table_of("Image", "Answer", "Words", "Failed")
    for one in several.documents:
        words = ", ".join(word["text"] for word in one["words"])
        failed = ", ".join(r["name"] for r in one["methods"] if r["status"] == "failed")
        table.add_row(*map(Text, (one["picture"], one["answer"], words, failed or "none")))
    console.print(table)
    printing.print_facts(console, several.places)


def print_comparison(compared: Compared | Several, sort: str | None) -> None:
    """Print prompt and answer, one line per method, why some failed, and where the files are."""
    if isinstance(compared, Several):
        print_several(compared)
        return
    from captum_dcam.results.comparison import METRICS
    from captum_dcam.viewer.folder import PAGE, PANEL

    console, (comparison, folder, source) = printing.output_console(120), compared
    facts = {
        "Image": source,
        "Prompt": comparison.prompt,
        "Given answer" if comparison.forced else "Answer": comparison.answer,
        "Words": ", ".join(comparison.words),
    }
    printing.print_facts(console, facts)
    # whose time is 1: the default method, else the first one that is done
    done = [row for row in comparison.rows if row.status == "done" and row.cost.seconds > 0]
    reference = next((row for row in done if row.name == REFERENCE), done[0] if done else None)
    scored = any(row.mean("f3") is not None for row in comparison.rows)
    names = ["Method", "Status", "Seconds", "× time", "Passes", "MB"]
    names += ["Obj-IoU", "Contrast", "Conc.", "F3"] if scored else []
    table = printing.table_of(*names, right=names[2:], whole=True)
    for row in ordered(comparison.rows, sort):
        cells = [Text(row.name), Text(row.status, style=STATUS[row.status])]
        cells += map(Text, _costs(row, reference))
        if scored:
            cells += [Text(printing.score(name, row.mean(name))) for name in METRICS]
        table.add_row(*cells)
    console.print(table)
    for row in comparison.rows:
        if row.status != "done" or row.note:
            console.print(Text.assemble((f"{row.name} ", "bold"), _reason(row)))
    notes = ["Seconds: all words together. Passes: forward + backward. MB: peak memory."]
    if reference is not None:
        notes.append(f"× time: against {reference.name}.")
    if scored:
        notes.append("Scores: means over the words that name an object, against its mask.")
    console.print(" ".join(notes), style="dim")
    files = f"{folder} (comparison.csv, .json, and all maps)"
    places = {"Page": str(folder / PAGE), "Panel": str(folder / PANEL), "Folder": files}
    printing.print_facts(console, places)


def ordered(rows: Sequence[ComparisonRow], sort: str | None) -> list[ComparisonRow]:
    """Rows as ``--sort`` asks: best F3 first, quickest first (failed ones last), or by name."""
    if sort == "f3":
        return sorted(rows, key=lambda r: -1.0 if (f := r.mean("f3")) is None else f, reverse=True)
    if sort == "seconds":
        return sorted(rows, key=lambda r: (r.status == "failed", r.cost.seconds))
    return sorted(rows, key=lambda r: r.name) if sort == "name" else list(rows)


def _costs(row: ComparisonRow, reference: ComparisonRow | None) -> list[str]:
    if row.status == "failed":
        return ["–"] * 4
    cost = row.cost
    ratio = None if reference is None else cost.seconds / reference.cost.seconds
    peak = None if cost.peak_bytes is None else cost.peak_bytes / 1e6
    passes = f"{cost.forwards} + {cost.backwards}"
    return [
        printing.figure(cost.seconds, 2),
        printing.figure(ratio, 1),
        passes,
        printing.figure(peak, 0),
    ]


def _reason(row: ComparisonRow) -> str:
    if row.status == "partial":
        return f"partial, {sum(row.complete)} of {len(row.complete)} words: {row.note}"
    return f"failed: {row.note}" if row.status == "failed" else row.note


def document(compared: Compared | Several) -> dict[str, Any]:
    """The comparison as plain data."""
    if isinstance(compared, Several):
        return compared.document()
    from captum_dcam.results.comparison import document
    from captum_dcam.viewer.folder import PAGE, PANEL

    comparison, folder, source = compared
    places = {"output": str(folder), "page": PAGE, "panel": PANEL}
    return {"picture": source, **document(comparison), **places}


# -- the list of methods ---------------------------------------------------------------------------


def list_methods() -> list[dict[str, Any]]:
    """One record per method, in the order of the table."""
    from captum_dcam.files import without_nan
    from captum_dcam.methods import METHODS, method_names

    found = []
    for name in method_names():
        facts = {"name": name, **asdict(METHODS[name].facts)}
        facts["maps"] = ["image", "text"] if facts.pop("text") else ["image"]
        facts["aliases"] = [other for other, own in METHODS.aliases.items() if own == name]
        settings = fields(METHODS[name])  # type: ignore[arg-type]  # dataclasses all
        found.append(without_nan({**facts, "settings": {f.name: _default(f) for f in settings}}))
    return found


def _default(field: Field[Any]) -> Any:
    if field.default_factory is not MISSING:
        return field.default_factory()
    return None if field.default is MISSING else field.default


def print_methods(records: Sequence[dict[str, Any]]) -> None:
    """Print one line per method, group after group."""
    console, group = printing.output_console(160), ""
    heads = ("Name", "Method", "Passes", "Needs", "Maps", "Runs on", "Source")
    table = printing.table_of(*heads, whole=True)
    for r in records:
        if r["group"] != group:
            group = r["group"]
            if table.row_count:
                table.add_section()
            table.add_row(Text(group, style="bold"))
        maps = " + ".join(r["maps"]) + (", one for all words" if r["target_blind"] else "")
        cells = [r["name"], r["label"], r["passes"], ", ".join(r["needs"]), maps]
        table.add_row(*map(Text, [*cells, ", ".join(r["runs_on"]), r["source"]]))
    console.print(table)
    console.print(
        "Passes: for one token; '+ n back' are backward passes. Settings: listed by --json, given "
        "as name:setting=value.",
        style="dim",
    )
    aliases = ", ".join(f"{other} ({r['name']})" for r in records for other in r["aliases"])
    console.print(f"Other names: {aliases}; and classes of Captum by theirs.", style="dim")
