r"""How many faults do the tests see? Draw changes of the code by a seed, and run the tests on each.

``python benchmarks/mutants.py map`` runs the suite once and notes which test runs which line
(``--folder runs/mutants``; an hour under coverage). ``python benchmarks/mutants.py run --seed 1
--count 200`` draws changes from the rooms in ``ROOMS`` and runs, for each, the tests that reach the
changed line, until one fails; it can be ended and called again. ``python benchmarks/mutants.py
table`` prints what came of them, survivors with their change. Needs ``pip install mutmut
coverage``: mutmut's operators make the changes (an argument left out or None, a sign, a comparison,
a constant plus one, True for False, …), as many in each room. Raised errors are left alone.
"""

from __future__ import annotations

import difflib
import json
import os
import random
import resource
import sys
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.machinery import SourceFileLoader
from pathlib import Path
from typing import Annotated, Any

import libcst as cst
import typer
from coverage import Coverage, CoverageData
from libcst.metadata import MetadataWrapper, PositionProvider
from mutmut.mutation.mutators import mutation_operators, operator_assignment, operator_string

ROOT = Path(__file__).resolve().parents[1]
#: rooms and what belongs to each
ROOMS = {
    "core": ("model", "refine", "maps.py", "presets.py", "explaining.py", "attribution.py"),
    "compare": ("comparing.py", "results"),
    "evaluation": ("evaluation", "faithfulness", "metrics"),
    "methods": ("methods",),
}
#: seconds of processor time for the tests of one change: an endless loop is a fault that is seen
LIMIT = 1800

#: left out: texts, which tests seldom fix to the letter, and ``name = None``, which every test sees
OPERATORS = [
    (kind, operator)
    for kind, operator in mutation_operators
    if operator not in (operator_string, operator_assignment)
]

app = typer.Typer(add_completion=False)
Folder = Annotated[Path, typer.Option(help="Where the map and the results lie.")]


def at_root() -> None:
    """Where pytest is started: this folder's modules are not those that tests import."""
    os.chdir(ROOT)
    sys.path[:] = [str(ROOT), *(p for p in sys.path if Path(p).resolve() != ROOT / "benchmarks")]


# -- which test runs which line --------------------------------------------------------------------


class Contexts:
    """A pytest plugin: what runs from a test's setup to its end belongs to that test."""

    def __init__(self, coverage: Coverage) -> None:
        self.coverage, self.seconds = coverage, dict[str, float]()

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        self.coverage.switch_context(nodeid)

    def pytest_runtest_logreport(self, report: Any) -> None:
        self.seconds[report.nodeid] = self.seconds.get(report.nodeid, 0) + report.duration


@app.command("map")
def run_map(
    tests: Annotated[list[str] | None, typer.Argument(help="For pytest. Default: all.")] = None,
    folder: Folder = Path("runs/mutants"),
) -> None:
    """Run the suite once, and note which test runs which line."""
    import pytest

    folder.mkdir(parents=True, exist_ok=True)
    folder = folder.resolve()
    at_root()
    coverage = Coverage(data_file=folder / "lines", include=["captum_dcam/*", "adapters/*"])
    contexts = Contexts(coverage)
    coverage.start()
    options = ["-q", "-p", "no:xdist", "-p", "no:cacheprovider"]
    code = pytest.main([*options, *(tests or [])], plugins=[contexts])
    coverage.stop()
    coverage.save()
    (folder / "seconds.json").write_text(json.dumps(contexts.seconds), encoding="utf-8")
    if code:
        raise typer.Exit(code)


class Map:
    """Which tests reach a line: those that ran it, then the rest of their files.

    A generation that several tests share is made by the first of them, so the others reach its
    lines without running them.
    """

    def __init__(self, folder: Path) -> None:
        data = CoverageData(str(folder / "lines"))
        data.read()
        self.data = data
        self.seconds: dict[str, float] = json.loads((folder / "seconds.json").read_text())
        self.files: dict[str, list[str]] = defaultdict(list)
        for test in self.seconds:
            self.files[test.partition("::")[0]].append(test)

    def tests(self, file: Path, lines: range) -> list[str]:
        """Tests, quick ones first; none where nothing runs the lines."""
        reached = self.data.contexts_by_lineno(str(file.resolve()))
        ran = {test for line in lines for test in reached.get(line, ()) if test}
        if not ran:  # run when the file is imported, such as a default: whoever runs the file
            ran = {test for tests in reached.values() for test in tests if test}
        of_files = {t for f in {t.partition("::")[0] for t in ran} for t in self.files[f]}
        return [
            *sorted(ran, key=self.seconds.__getitem__),
            *sorted(of_files - ran, key=self.seconds.__getitem__),
        ]


# -- changes ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Change:
    """One changed node of a file, by the first and last line of what is run with it."""

    file: Path
    lines: range
    code: str

    def diff(self) -> str:
        """Removed and added lines, without context."""
        pair = self.file.read_text(encoding="utf-8"), self.code
        lines = list(difflib.unified_diff(*(text.splitlines() for text in pair), n=0, lineterm=""))
        return "\n".join(line for line in lines[2:] if not line.startswith("@@"))


class Nodes(cst.CSTVisitor):
    """Collects nodes of functions that a change can meet, and what they may become."""

    METADATA_DEPENDENCIES = (PositionProvider,)

    def __init__(self) -> None:
        self.found: list[tuple[cst.CSTNode, cst.CSTNode, range]] = []
        self.depth = 0

    def on_visit(self, node: cst.CSTNode) -> bool:
        if isinstance(node, (cst.Raise, cst.Annotation, cst.Decorator, cst.FormattedString)):
            return False
        if isinstance(node, cst.FunctionDef):
            self.depth += 1
        elif self.depth:
            position = self.get_metadata(PositionProvider, node, None)
            for kind, operator in OPERATORS:
                if position and isinstance(node, kind):
                    lines = range(position.start.line, position.end.line + 1)
                    self.found += [(node, new, lines) for new in operator(node)]
        return True

    def on_leave(self, original_node: cst.CSTNode) -> None:
        self.depth -= isinstance(original_node, cst.FunctionDef)


def changes(file: Path) -> Iterator[tuple[cst.Module, cst.CSTNode, cst.CSTNode, range]]:
    """Everything that could be changed in a file."""
    wrapper = MetadataWrapper(cst.parse_module(file.read_text(encoding="utf-8")))
    nodes = Nodes()
    wrapper.visit(nodes)
    for old, new, lines in nodes.found:
        yield wrapper.module, old, new, lines


def draw(rooms: list[str], count: int, seed: int) -> list[tuple[str, Change]]:
    """``count`` changes, as many of each room, drawn from all that its files could have."""
    drawn: list[tuple[str, Change]] = []
    for number, room in enumerate(rooms):
        every = []
        for part in ROOMS[room]:
            path = ROOT / "captum_dcam" / part
            files = sorted(path.rglob("*.py")) if path.is_dir() else [path]
            every += [(file, *found) for file in files for found in changes(file)]
        random.Random(seed).shuffle(every)
        share = (count - len(drawn)) // (len(rooms) - number)
        drawn += [(room, change) for change in _distinct(every, share)]
    return drawn


def _distinct(every: list[Any], count: int) -> Iterator[Change]:
    """The first that compile and change anything, one per line of code."""
    places = set()
    for file, module, old, new, lines in every:
        if len(places) == count:
            return
        code = module.deep_replace(old, new).code
        if (file, lines.start) in places or code == module.code:
            continue
        try:
            compile(code, str(file), "exec")
        except SyntaxError:
            continue
        places.add((file, lines.start))
        yield Change(file, lines, code)


# -- the tests of a change -------------------------------------------------------------------------


def survives(change: Change, tests: list[str], log: Path) -> bool:
    """Whether all tests pass with the change; runs in a process of its own."""
    child = os.fork()
    if child:
        return os.waitpid(child, 0)[1] == 0
    out = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(out, 1)
    os.dup2(out, 2)
    resource.setrlimit(resource.RLIMIT_CPU, (LIMIT, LIMIT))
    read = SourceFileLoader.get_data
    target = str(change.file)

    def get_data(loader: SourceFileLoader, path: str) -> bytes:
        if os.path.realpath(path) == target:
            return change.code.encode()
        if path.endswith(".pyc") and change.file.stem in path:
            raise OSError  # not the compiled file of what was there before
        return read(loader, path)

    SourceFileLoader.get_data = get_data  # type: ignore[method-assign]
    SourceFileLoader.set_data = lambda *_, **__: None  # type: ignore[method-assign]
    import pytest

    options = ["-x", "-q", "-p", "no:xdist", "-p", "no:cacheprovider", "--no-header"]
    code = 1
    try:
        code = int(pytest.main([*options, *tests]))
    finally:
        sys.stdout.flush()
        os._exit(code)
    return False


def work(todo: list[int], drawn: list[tuple[str, Change]], folder: Path, seed: int) -> None:
    """Run the changes of these numbers, and note what came of each."""
    known = Map(folder)
    for number in todo:
        room, change = drawn[number]
        tests = known.tests(change.file, change.lines)
        stem = folder / f"seed{seed}-{number}"
        lives = not tests or survives(change, tests, stem.with_suffix(".log"))
        record = {
            "room": room,
            "file": str(change.file.relative_to(ROOT)),
            "line": change.lines.start,
            "change": change.diff(),
            "tests": len(tests),
            "lives": lives,
        }
        stem.with_suffix(".json").write_text(json.dumps(record), encoding="utf-8")


@app.command()
def run(
    seed: Annotated[int, typer.Option(help="Of the draw.")],
    count: Annotated[int, typer.Option(help="Number of changes.")] = 200,
    rooms: Annotated[list[str] | None, typer.Option(help="Default: all of ROOMS.")] = None,
    jobs: Annotated[int, typer.Option(help="Processes at once.")] = 2,
    folder: Folder = Path("runs/mutants"),
) -> None:
    """Draw changes and run the tests that reach each; those that are done are not run again."""
    import hypothesis  # noqa: F401  what every test needs, once for all processes
    import torch
    import transformers  # noqa: F401

    torch.set_num_threads(1)
    folder = folder.resolve()
    at_root()
    drawn = draw(rooms or list(ROOMS), count, seed)
    done = {n for n in range(len(drawn)) if (folder / f"seed{seed}-{n}.json").is_file()}
    todo = [n for n in range(len(drawn)) if n not in done]
    print(f"seed {seed}: {len(drawn)} changes, {len(done)} of them done", flush=True)
    children = []
    for job in range(jobs):
        if not (child := os.fork()):
            work(todo[job::jobs], drawn, folder, seed)
            os._exit(0)
        children.append(child)
    failed = [child for child in children if os.waitpid(child, 0)[1]]
    if failed:
        raise typer.Exit(1)
    table(seed, folder)


@app.command()
def table(
    seed: Annotated[int, typer.Option(help="Of the draw.")],
    folder: Folder = Path("runs/mutants"),
) -> None:
    """How many changes the tests saw, by room, and those that they did not."""
    found = sorted(folder.glob(f"seed{seed}-*.json"), key=lambda p: int(p.stem.split("-")[1]))
    records = [json.loads(path.read_text(encoding="utf-8")) for path in found]
    for room in ROOMS:
        of = [r for r in records if r["room"] == room]
        seen = sum(not r["lives"] for r in of)
        if of:
            print(f"{room}: {seen} of {len(of)} seen ({seen / len(of):.0%})")
    seen = sum(not r["lives"] for r in records)
    print(f"all: {seen} of {len(records)} seen ({seen / max(1, len(records)):.0%}), seed {seed}")
    for record in records:
        if record["lives"]:
            print(f"\n{record['file']}:{record['line']} ({record['tests']} tests)")
            print(record["change"])


if __name__ == "__main__":
    app()
