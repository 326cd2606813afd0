r"""``captum-dcam view``: the explorer of anything saved."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

from captum_dcam.cli import printing
from captum_dcam.cli.options import OUT, WHAT, Base, argument, command, open_option, option
from captum_dcam.errors import InputError

#: the file that tells what a folder holds, and where an explanation lies beside its pictures
HELD = {
    "explanation/manifest.json": "explanation",
    "manifest.json": "explanation",
    "comparison.json": "comparison",
    "plan.json": "store",
}


class Options(Base):
    """The options of ``captum-dcam view``."""

    folder: Path | None = argument(
        "FOLDER",
        "What explain, compare or evaluate wrote, or a folder of several of these.",
        show_default=False,
    )
    root: Path | None = option(
        None, WHAT, "Folder with the data set's files, for the pictures of evaluate's results."
    )
    output: Path | None = option(
        None,
        OUT,
        "The page; an earlier page is replaced, nothing else is.",
        "--output",
        "-o",
        shown="FOLDER.html",
    )
    open_: bool = open_option()
    json: bool = option(False, OUT, "Print one JSON document on stdout.", "--json")
    quiet: bool = option(
        False, OUT, "Print nothing but errors (and the document of --json).", "--quiet", "-q"
    )


@command
def view(options: Options) -> None:
    """Make a page to look at from anything saved: answers step by step, methods, worst cases.

    Examples: captum-dcam view explanation --open; captum-dcam view results --root coco
    """
    done = printing.run_and_print(options, run, document, print_page)
    if options.open_:
        printing.open_page(done.page)


@dataclass(frozen=True)
class Made:
    """A page, and what it shows."""

    page: Path
    kind: str


def run(options: Options) -> Made:
    """Make the page; whether it can be written is checked before any work."""
    from captum_dcam.viewer.explorer import check_page, write_page

    folder = options.folder
    if folder is None:
        raise InputError("which folder? Give what captum-dcam explain, compare or evaluate wrote")
    kind, home = held(folder)
    whole = folder.resolve()
    output = options.output or whole.with_name(f"{whole.name}.html")
    check_page(output)
    with printing.progress(options.quiet) as say:
        say(f"Reading {folder}")
        page = _page(kind, home, options.root, output.absolute().parent)
        return Made(write_page(page, output), kind)


def held(folder: Path) -> tuple[str, Path]:
    """What a folder holds, and where that lies."""
    for name, kind in HELD.items():
        if (folder / name).is_file():
            return kind, (folder / name).parent
    if folder.is_dir() and _several(folder):
        return "folder", folder
    raise InputError(
        f"{folder} holds nothing that can be shown: give a folder that captum-dcam explain, "
        "compare or evaluate wrote, or one that holds several of these"
    )


def _several(folder: Path) -> list[Path]:
    """The folders in a folder that hold a result."""
    inside = sorted(p for p in folder.iterdir() if p.is_dir())
    return [p for p in inside if any((p / name).is_file() for name in HELD)]


def _page(kind: str, home: Path, root: Path | None, place: Path) -> str:
    """The page of what a folder holds; ``place`` is where it will lie."""
    from captum_dcam.results.comparison import Comparison
    from captum_dcam.results.explanation import Explanation
    from captum_dcam.viewer.explorer import explorer_page

    if kind == "explanation":
        return explorer_page(Explanation.load(home))
    if kind == "comparison":
        return explorer_page(Comparison.load(home))
    if kind == "store":
        from captum_dcam.evaluation.browse import store_page

        return store_page(home, root)
    return folder_page(home, place)


def folder_page(folder: Path, place: Path) -> str:
    """An index of the results in a folder, with a link to the page of each that has one."""
    from captum_dcam.viewer.explorer_index import Case, index_page

    cases = [_result(Case, one, place) for one in _several(folder)]
    how = "Every result in this folder, sorted by the mean of a score over its words."
    return index_page(f"{folder.resolve().name}: {len(cases)} results", cases, how=how, first="F3")


def _result(case: Any, one: Path, place: Path) -> Any:
    """A saved result as a case of an index."""
    from captum_dcam.results.comparison import Comparison
    from captum_dcam.results.explanation import Explanation
    from captum_dcam.viewer.explorer_document import explorer_document

    kind, home = held(one)
    page = one / "index.html"
    where = {
        "link": quote(Path(os.path.relpath(page, place)).as_posix()) if page.is_file() else None,
        "command": None if page.is_file() else f"captum-dcam view {one} --open",
    }
    if kind == "store":
        return case(name=one.name, answer="results of evaluate", **where)
    result: Any = (Explanation if kind == "explanation" else Comparison).load(home)
    found = explorer_document(result)
    names = {m["name"]: m["scores"] for m in found["methods"] if m["scores"]}
    columns = {
        name: {key: [own.get(key) for own in scores] for own in scores for key in own}
        for name, scores in names.items()
    }
    words = [
        {"text": w["text"], "commit": max(w["commits"]), "probability": w["probability"]}
        for w in found["words"]
    ]
    return case(
        name=one.name,
        image=result.images[0],
        prompt=result.prompt,
        answer=result.answer,
        words=tuple(words),
        scores=columns,
        **where,
    )


def print_page(made: Made) -> None:
    """Print where the page is."""
    printing.print_facts(printing.output_console(), {"Page": str(made.page)})


def document(made: Made) -> dict[str, Any]:
    """The page as plain data."""
    return {"page": str(made.page), "kind": made.kind}
