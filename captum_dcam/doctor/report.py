"""What a checkup found: one line per check, for people and as JSON."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from captum_dcam import checks
from captum_dcam.errors import OccupiedError, SavedError
from captum_dcam.files import read_json, without_nan, write_json

#: fine; look at it before you believe a map; no map of this model means anything; and what could
#: not be judged, where the line says why
OK, LOOK, STOP, UNJUDGED = VERDICTS = ("ok", "look", "stop", "not judged")
#: from the best to the worst, for the whole report
_ORDER = (UNJUDGED, OK, LOOK, STOP)
#: what a file of a report says that it is
KIND = "captum-dcam doctor"


@dataclass(frozen=True)
class Line:
    r"""One line of the report.

    Args:
        verdict (str): one of :data:`VERDICTS`.
        found (str): what was found, or why it was not judged.
        step (str): what to do next; empty where nothing is to be done.
        values (mapping): what was measured, JSON-able.
    """

    verdict: str
    found: str
    step: str = ""
    values: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        checks.choice("verdict", self.verdict, VERDICTS)

    @property
    def said(self) -> str:
        """Verdict and finding in one text, as in ``"not judged: random weights"``."""
        return f"{self.verdict}: {self.found}"


@dataclass(frozen=True)
class Report:
    r"""Everything that a checkup found.

    Args:
        model (str): what was looked at: family and class.
        prompt (str), answer (str): what was asked, and what the model wrote; empty where nothing
            was generated.
        lines (mapping): name → :class:`Line`, in the order in which they were judged.
    """

    model: str
    prompt: str
    answer: str
    lines: Mapping[str, Line]

    def __getitem__(self, name: str) -> Line:
        return self.lines[name]

    @property
    def verdict(self) -> str:
        """The worst verdict of all lines."""
        return max((line.verdict for line in self.lines.values()), key=_ORDER.index)

    def of(self, verdict: str) -> tuple[str, ...]:
        """Names of the lines with a verdict."""
        return tuple(name for name, line in self.lines.items() if line.verdict == verdict)

    def record(self) -> dict[str, Any]:
        """The report as plain data, to attach to a bug report."""
        lines = {
            name: {
                "verdict": line.verdict,
                "found": line.found,
                "next": line.step,
                "values": without_nan(dict(line.values)),
            }
            for name, line in self.lines.items()
        }
        head = {"kind": KIND, "verdict": self.verdict, "model": self.model}
        return {**head, "prompt": self.prompt, "answer": self.answer, "lines": lines}

    def save(self, path: str | Path) -> Path:
        """Write the report as JSON, all of it or nothing; raises as :func:`check_place`."""
        write_json(check_place(path), self.record())
        return Path(path)


def check_place(path: str | Path) -> Path:
    r"""Check, before any long work, that a report may be written to a file.

    Raises:
        OccupiedError: it is there, and no earlier report.
    """
    path = Path(path)
    if not path.exists():
        return path
    try:
        earlier = path.is_file() and read_json(path, SavedError, "").get("kind") == KIND
    except SavedError:
        earlier = False
    if not earlier:
        raise OccupiedError(f"{path} is there and no earlier report of the doctor: name another")
    return path
