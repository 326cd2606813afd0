r"""``captum-dcam evaluate``, ``table`` and ``calibrate``: what is done over data sets.

Their work is in :mod:`captum_dcam.evaluate_command`, :mod:`captum_dcam.table_command` and
:mod:`captum_dcam.calibrate_command`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from captum_dcam.cli_options import (
    HOW,
    OUT,
    WHAT,
    Device,
    Dtype,
    Generation,
    Json,
    Layer,
    LoadSettings,
    Model,
    Regime,
    clear_errors,
    others_on_stderr,
    pairs_option,
    refine_option,
    score_option,
    seed_option,
)

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
        from captum_dcam import evaluate_command, evaluate_report

        if list_:
            evaluate_report.print_choices(evaluate_command.list_choices(), json)
            return
        with others_on_stderr():
            done = evaluate_command.run(
                evaluate_command.EvaluateOptions(**options), evaluate_report.say_part
            )
        (evaluate_report.print_json if json else evaluate_report.print_summaries)(done)


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
        from captum_dcam import table_command

        if list_ or not names:
            table_command.print_list()
            return
        table_command.run(names, results, output, markdown)


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
        from captum_dcam import calibrate_command, calibrate_report

        with others_on_stderr():
            done = calibrate_command.run(calibrate_command.CalibrateOptions(**options))
        (calibrate_report.print_json if json else calibrate_report.print_calibration)(done)
