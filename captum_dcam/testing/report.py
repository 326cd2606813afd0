"""All six checks of a case as one row of the conformance table."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import transformers

from captum_dcam.testing.case import AdapterCase
from captum_dcam.testing.feasibility import check_feasible
from captum_dcam.testing.gradients import check_gradient
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
}


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
        outcomes (tuple of Outcome): of all checks, in order.
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
        """Whether every check passed."""
        return all(o.passed for o in self.outcomes)


def check_all(case: AdapterCase) -> ConformanceRow:
    """Run all six checks; an error of one does not keep the others from running."""
    versions = f"torch {torch.__version__}, transformers {transformers.__version__}"
    return ConformanceRow(
        case.name, case.source, tuple(_outcome(n, case) for n in CHECKS), versions
    )


def _outcome(name: str, case: AdapterCase) -> Outcome:
    try:
        return Outcome(name, True, CHECKS[name](case))
    except Exception as error:  # noqa: BLE001  whatever an adapter raises is its result
        return Outcome(name, False, f"{type(error).__name__}: {error}")


def markdown(rows: Sequence[ConformanceRow]) -> str:
    """The table in Markdown, failures in words below it."""
    head = ["Family and mode", "Code", *CHECKS]
    lines = [_line(head), _line(["---"] * len(head))]
    for row in rows:
        cells = [o.detail if o.passed else "**fails**" for o in row.outcomes]
        lines.append(_line([row.name, row.code, *cells]))
    failures = [
        f"- {row.name}, {o.check}: {o.detail}" for row in rows for o in row.outcomes if not o.passed
    ]
    return "\n".join([*lines, *([""] if failures else []), *failures])


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(c.replace('|', chr(0x2223)) for c in cells)} |"


class AdapterSuite:
    r"""Mixin of a pytest class: one test a check.

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
