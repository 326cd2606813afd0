r"""``captum-dcam doctor``: can what this model shows be believed?"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import typer
from rich.text import Text

from captum_dcam.cli import parsing, printing
from captum_dcam.cli.options import NAMES, WHAT, Written, argument, command, option, output_option

if TYPE_CHECKING:
    from captum_dcam.doctor import Report

#: colours of the verdicts
COLOURS = {"ok": "green", "look": "yellow", "stop": "bold red", "not judged": "dim"}
#: exit code of a report that says stop
STOPPED = 3


class Options(Written):
    """The options of ``captum-dcam doctor``."""

    model: str = argument(
        "MODEL",
        "A family or a checkpoint ({models}), a folder, or another name on the hub.",
        value="mini",
        autocompletion=NAMES["models"].complete,
    )
    image: Path | None = option(
        None, WHAT, "An image file; a photograph says most.", "--image", "-i", shown="a drawn scene"
    )
    prompt: str = option("describe the image .", WHAT, "The question.", "--prompt", "-p")
    output: Path = output_option("doctor.json", "The report, to attach to a bug report.")


@command
def doctor(options: Options) -> None:
    """Look at a model before its maps are believed: one line per check, and what to do next.

    Exit code 3 where a line says stop. Example: captum-dcam doctor GSAI-ML/LLaDA-V -i photo.jpg
    """
    report = printing.run_and_print(options, run, document, print_report)
    if report.verdict == "stop":
        raise typer.Exit(STOPPED)


def document(report: Report) -> dict[str, object]:
    """The report as plain data."""
    return report.record()


def run(options: Options) -> Report:
    """Check what can be checked before any work, then judge and write."""
    from captum_dcam.doctor import doctor
    from captum_dcam.doctor.report import check_place
    from captum_dcam.model.hub import check_device

    device, place = check_device(options.device), check_place(options.output)
    parsing.setting_pairs("--load", options.load)
    parsing.generator(options.seed)
    with printing.progress(options.quiet) as say:
        say("Loading the model")
        report = doctor(
            lambda: parsing.load_chosen(options, device),
            options.image,
            options.prompt,
            layer=options.layer,
            seed=options.seed,
            progress=lambda name: say(f"Judging: {name}"),
            **parsing.decoding(options),
        )
    report.save(place)
    return report


def print_report(report: Report) -> None:
    """Print one line per check, with the next step below what is not fine."""
    console = printing.output_console()
    facts = {"Model": report.model, "Prompt": report.prompt, "Answer": report.answer}
    printing.print_facts(console, facts)
    table = printing.table_of("Check", "Verdict", "Found", whole=True)
    for name, line in report.lines.items():
        found = Text(line.found)
        if line.step:
            found.append(f"\n→ {line.step}", style="bold")
        table.add_row(Text(name), Text(line.verdict, COLOURS[line.verdict]), found)
    console.print(table)
    counts = ", ".join(f"{len(report.of(v))} {v}" for v in COLOURS if report.of(v))
    console.print(f"{counts}. docs/FIRST_HOUR.md says what to do, and what to send with a bug.")
