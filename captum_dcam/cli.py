r"""The command line: ``captum-dcam explain``, ``compare``, and commands over data sets.

Heavy packages are imported inside the commands, so that ``--help`` and ``--version`` are quick.
Exit codes: 0 done; 2 usage or bad input, with one line that says what; 1 an error of the program.
"""

from __future__ import annotations

import json as jsonlib
from pathlib import Path
from typing import Annotated, Any

import typer

from captum_dcam import cli_evaluation
from captum_dcam.cli_options import (
    HOW,
    OUT,
    PROMPT,
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
        from captum_dcam.command import Options, run
        from captum_dcam.report import print_json, print_report

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
        from captum_dcam import compare_command, compare_report

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
        from captum_dcam.command import list_models
        from captum_dcam.report import print_models

        found: list[dict[str, Any]] = list_models()
        if json:
            typer.echo(jsonlib.dumps(found, indent=1, ensure_ascii=False))
        else:
            print_models(found)


app.command()(cli_evaluation.evaluate)
app.command()(cli_evaluation.table)
app.command()(cli_evaluation.calibrate)


def main() -> None:
    """Entry point of ``captum-dcam``."""
    app(prog_name="captum-dcam")
