r"""The command line: ``captum-dcam explain``, ``compare``, ``models``.

Heavy packages are imported inside the commands, so that ``--help`` and ``--version`` are quick.
Exit codes: 0 done; 2 usage or bad input, with one line that says what; 1 an error of the program.
"""

from __future__ import annotations

import json as jsonlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer

PROMPT = "describe the image ."

app = typer.Typer(
    name="captum-dcam",
    help="Which image regions made a masked-diffusion multimodal LLM write which words.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


class UsageError(ValueError):
    """Options that do not go together, or a value that no option knows."""


@contextmanager
def clear_errors() -> Iterator[None]:
    """Turn errors that the user can mend into one line on stderr and exit code 2."""
    from safetensors import SafetensorError

    from captum_dcam.errors import UnknownNameError

    try:
        yield
    except (ValueError, OSError, UnknownNameError, SafetensorError) as error:
        text = str(error)
        if isinstance(error, OSError) and error.strerror:
            text = f"{error.filename or 'file'}: {error.strerror}"
        typer.secho("Error: ", fg="red", bold=True, err=True, nl=False)
        typer.echo(" ".join(text.splitlines()), err=True)
        raise typer.Exit(2) from error


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


# Groups of options in the help.
WHAT, HOW, DECODE, OUT = "What to explain", "How to explain", "Generation", "Output"

# -- options of several commands -----------------------------------------------------------------

ImageFile = Annotated[
    Path | None,
    typer.Argument(
        metavar="IMAGE",
        show_default=False,
        help="A picture file. Without one, a held-out scene of the embedded data is drawn, and "
        "the maps are scored against its masks.",
    ),
]
Prompt = Annotated[str, typer.Option("--prompt", "-p", help="The question.", rich_help_panel=WHAT)]
WORDS = "'all', 'nouns', or a word or phrase of the answer ('red circle'); repeatable."
Scene = Annotated[
    int | None,
    typer.Option(
        min=0,
        show_default="12",
        rich_help_panel=WHAT,
        help="Which held-out scene to draw when no IMAGE is given.",
    ),
]
Model = Annotated[
    str, typer.Option("--model", "-m", rich_help_panel=HOW, help="A family ('mini') or a folder.")
]
Regime = Annotated[
    str | None,
    typer.Option(
        show_default="the family's",
        rich_help_panel=HOW,
        help="'prefix' (image and prompt computed once) or 'full' (at every step).",
    ),
]
Layer = Annotated[
    int | None,
    typer.Option(
        show_default="recommended",
        rich_help_panel=HOW,
        help="Block to read, from 0; negative counts from the end.",
    ),
]
SCORE = "State whose logits are read: 'commit', 'final' or 'teacher'."
REFINE = (
    "Refinement of the maps, in order; repeatable: adaptive_median, akd, cba, dacg, gaussian, "
    "median, min_max, rank_gaussian, sicd, or 'none'."
)
GenLength = Annotated[
    int | None,
    typer.Option(show_default="the family's", rich_help_panel=DECODE, help="Answer length."),
]
Steps = Annotated[
    int | None,
    typer.Option(show_default="the family's", rich_help_panel=DECODE, help="Denoising steps."),
]
BlockLength = Annotated[
    int | None,
    typer.Option(
        show_default="the family's",
        rich_help_panel=DECODE,
        help="Tokens of a semi-autoregressive block.",
    ),
]
Temperature = Annotated[
    float | None,
    typer.Option(min=0, show_default="greedy", rich_help_panel=DECODE, help="Of sampling."),
]
Device = Annotated[
    str, typer.Option(rich_help_panel=DECODE, help="'cpu', 'cuda', 'cuda:1', 'mps'.")
]
Dtype = Annotated[
    str, typer.Option(rich_help_panel=DECODE, help="'float32', 'bfloat16' or 'float16'.")
]
Json = Annotated[
    bool, typer.Option("--json", rich_help_panel=OUT, help="Print one JSON document on stdout.")
]


def _words(default: str) -> Any:
    return typer.Option(
        "--words", "-w", metavar="WORDS", show_default=default, rich_help_panel=WHAT, help=WORDS
    )


def _score(default: str) -> Any:
    return typer.Option(show_default=default, rich_help_panel=HOW, help=SCORE)


def _refine(default: str) -> Any:
    return typer.Option(metavar="NAME", show_default=default, rich_help_panel=HOW, help=REFINE)


def _seed(purpose: str) -> Any:
    return typer.Option(rich_help_panel=DECODE, help=purpose)


def _output(holds: str) -> Any:
    text = f"Folder for {holds}; an earlier output is replaced, nothing else is."
    return typer.Option("--output", "-o", rich_help_panel=OUT, help=text)


# -- commands ------------------------------------------------------------------------------------


@app.command()
def explain(
    image: ImageFile = None,
    prompt: Prompt = PROMPT,
    words: Annotated[list[str] | None, _words("all")] = None,
    scene: Scene = None,
    model: Model = "mini",
    regime: Regime = None,
    layer: Layer = None,
    preset: Annotated[
        str,
        typer.Option(rich_help_panel=HOW, help="'default', 'paper' or 'base'."),
    ] = "default",
    score: Annotated[str | None, _score("the preset's")] = None,
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
    refine: Annotated[list[str] | None, _refine("the preset's")] = None,
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
    seed: Annotated[int, _seed("Of sampling and of the sign check.")] = 0,
    device: Device = "cpu",
    dtype: Dtype = "float32",
    output: Annotated[Path, _output("a picture of every word, sheet.png and the data")] = Path(
        "explanation"
    ),
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

        result = run(Options(**options))
        (print_json if json else print_report)(result)


@app.command()
def compare(
    image: ImageFile = None,
    prompt: Prompt = PROMPT,
    words: Annotated[list[str] | None, _words("nouns")] = None,
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
    regime: Regime = None,
    layer: Layer = None,
    score: Annotated[str | None, _score("commit")] = None,
    refine: Annotated[list[str] | None, _refine("none")] = None,
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
    seed: Annotated[int, _seed("Of sampling and of methods that draw.")] = 0,
    device: Device = "cpu",
    dtype: Dtype = "float32",
    output: Annotated[Path, _output("panel.png, the figures (.json, .csv) and the maps")] = Path(
        "comparison"
    ),
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


def main() -> None:
    """Entry point of ``captum-dcam``."""
    app(prog_name="captum-dcam")
