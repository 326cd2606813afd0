r"""The command line: ``captum-dcam explain``, ``captum-dcam models``.

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


@app.command()
def explain(
    image: Annotated[
        Path | None,
        typer.Argument(
            metavar="IMAGE",
            show_default=False,
            help="A picture file. Without one, a held-out scene of the embedded data is drawn, and "
            "the maps are scored against its masks.",
        ),
    ] = None,
    prompt: Annotated[
        str, typer.Option("--prompt", "-p", help="The question.", rich_help_panel=WHAT)
    ] = PROMPT,
    words: Annotated[
        list[str] | None,
        typer.Option(
            "--words",
            "-w",
            metavar="WORDS",
            show_default="all",
            rich_help_panel=WHAT,
            help="'all', 'nouns', or a word or phrase of the answer ('red circle'); repeatable.",
        ),
    ] = None,
    scene: Annotated[
        int | None,
        typer.Option(
            min=0,
            show_default="12",
            rich_help_panel=WHAT,
            help="Which held-out scene to draw when no IMAGE is given.",
        ),
    ] = None,
    model: Annotated[
        str,
        typer.Option("--model", "-m", rich_help_panel=HOW, help="A family ('mini') or a folder."),
    ] = "mini",
    regime: Annotated[
        str | None,
        typer.Option(
            show_default="the family's",
            rich_help_panel=HOW,
            help="'prefix' (image and prompt computed once) or 'full' (at every step).",
        ),
    ] = None,
    layer: Annotated[
        int | None,
        typer.Option(
            show_default="recommended",
            rich_help_panel=HOW,
            help="Block to read, from 0; negative counts from the end.",
        ),
    ] = None,
    preset: Annotated[
        str,
        typer.Option(rich_help_panel=HOW, help="'default', 'paper' or 'base'."),
    ] = "default",
    score: Annotated[
        str | None,
        typer.Option(
            show_default="the preset's",
            rich_help_panel=HOW,
            help="State whose logits are read: 'commit', 'final' or 'teacher'.",
        ),
    ] = None,
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
    refine: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME",
            show_default="the preset's",
            rich_help_panel=HOW,
            help="Refinement of the maps, in order; repeatable: akd, cba, dacg, gaussian, median, "
            "min_max, rank_gaussian, sicd, or 'none'.",
        ),
    ] = None,
    check_sign: Annotated[
        bool,
        typer.Option(
            "--check-sign",
            rich_help_panel=HOW,
            help="Remove what every map highlights and see whether the word becomes less likely.",
        ),
    ] = False,
    gen_length: Annotated[
        int | None,
        typer.Option(show_default="the family's", rich_help_panel=DECODE, help="Answer length."),
    ] = None,
    steps: Annotated[
        int | None,
        typer.Option(show_default="the family's", rich_help_panel=DECODE, help="Denoising steps."),
    ] = None,
    block_length: Annotated[
        int | None,
        typer.Option(
            show_default="the family's",
            rich_help_panel=DECODE,
            help="Tokens of a semi-autoregressive block.",
        ),
    ] = None,
    temperature: Annotated[
        float | None,
        typer.Option(min=0, show_default="greedy", rich_help_panel=DECODE, help="Of sampling."),
    ] = None,
    seed: Annotated[
        int, typer.Option(rich_help_panel=DECODE, help="Of sampling and of the sign check.")
    ] = 0,
    device: Annotated[
        str, typer.Option(rich_help_panel=DECODE, help="'cpu', 'cuda', 'cuda:1', 'mps'.")
    ] = "cpu",
    dtype: Annotated[
        str, typer.Option(rich_help_panel=DECODE, help="'float32', 'bfloat16' or 'float16'.")
    ] = "float32",
    output: Annotated[
        Path,
        typer.Option(
            "--output",
            "-o",
            rich_help_panel=OUT,
            help="Folder for a picture of every word, sheet.png and the data; an earlier output "
            "is replaced, nothing else is.",
        ),
    ] = Path("explanation"),
    json: Annotated[
        bool,
        typer.Option("--json", rich_help_panel=OUT, help="Print one JSON document on stdout."),
    ] = False,
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
