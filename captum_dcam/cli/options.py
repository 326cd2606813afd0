r"""Options that several commands have, and how their errors are shown."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from typing import Annotated, Any

import typer

PROMPT = "describe the image ."


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


@contextmanager
def others_on_stderr() -> Iterator[None]:
    """Stdout is the command's: what a model's own code prints goes to stderr."""
    with redirect_stdout(sys.stderr):
        yield


# Groups of options in the help.
WHAT, HOW, DECODE, OUT = "What to explain", "How to explain", "Generation", "Output"


def pairs_option(name: str, panel: str, text: str) -> Any:
    return typer.Option(name, metavar="NAME=VALUE", rich_help_panel=panel, help=text)


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
    str,
    typer.Option(
        "--model", "-m", rich_help_panel=HOW, help="'mini', a folder, or a name on the hub."
    ),
]
LoadSettings = Annotated[
    list[str] | None,
    pairs_option(
        "--load",
        HOW,
        "A setting of loading, such as trust_remote_code=true, device_map=auto, revision=main, "
        "family=lavida or one of the family's; repeatable.",
    ),
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
BatchSize = Annotated[
    int | None,
    typer.Option(
        "--internal-batch-size",
        min=1,
        show_default="16, or 4 in the full regime",
        rich_help_panel=HOW,
        help="Words differentiated at once: fewer need less memory.",
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
Generation = Annotated[
    list[str] | None,
    pairs_option(
        "--generation", DECODE, "A decoding setting of the family, such as steps=32; repeatable."
    ),
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


def words_option(default: str) -> Any:
    return typer.Option(
        "--words", "-w", metavar="WORDS", show_default=default, rich_help_panel=WHAT, help=WORDS
    )


def score_option(default: str) -> Any:
    return typer.Option(show_default=default, rich_help_panel=HOW, help=SCORE)


def refine_option(default: str) -> Any:
    return typer.Option(metavar="NAME", show_default=default, rich_help_panel=HOW, help=REFINE)


def seed_option(purpose: str) -> Any:
    return typer.Option(rich_help_panel=DECODE, help=purpose)


def output_option(holds: str) -> Any:
    text = f"Folder for {holds}; an earlier output is replaced, nothing else is."
    return typer.Option("--output", "-o", rich_help_panel=OUT, help=text)
