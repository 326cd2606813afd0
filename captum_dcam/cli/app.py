r"""The command line: ``captum-dcam explain``, ``compare``, and commands over data sets.

Heavy packages are imported inside the commands, so that ``--help`` and ``--version`` are quick.
Exit codes: 0 done; 2 usage or bad input, with one line that says what; 1 an error of the program.
"""

from __future__ import annotations

import json as jsonlib
from pathlib import Path
from typing import Annotated, Any

import typer

from captum_dcam.cli.options import (
    HOW,
    OUT,
    PROMPT,
    WHAT,
    BatchSize,
    BlockLength,
    Device,
    Dtype,
    Generation,
    GenLength,
    ImageFile,
    Json,
    Layer,
    LoadSettings,
    Model,
    Prompt,
    Regime,
    Scene,
    Steps,
    Temperature,
    clear_errors,
    others_on_stderr,
    output_option,
    pairs_option,
    refine_option,
    score_option,
    seed_option,
    words_option,
)

app = typer.Typer(
    name="captum-dcam",
    help="Which image regions made a masked-diffusion multimodal LLM write which words.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _version(value: bool) -> None:
    if value:
        from importlib.metadata import version

        typer.echo(f"captum-dcam {version('captum-dcam')}")
        raise typer.Exit


@app.callback()
def _common(
    version: Annotated[
        bool,
        typer.Option("--version", callback=_version, is_eager=True, help="Show the version."),
    ] = False,
) -> None:
    pass


# -- commands ------------------------------------------------------------------------------------


@app.command()
def explain(
    image: ImageFile = None,
    prompt: Prompt = PROMPT,
    words: Annotated[list[str] | None, words_option("all")] = None,
    scene: Scene = None,
    model: Model = "mini",
    load: LoadSettings = None,
    regime: Regime = None,
    layer: Layer = None,
    internal_batch_size: BatchSize = None,
    preset: Annotated[
        str,
        typer.Option(rich_help_panel=HOW, help="'default', 'paper' or 'base'."),
    ] = "default",
    score: Annotated[str | None, score_option("the preset's")] = None,
    product: Annotated[
        str | None,
        typer.Option(
            show_default="the preset's",
            rich_help_panel=HOW,
            help="Of gradient and feature: 'pooled', 'positionwise' or 'plus_plus'.",
        ),
    ] = None,
    center: Annotated[
        bool | None,
        typer.Option(
            "--center/--no-center",
            show_default="the preset's",
            rich_help_panel=HOW,
            help="Centre features over positions first.",
        ),
    ] = None,
    refine: Annotated[list[str] | None, refine_option("the preset's")] = None,
    check_sign: Annotated[
        bool,
        typer.Option(
            "--check-sign",
            rich_help_panel=HOW,
            help="Remove what every map highlights and see whether the word becomes less likely.",
        ),
    ] = False,
    gen_length: GenLength = None,
    steps: Steps = None,
    block_length: BlockLength = None,
    temperature: Temperature = None,
    generation: Generation = None,
    seed: Annotated[int, seed_option("Of sampling and of the sign check.")] = 0,
    device: Device = "cpu",
    dtype: Dtype = "float32",
    output: Annotated[
        Path, output_option("a picture of every word, sheet.png and the data")
    ] = Path("explanation"),
    json: Json = False,
) -> None:
    """Explain the words of an answer about a picture: one map a word.

    Examples: captum-dcam explain photo.jpg -p "what is in the image ?" -w nouns;
    captum-dcam explain --scene 3 --preset paper --json
    """
    options = dict(locals())
    with clear_errors():
        from captum_dcam.cli.explain import Options, run
        from captum_dcam.cli.printing import print_json, print_report

        with others_on_stderr():
            result = run(Options(**options))
        (print_json if json else print_report)(result)


@app.command()
def compare(
    image: ImageFile = None,
    prompt: Prompt = PROMPT,
    words: Annotated[list[str] | None, words_option("nouns")] = None,
    scene: Scene = None,
    methods: Annotated[
        list[str] | None,
        typer.Option(
            "--methods",
            "-M",
            metavar="NAMES",
            show_default="quick",
            rich_help_panel=HOW,
            help="'quick' (one of each kind), 'all', or names; repeatable, or with commas between. "
            "Settings after a colon: tam:eci=false,filter=5.",
        ),
    ] = None,
    list_methods: Annotated[
        bool, typer.Option("--list-methods", help="List all methods and stop.")
    ] = False,
    model: Model = "mini",
    load: LoadSettings = None,
    regime: Regime = None,
    layer: Layer = None,
    internal_batch_size: BatchSize = None,
    score: Annotated[str | None, score_option("commit")] = None,
    refine: Annotated[list[str] | None, refine_option("none")] = None,
    budget_passes: Annotated[
        int | None,
        typer.Option(
            show_default="none",
            rich_help_panel=HOW,
            help="Forward passes after which a method stops, with the words done so far.",
        ),
    ] = None,
    budget_seconds: Annotated[
        float | None,
        typer.Option(show_default="none", rich_help_panel=HOW, help="The same in seconds."),
    ] = None,
    gen_length: GenLength = None,
    steps: Steps = None,
    block_length: BlockLength = None,
    temperature: Temperature = None,
    generation: Generation = None,
    seed: Annotated[int, seed_option("Of sampling and of methods that draw.")] = 0,
    device: Device = "cpu",
    dtype: Dtype = "float32",
    output: Annotated[
        Path, output_option("panel.png, the figures (.json, .csv) and the maps")
    ] = Path("comparison"),
    scale: Annotated[
        str,
        typer.Option(
            rich_help_panel=OUT,
            help="Colours of the panel: 'map' (each map to its own maximum) or 'row' (one scale "
            "a method, so that faint words stay faint).",
        ),
    ] = "map",
    sort: Annotated[
        str | None,
        typer.Option(
            show_default="as given",
            rich_help_panel=OUT,
            help="Order of the table: 'f3', 'seconds' or 'name'.",
        ),
    ] = None,
    json: Json = False,
) -> None:
    """Compare methods on the same answer: maps, time, passes, memory, localisation.

    Examples: captum-dcam compare -M diffusion_cam,tam,attention --sort f3;
    captum-dcam compare photo.jpg -w nouns -M all --budget-seconds 60
    """
    options = {name: value for name, value in locals().items() if name != "list_methods"}
    with clear_errors():
        from captum_dcam.cli import compare as compare_command
        from captum_dcam.cli import print_compare as compare_report

        if list_methods:
            found = compare_command.list_methods()
            (compare_report.print_methods_json if json else compare_report.print_methods)(found)
            return
        with others_on_stderr():
            result = compare_command.run(compare_command.CompareOptions(**options))
        (compare_report.print_comparison_json if json else compare_report.print_comparison)(result)


@app.command()
def models(
    json: Annotated[bool, typer.Option("--json", help="Print JSON on stdout.")] = False,
) -> None:
    """List the model families: regimes, blocks, and which of them can be explained."""
    with clear_errors():
        from captum_dcam.cli.explain import list_models
        from captum_dcam.cli.printing import print_models

        found: list[dict[str, Any]] = list_models()
        if json:
            typer.echo(jsonlib.dumps(found, indent=1, ensure_ascii=False))
        else:
            print_models(found)


# ``captum-dcam evaluate``, ``table`` and ``calibrate``: what is done over data sets.


RUN = "Running"

# -- options of both commands that read a data set -------------------------------------------------

DataSet = Annotated[
    str,
    typer.Option("--dataset", "-d", rich_help_panel=WHAT, help="A data set; see evaluate --list."),
]
Root = Annotated[
    Path | None, typer.Option(rich_help_panel=WHAT, help="Folder with the data set's files.")
]
DataSettings = Annotated[
    list[str] | None,
    pairs_option(
        "--data",
        WHAT,
        "A setting of the data set, such as split=val2014 or missing=skip; repeatable.",
    ),
]
Start = Annotated[
    int, typer.Option(min=0, rich_help_panel=WHAT, help="First image, in the data's order.")
]
Limit = Annotated[
    int | None,
    typer.Option(min=1, show_default="all", rich_help_panel=WHAT, help="So many images."),
]
Question = Annotated[
    str | None, typer.Option("--prompt", "-p", show_default="the data's", rich_help_panel=WHAT)
]
Threads = Annotated[
    int, typer.Option(min=0, rich_help_panel=RUN, help="Of torch on the CPU; 0: leave as it is.")
]

# -- commands --------------------------------------------------------------------------------------


@app.command()
def evaluate(
    suite: Annotated[
        list[str] | None,
        typer.Option(
            "--suite",
            "-s",
            metavar="NAME",
            rich_help_panel=WHAT,
            help="Everything that a group of tables needs, each part in a folder of its own: "
            "'papers', 'faithfulness', 'sanity', 'all', or a part; repeatable.",
        ),
    ] = None,
    plan: Annotated[
        Path | None,
        typer.Option(
            rich_help_panel=WHAT,
            help="A plan as JSON; a store's plan.json will do: the same again.",
        ),
    ] = None,
    methods: Annotated[
        list[str] | None,
        typer.Option(
            "--methods",
            "-M",
            metavar="NAMES",
            rich_help_panel=WHAT,
            help="Methods as in compare, and 'oracle', 'random', 'center_blob'.",
        ),
    ] = None,
    metrics: Annotated[
        list[str] | None,
        typer.Option(
            "--metrics",
            metavar="NAME",
            show_default="localization",
            rich_help_panel=WHAT,
            help="A metric, with settings after a colon: pointing:tolerance=5; repeatable.",
        ),
    ] = None,
    dataset: DataSet = "scenes",
    root: Root = None,
    data: DataSettings = None,
    kinds: Annotated[
        list[str] | None,
        typer.Option(
            "--words",
            "-w",
            metavar="KINDS",
            show_default="object, noun, function",
            rich_help_panel=WHAT,
            help="Kinds of words: object (named by a mask), modifier, noun, function, other.",
        ),
    ] = None,
    start: Start = 0,
    limit: Limit = None,
    prompt: Question = None,
    answer: Annotated[
        str | None,
        typer.Option(
            show_default="generated",
            rich_help_panel=WHAT,
            help="A caption to force instead: its number, or its wording ('verbose').",
        ),
    ] = None,
    model: Model = "mini",
    load: LoadSettings = None,
    regime: Regime = None,
    layer: Layer = None,
    score: Annotated[str | None, score_option("commit")] = None,
    refine: Annotated[list[str] | None, refine_option("none")] = None,
    passes: Annotated[
        int | None,
        typer.Option(
            "--budget-passes",
            min=1,
            show_default="none",
            rich_help_panel=HOW,
            help="Forward passes an image after which a method stops.",
        ),
    ] = None,
    generation: Generation = None,
    seed: Annotated[int, seed_option("Of everything that is drawn.")] = 0,
    device: Annotated[
        str | None,
        typer.Option(show_default="the process's GPU, or cpu", rich_help_panel=RUN),
    ] = None,
    dtype: Dtype = "float32",
    threads: Threads = 1,
    shard: Annotated[
        str | None,
        typer.Option(
            metavar="I/N",
            show_default="the launcher's, or all",
            rich_help_panel=RUN,
            help="Every N-th image from the I-th. The last shard to end merges them; accelerate "
            "launch and torchrun number their processes by themselves.",
        ),
    ] = None,
    errors: Annotated[
        str,
        typer.Option(
            rich_help_panel=RUN,
            help="'raise', or 'skip': an image that fails is stored with the reason.",
        ),
    ] = "raise",
    retry: Annotated[
        bool, typer.Option("--retry", rich_help_panel=RUN, help="Measure failed images again.")
    ] = False,
    output: Annotated[
        Path,
        typer.Option(
            "--output",
            "-o",
            rich_help_panel=OUT,
            help="Folder of the results; a run that was stopped goes on there.",
        ),
    ] = Path("results"),
    list_: Annotated[
        bool, typer.Option("--list", help="List suites, data sets and metrics, and stop.")
    ] = False,
    json: Json = False,
) -> None:
    """Measure methods over a data set; stopped or killed, the same command goes on.

    Examples: captum-dcam evaluate --suite papers --data count=560 --start 60 -o results;
    captum-dcam evaluate -M diffusion_cam,tam,oracle -d coco --root coco --data split=val2014
    -p "Describe this image in one sentence." --errors skip -o results
    """
    options = {name: value for name, value in locals().items() if name != "list_"}
    with clear_errors():
        from captum_dcam.cli import evaluate as evaluate_command
        from captum_dcam.cli import print_evaluate as evaluate_report

        if list_:
            evaluate_report.print_choices(evaluate_command.list_choices(), json)
            return
        with others_on_stderr():
            done = evaluate_command.run(
                evaluate_command.EvaluateOptions(**options), evaluate_report.say_part
            )
        (evaluate_report.print_json if json else evaluate_report.print_summaries)(done)


@app.command()
def table(
    names: Annotated[
        list[str] | None,
        typer.Argument(metavar="NAMES", help="Tables, or 'all' that the results allow."),
    ] = None,
    results: Annotated[
        Path,
        typer.Option("--results", "-r", help="Folder that evaluate wrote."),
    ] = Path("results"),
    output: Annotated[
        Path | None,
        typer.Option(
            "--output", "-o", show_default="none", help="Folder for NAME.md, .csv and .tex."
        ),
    ] = None,
    markdown: Annotated[
        bool, typer.Option("--markdown", help="Print Markdown, as in docs/RESULTS.md.")
    ] = False,
    list_: Annotated[bool, typer.Option("--list", help="List the tables and stop.")] = False,
) -> None:
    """Print and write the papers' tables, and ours, from stored results.

    Example: captum-dcam table comparison ablation --results results --output tables
    """
    with clear_errors():
        from captum_dcam.cli import table as table_command

        if list_ or not names:
            table_command.print_list()
            return
        table_command.run(names, results, output, markdown)


@app.command()
def calibrate(
    images: Annotated[
        Path | None,
        typer.Option(
            rich_help_panel=WHAT, help="A folder of pictures without masks, instead of a data set."
        ),
    ] = None,
    dataset: DataSet = "scenes",
    root: Root = None,
    data: DataSettings = None,
    labels: Annotated[
        bool,
        typer.Option(
            "--labels/--no-labels",
            rich_help_panel=HOW,
            help="Search for the highest F3 with the masks; else fit to the maps alone.",
        ),
    ] = False,
    words: Annotated[
        str,
        typer.Option(rich_help_panel=WHAT, help="Without labels: 'nouns' or 'all' words."),
    ] = "nouns",
    start: Start = 0,
    limit: Limit = None,
    check_start: Annotated[
        int | None,
        typer.Option(
            min=0,
            show_default="none",
            rich_help_panel=WHAT,
            help="First of other images, with masks, on which the gain is measured.",
        ),
    ] = None,
    check_limit: Annotated[
        int | None,
        typer.Option(min=1, show_default="all", rich_help_panel=WHAT, help="So many of these."),
    ] = None,
    prompt: Question = None,
    preset: Annotated[
        str, typer.Option(rich_help_panel=HOW, help="To start from: a name or a file.")
    ] = "default",
    model: Model = "mini",
    load: LoadSettings = None,
    regime: Regime = None,
    layer: Layer = None,
    generation: Generation = None,
    seed: Annotated[int, seed_option("Of sampling, cross-validation and intervals.")] = 0,
    device: Device = "cpu",
    dtype: Dtype = "float32",
    threads: Threads = 1,
    output: Annotated[
        Path, typer.Option("--output", "-o", rich_help_panel=OUT, help="The preset file.")
    ] = Path("preset.json"),
    json: Json = False,
) -> None:
    """Fit the refinements' thresholds to a model, and save them as a preset.

    Example: captum-dcam calibrate --labels --data count=1100 --limit 40 --check-start 1000
    --check-limit 100; then captum-dcam explain photo.jpg --preset preset.json
    """
    options = dict(locals())
    with clear_errors():
        from captum_dcam.cli import calibrate as calibrate_command
        from captum_dcam.cli import print_calibrate as calibrate_report

        with others_on_stderr():
            done = calibrate_command.run(calibrate_command.CalibrateOptions(**options))
        (calibrate_report.print_json if json else calibrate_report.print_calibration)(done)


def main() -> None:
    """Entry point of ``captum-dcam``."""
    app(prog_name="captum-dcam")
