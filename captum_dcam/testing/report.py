"""All checks of a case as one row of the conformance table, and files that hold the table."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import transformers

from captum_dcam.errors import InputError, SavedError
from captum_dcam.files import reading, write_json
from captum_dcam.testing.case import AdapterCase
from captum_dcam.testing.gradients import check_feasible, check_gradient
from captum_dcam.testing.head import check_head
from captum_dcam.testing.inputs import check_inputs
from captum_dcam.testing.placing import check_layout
from captum_dcam.testing.replay import check_replay
from captum_dcam.testing.residue import check_nothing_left

#: the checks by name, in the order of the table's columns; each returns what it found
CHECKS: dict[str, Callable[[AdapterCase], str]] = {
    "replay": check_replay,
    "gradient": check_gradient,
    "feasible": check_feasible,
    "layout": check_layout,
    "inputs": check_inputs,
    "nothing left": check_nothing_left,
    "head": check_head,
}
#: what stands in the cell of a check that did not exist when the row was made
NOT_RUN = "–"
#: what stands around the table in a document
BEGIN, END = "<!-- conformance table: begin -->", "<!-- conformance table: end -->"


@dataclass(frozen=True)
class Outcome:
    """Result of one check: what it found, or the error that it raised."""

    check: str
    passed: bool
    detail: str


@dataclass(frozen=True)
class ConformanceRow:
    r"""A row of the table.

    Args:
        name (str): family and mode.
        code (str): whose code the model is.
        outcomes (tuple of Outcome): of all checks that there were, in order.
        versions (str): of torch and transformers.
        command (str, optional): that ran the checks.
    """

    name: str
    code: str
    outcomes: tuple[Outcome, ...]
    versions: str
    command: str = ""

    @property
    def passed(self) -> bool:
        """Whether every check that was run passed."""
        return all(o.passed for o in self.outcomes)


def check_all(case: AdapterCase) -> ConformanceRow:
    """Run all checks; an error of one does not keep the others from running."""
    outcomes = []
    for name, check in CHECKS.items():
        try:
            outcomes.append(Outcome(name, True, check(case)))
        except Exception as error:  # noqa: BLE001  whatever an adapter raises is its result
            outcomes.append(Outcome(name, False, f"{type(error).__name__}: {error}"))
    versions = f"torch {torch.__version__}, transformers {transformers.__version__}"
    return ConformanceRow(case.name, case.source, tuple(outcomes), versions)


def markdown(rows: Sequence[ConformanceRow]) -> str:
    """The table in Markdown, failures in words below it; "–" where a row is older than a check."""
    head = ["Family and mode", "Code", *CHECKS]
    lines, failures = [_line(head), _line(["---"] * len(head))], [""]
    for row in rows:
        found = {o.check: o.detail if o.passed else "**fails**" for o in row.outcomes}
        cells = [found.get(check, NOT_RUN) for check in CHECKS]
        lines.append(_line([row.name, row.code, *cells]))
        failures += [f"- {row.name}, {o.check}: {o.detail}" for o in row.outcomes if not o.passed]
    return "\n".join([*lines, *(failures if len(failures) > 1 else [])])


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(c.replace('|', chr(0x2223)) for c in cells)} |"


def read_rows(path: Path) -> list[ConformanceRow]:
    """Rows of a file; none where there is no file."""
    if not path.exists():
        return []
    try:
        with reading(path):
            records = json.loads(path.read_bytes().decode())
        outcomes = [tuple(Outcome(**o) for o in r["outcomes"]) for r in records]
        both = zip(records, outcomes, strict=True)
        return [ConformanceRow(**{**r, "outcomes": o}) for r, o in both]
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise SavedError(
            f"{path} holds no rows of the conformance table ({error!r}): give another file"
        ) from error


def merge_rows(path: Path, rows: Sequence[ConformanceRow]) -> list[ConformanceRow]:
    """Add rows to a file in place of earlier ones of the same case and code; returns all, by
    name."""
    merged = {(r.name, r.code): r for r in (*read_rows(path), *rows)}
    ordered = [merged[key] for key in sorted(merged)]
    write_json(path, [asdict(r) for r in ordered])
    return ordered


def document(text: str, rows: Sequence[ConformanceRow]) -> str:
    """A document with the table, and the commands that made it, between its two marks."""
    if text.count(BEGIN) != 1 or text.count(END) != 1:
        raise InputError(f"the document must hold the lines {BEGIN} and {END} once")
    head, rest = text.split(BEGIN)
    tail = rest.split(END)[1]
    commands = sorted({(r.command, r.versions) for r in rows})  # each once, with its versions
    lines = "\n".join(f"- `{command}` ({versions})" for command, versions in commands)
    made = f"{markdown(rows)}\n\nCommands that gave these rows:\n\n{lines}"
    return f"{head}{BEGIN}\n{made}\n{END}{tail}"


class AdapterSuite:
    r"""Mixin of a pytest class: one test per check.

    Examples::

        >>> def make(dtype=torch.float32):
        ...     return captum_dcam.load("mini", dtype=dtype)
        >>> def reference(adapter, request, settings):
        ...     raise NotImplementedError("what the authors' own generate gives, as a Reference")
        >>> class TestMine(AdapterSuite):
        ...     case = AdapterCase("mine", make, reference, {"gen_length": 8}, {"gen_length": 1})
    """

    case: AdapterCase

    def test_replay(self) -> None:
        check_replay(self.case)

    def test_gradient(self) -> None:
        check_gradient(self.case)

    def test_feasible(self) -> None:
        check_feasible(self.case)

    def test_layout(self) -> None:
        check_layout(self.case)

    def test_inputs(self) -> None:
        check_inputs(self.case)

    def test_nothing_left(self) -> None:
        check_nothing_left(self.case)

    def test_head(self) -> None:
        check_head(self.case)
