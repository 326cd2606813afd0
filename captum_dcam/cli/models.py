r"""``captum-dcam models``: the model families, and what each can do."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rich.text import Text

from captum_dcam.cli.options import Base, argument, command, option
from captum_dcam.cli.printing import figure, output_console, print_json, print_plain, table_of


class Options(Base):
    """The options of ``captum-dcam models``."""

    names: list[str] | None = argument(
        "NAMES",
        "Families whose needs and notes are shown. Without one, all are listed: {families}.",
        "families",
    )
    json: bool = option(False, None, "Print JSON on stdout.", "--json")


@command
def models(options: Options) -> None:
    """List the model families: caches, blocks, and which of them can be explained.

    Example: captum-dcam models lavida llada_v
    """
    from captum_dcam.model.families import list_models

    found = [r for r in list_models() if not options.names or r["family"] in options.names]
    if options.json:
        print_json(found)
        return
    print_models(found)
    print_notes([r for r in found if options.names or r["error"] is not None])
    if not options.names:
        print_plain("captum-dcam models NAME says what a family needs, and what surprises in it.")


def families() -> tuple[str, ...]:
    """The names of all families."""
    from captum_dcam.model.families import list_models

    return tuple(record["family"] for record in list_models())


def sources() -> tuple[str, ...]:
    """What ``--model`` takes beside a folder: families and the checkpoints they know."""
    from captum_dcam.model.families import list_models

    found = list_models()
    names = [c["name"] for record in found for c in record["checkpoints"]]
    return tuple(dict.fromkeys([*(record["family"] for record in found), *filter(None, names)]))


def print_models(records: Sequence[dict[str, Any]]) -> None:
    """Print one line per checkpoint."""
    table = table_of("Family", "Checkpoint", "Caches", "Blocks", "Deepest", "Default")
    for r in records:
        for number, c in enumerate(r["checkpoints"] or [r | {"name": r["class"]}]):
            depths = (c["blocks"], c["deepest_usable_block"], c["recommended_block"])
            family, caches = ("", "") if number else (r["family"], ", ".join(r["caches"]))
            table.add_row(family, c["name"], caches, *(figure(d, 0) for d in depths))
    console = output_console()
    console.print(table)
    console.print(
        "Blocks count from 0. Deepest: the last one with a path from the image to the answer. "
        "Default: the one explained when --layer is not given.\n",
        style="dim",
    )


def print_notes(records: Sequence[dict[str, Any]]) -> None:
    """Print what each family needs, and what surprises in it."""
    console = output_console()
    for r in records:
        console.print(Text(r["family"], "bold"), Text(r["class"].rpartition(".")[2], "dim"))
        for line in _lines(r):
            console.print(Text(f"  {line}"))


def _lines(record: dict[str, Any]) -> list[str]:
    """What a user must know of a family, line by line."""
    if record["error"] is not None:
        return list(record["notes"])
    calls = [f"{cache}: {text}" for cache, text in record["feasible"].items()]
    lines = [f"Image seen by {'; '.join(calls)}"]
    takes = ("batches", "several_images", "video")
    names = [name.replace("_", " ") for name in takes if record[name]]
    lines.append(f"Takes {', '.join(names) or 'one image, one example'}")
    lines.append(f"Needs transformers{record['transformers']}")
    if record["package"]:
        state = "installed" if record["installed"] else "not installed"
        lines.append(f"Needs the authors' package {record['package']} ({state})")
    if record["install"]:
        lines.append(f"Install: {record['install']}")
    if record["remote_code"]:
        lines.append("Needs trust_remote_code=True: the checkpoints hold the model's code")
    for name, settings in record["decodings"].items():
        lines.append(f"--decoding {name}: {', '.join(f'{n}={v}' for n, v in settings.items())}")
    return [*lines, *(f"Note: {note}" for note in record["notes"])]
