"""The environments in which this library's users run their models, one after the other.

``python3 start.py test --matrix NAME`` or ``all``. An environment is a file of tests/environments:
what the authors of a family pin, the lowest and the newest versions, other Pythons. It is made
beside the repository's other environments, first as its file says; then this library is installed,
and what that changes is noted; then the tests run, and with ``--checkouts FOLDER`` those of the
authors' own code. Every row is stored as it comes, and the table of docs/ENVIRONMENTS.md written
anew. Nothing but Python itself is needed; uv makes environments faster where it is installed.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from reports import UPSTREAM, commit, read_report, rewritten

ROOT = Path(__file__).resolve().parent.parent
ENVIRONMENTS = ROOT / "tests/environments"
STORE, PAGE = ROOT / "docs/environments.json", ROOT / "docs/ENVIRONMENTS.md"
MARKS = "<!-- environments: begin -->", "<!-- environments: end -->"
#: of every environment: the embedded model, all families' doubles, the command line, what pip made
TESTS = (
    *("tests/mini", "tests/core", "tests/adapters"),
    *("tests/test_cli.py", "tests/test_packaging.py"),
)
SHOWN = ("torch", "transformers", "numpy")
LEFT_OUT = {"tests"}  # a file that is no environment


class NotMade(Exception):
    """An environment that cannot be had; the installer's words."""


@dataclass(frozen=True)
class Environment:
    """A file of tests/environments: its first lines say which Python, and whose checkouts."""

    name: str
    python: str
    checkouts: tuple[tuple[str, str], ...]

    @property
    def file(self) -> Path:
        return ENVIRONMENTS / f"{self.name}.txt"

    @property
    def folder(self) -> Path:
        return ROOT / f".venv-matrix-{self.name}"


@dataclass(frozen=True)
class Row:
    """What came of an environment."""

    name: str
    python: str
    versions: str
    #: packages of the file whose version changed when this library was installed
    changed: tuple[str, ...]
    tests: str
    upstream: str
    #: the installer's message where there is no environment
    message: str = ""
    good: bool = False


def environments() -> dict[str, Environment]:
    """All of them by name."""
    found = {}
    for path in sorted(ENVIRONMENTS.glob("*.txt")):
        if path.stem in LEFT_OUT:
            continue
        text = path.read_text(encoding="utf-8")
        python = re.search(r"^# python (\S+)$", text, re.MULTILINE)
        if python is None:
            sys.exit(f"{path}: expected a line '# python 3.10' that says which it is for")
        named = re.search(r"^# checkouts (.+)$", text, re.MULTILINE)
        pairs = (pair.split("=") for pair in (named[1].split() if named else ()))
        found[path.stem] = Environment(path.stem, python[1], tuple((f, c) for f, c in pairs))
    return found


def lowest(text: str) -> str:
    """The requirements of a pyproject.toml, each at the lowest version that it allows."""
    block = text[text.index("dependencies = [") :].partition("\n]")[0]
    lines = re.findall(r'^\s+"([^"]+)"', block, re.MULTILINE)
    return "\n".join(line.replace(">=", "==") for line in lines)


# -- making one ------------------------------------------------------------------------------------


def quiet(*command: str | Path) -> str:
    """The output of a command; NotMade with its last words where it fails."""
    done = subprocess.run([*map(str, command)], capture_output=True, text=True, cwd=ROOT)
    if done.returncode:
        said = (done.stderr or done.stdout).strip().splitlines()
        raise NotMade(" ".join(line.strip() for line in said[-3:]) or f"exit {done.returncode}")
    return done.stdout


def interpreter(version: str) -> str | None:
    """A Python of a version on this machine."""
    own = f"{sys.version_info[0]}.{sys.version_info[1]}"
    others = sorted(Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv")).glob(
        f"versions/{version}.*/bin/python"
    ))  # fmt: skip
    if own == version:
        return sys.executable
    return str(others[-1]) if others else shutil.which(f"python{version}")


def make(environment: Environment) -> tuple[Path, tuple[str, ...]]:
    """The environment's Python, and what installing this library changed in it."""
    uv, found = shutil.which("uv"), interpreter(environment.python)
    if environment.folder.exists():
        shutil.rmtree(environment.folder)
    if uv:
        quiet(uv, "venv", "--python", found or environment.python, environment.folder)
    elif found:
        quiet(found, "-m", "venv", environment.folder)
    else:
        raise NotMade(f"no Python {environment.python} on this machine")
    programs = "Scripts" if os.name == "nt" else "bin"
    python = environment.folder / programs / "python"
    pip = [uv, "pip"] if uv else [python, "-m", "pip", "--disable-pip-version-check"]
    own = ["--python", python] if uv else []
    with tempfile.TemporaryDirectory() as folder:
        files = [environment.file]
        if environment.name == "lowest":
            files.append(Path(folder) / "lowest.txt")
            files[-1].write_text(lowest((ROOT / "pyproject.toml").read_text(encoding="utf-8")))
        install = [*pip, "install", *own]
        quiet(*install, *(part for file in files for part in ("-r", file)))
        before = _frozen(python)
        quiet(*install, *_constrained(environment), ROOT)
        after = _frozen(python)
        quiet(*install, *_constrained(environment), "-r", ENVIRONMENTS / "tests.txt")
    changed = (f"{n} {v} → {after[n]}" for n, v in before.items() if after[n] != v)
    return python, tuple(sorted(changed))


def _constrained(environment: Environment) -> list[str]:
    """The constraints that an environment's file names hold for what comes after it."""
    named = re.findall(r"^-c (\S+)$", environment.file.read_text(encoding="utf-8"), re.MULTILINE)
    return [part for name in named for part in ("-c", str((ENVIRONMENTS / name).resolve()))]


_FROZEN = "import importlib.metadata as m, json\n" + (
    "print(json.dumps({d.metadata['Name'].lower(): d.version for d in m.distributions()}))"
)


def _frozen(python: Path) -> dict[str, str]:
    return json.loads(quiet(python, "-c", _FROZEN))


# -- running the tests -----------------------------------------------------------------------------


def tested(python: Path, tests: Sequence[str], **variables: str) -> tuple[str, bool]:
    """What a run of tests says, and whether none failed and some passed."""
    own = {
        **os.environ,
        **variables,
        "PYTHONPATH": "tests",
        "CAPTUM_DCAM_INSTALLED": "1",  # the library, as its users have it: tests/test_packaging.py
        "OMP_NUM_THREADS": "1",
        "OMP_WAIT_POLICY": "passive",
    }
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        run = [str(python), "-m", "pytest", "-q", "-n", "2", *tests, f"--junitxml={report}"]
        subprocess.run(run, cwd=ROOT, env=own, check=False)
        if not report.is_file():
            return "no report", False
        passed, failed, skipped = read_report(report)
    counts = f"{passed} passed, {failed} failed, {len(skipped)} skipped"
    return counts, bool(passed) and not failed


def run(environment: Environment, checkouts: Path | None) -> Row:
    """Make an environment and run its tests."""
    try:
        python, changed = make(environment)
    except NotMade as error:
        return Row(environment.name, environment.python, "", (), "", "", str(error))
    held = _frozen(python)
    python_version = quiet(python, "-c", "import platform; print(platform.python_version())")
    said, good = tested(python, TESTS)
    theirs = []
    for family, name in environment.checkouts if checkouts else ():
        folder = checkouts / name
        variables = {f"{UPSTREAM}{family.upper()}": str(folder.resolve())}
        told, well = tested(python, [f"tests/upstream/test_{family}.py"], **variables)
        theirs.append(f"{name} {commit(folder)}: {told}")
        good = good and well
    versions = ", ".join(f"{n} {held[n]}" for n in SHOWN)
    name, upstream = environment.name, "; ".join(theirs)
    return Row(name, python_version.strip(), versions, changed, said, upstream, good=good)


# -- the table -------------------------------------------------------------------------------------


def document(text: str, rows: Sequence[Row]) -> str:
    """The page with its table written anew."""
    names = (
        "Environment",
        "Python",
        "Versions",
        "Changed by installing us",
        "Tests",
        "Authors' code",
    )
    cells = [
        (
            f"[{r.name}](../tests/environments/{r.name}.txt)",
            r.python,
            r.versions or f"not to be had: {r.message}",
            ", ".join(r.changed) or ("nothing" if r.versions else ""),
            r.tests,
            r.upstream or "–",
        )
        for r in rows
    ]
    lines = [names, ("---",) * len(names), *cells]
    table = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    return rewritten(text, MARKS, table)


def main() -> int:
    known = environments()
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("names", nargs="+", choices=["all", *known], metavar="NAME")
    parser.add_argument("--checkouts", type=Path, help="folder of the authors' checkouts")
    parser.add_argument("--keep", action="store_true", help="keep environments (several GB each)")
    options = parser.parse_args()
    wanted = list(known) if "all" in options.names else options.names
    stored = json.loads(STORE.read_text(encoding="utf-8")) if STORE.is_file() else []
    rows = {r["name"]: Row(**{**r, "changed": tuple(r["changed"])}) for r in stored}
    for name in wanted:
        print(f"==> {name}", flush=True)
        rows[name] = row = run(known[name], options.checkouts)
        every = [rows[n] for n in known if n in rows]
        STORE.write_text(
            json.dumps([asdict(r) for r in every], indent=1, ensure_ascii=False) + "\n",
            encoding="utf-8",
        )
        PAGE.write_text(document(PAGE.read_text(encoding="utf-8"), every), encoding="utf-8")
        print(f"==> {name}: {row.tests or row.message}; {row.upstream}", flush=True)
        if not options.keep and known[name].folder.exists():
            shutil.rmtree(known[name].folder)
    return 0 if all(rows[n].good or rows[n].message for n in wanted) else 1


if __name__ == "__main__":
    sys.exit(main())
