"""What runs are told by: a JUnit file, the commit of a checkout, the machine, a table in a page.

Nothing but Python itself is needed.
"""

from __future__ import annotations

import platform
import subprocess
from importlib.metadata import version
from pathlib import Path
from xml.etree import ElementTree

#: begins the variables that name a checkout to tests/upstream, and to `captum_dcam.testing`
UPSTREAM = "CAPTUM_DCAM_UPSTREAM_"


def read_report(path: Path) -> tuple[int, int, tuple[str, ...]]:
    """Numbers of passed and failed tests of a JUnit file, and the reasons of those skipped."""
    cases = list(ElementTree.parse(path).iter("testcase"))
    skipped = tuple(s.get("message", "") for case in cases for s in case.iter("skipped"))
    failed = sum(
        case.find("failure") is not None or case.find("error") is not None for case in cases
    )
    return len(cases) - failed - len(skipped), failed, skipped


def commit(checkout: Path) -> str:
    """The commit of a checkout, marked where its files were changed.

    Raises:
        ValueError: it is no git checkout.
    """
    git = ["git", "-C", str(checkout)]
    head = subprocess.run([*git, "rev-parse", "--short=7", "HEAD"], capture_output=True, text=True)
    if head.returncode:
        raise ValueError(f"{checkout} is no git checkout: its commit belongs into the table")
    changed = subprocess.run(
        [*git, "diff", "HEAD", "--name-only", "--diff-filter=M"], capture_output=True, text=True
    )
    return head.stdout.strip() + (" (changed)" if changed.stdout.strip() else "")


def machine() -> str:
    """Class of the machine and versions, without its name."""
    names = Path("/proc/cpuinfo")
    lines = names.read_text().splitlines() if names.exists() else []
    found = (x.split(":")[1].strip() for x in lines if x.startswith("model name"))
    packages = ", ".join(f"{name} {version(name)}" for name in ("torch", "captum", "transformers"))
    return (
        f"{next(found, platform.processor())}, one thread per process; {packages}, "
        f"Python {platform.python_version()}"
    )


def rewritten(text: str, marks: tuple[str, str], made: str) -> str:
    """A page with what stands between its two marks made anew."""
    begin, end = marks
    head, rest = text.split(begin)
    return f"{head}{begin}\n{made}\n{end}{rest.split(end)[1]}"
