r"""Run the tests whose judge is somebody else's code, and write what came of each.

``python3 start.py referees --checkouts FOLDER`` makes their environment (several GB:
pytorch-grad-cam needs torchvision, built for the same torch) and calls this. ``FOLDER`` holds
checkouts of the authors' repositories, in folders called as in ``REFEREES``. Every referee runs in
a process of its own, because several authors' packages have the same name. The command fails where
a test fails, where a referee is missing, and where a test is skipped for a reason that ``EXCUSED``
does not list. The table in ``docs/REFEREES.md`` is written anew after every referee; rows of
referees that did not run now stay.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Annotated

import typer
from reports import UPSTREAM, commit, read_report, rewritten
from tabulate import tabulate

ROOT = Path(__file__).resolve().parents[1]
MARKS = "<!-- referees: begin -->", "<!-- referees: end -->"

app = typer.Typer(add_completion=False)


@dataclass(frozen=True)
class Referee:
    r"""Somebody else's code, and the tests that it judges.

    Args:
        name (str): of the row.
        judges (str): what is compared with it.
        tests (tuple of str): arguments for pytest.
        packages (tuple of str): packages whose versions decide the result.
        repository (str): owner and name of the authors' code. Default: a package of a registry
        folder (str): of the checkout in ``--checkouts``. Default: the repository's name
        variable (str): environment variable that names the checkout to the tests.
        cases (tuple of str): arguments for ``python -m captum_dcam.testing``. Default: nothing
    """

    name: str
    judges: str
    tests: tuple[str, ...]
    packages: tuple[str, ...] = ("torch", "transformers")
    repository: str = ""
    folder: str = ""
    variable: str = ""
    cases: tuple[str, ...] = ()

    def checkout(self, folder: Path) -> Path:
        """Where its checkout lies."""
        return folder / (self.folder or self.repository.partition("/")[2])


def upstream(family: str, repository: str, *more: str) -> Referee:
    """A family's own code: its tests and its conformance cases."""
    return Referee(
        repository,
        "recordings, replays, gradients, layouts and commands of the family",
        (f"tests/upstream/test_{family}.py", *more),
        repository=repository,
        variable=f"{UPSTREAM}{family.upper()}",
        cases=(f"tests/upstream/cases/{family}.py",),
    )


REFEREES = (
    Referee(
        "pytorch-grad-cam",
        "its methods through ours, and ours against its own",
        ("tests/methods", "-k", "pgc or grad_cam"),
        ("grad-cam", "torch", "torchvision"),
    ),
    Referee(
        "torchvision",
        "images that processors and upstream transforms resize",
        (
            "tests/adapters/test_autoregressive_processors.py",
            "tests/adapters/test_diffusion_gemma_input.py",
        ),
        ("torchvision", "transformers"),
    ),
    Referee(
        "lxt",
        "relevance of AttnLRP and CP-LRP",
        ("tests/methods/test_methods_relevance.py", "-k", "authors"),
        ("lxt", "torch", "transformers"),
    ),
    Referee(
        "TAM",
        "TAM's maps on an autoregressive model, and which of a prompt's tokens are context",
        ("tests/methods/test_methods_tam.py", "-k", "authors"),
        ("torch", "transformers", "numpy"),
        repository="xmed-lab/TAM",
        variable="CAPTUM_DCAM_TAM",
    ),
    Referee(
        "EAGLE",
        "the order in which both of EAGLE's searches take regions",
        ("tests/methods/test_methods_eagle.py", "-k", "authors"),
        ("torch", "numpy"),
        repository="RuoyuChen10/EAGLE",
        variable="CAPTUM_DCAM_EAGLE",
    ),
    upstream("lavida", "jacklishufan/LaViDa"),
    upstream("lavida_o", "adobe-research/LaVida-O"),
    upstream("llada_v", "ML-GSAI/LLaDA-V", "-k", "not fast_dllm"),
    Referee(
        "LLaDA-V with Fast-dLLM",
        "generation through Fast-dLLM's cache",
        ("tests/upstream/test_llada_v.py", "-k", "fast_dllm"),
        repository="vukrosic/LLaDA-V",
        folder="LLaDA-V-Fast-dLLM",
        variable=f"{UPSTREAM}LLADA_V",
        cases=("tests/upstream/cases/llada_v.py", "--only", "Fast"),
    ),
    Referee(
        "jiyt17/ReDiff",
        "LLaDA-V's recordings and replays with ReDiff's decoder, which edits",
        ("tests/upstream/test_llada_v.py", "-k", "not fast_dllm"),
        repository="jiyt17/ReDiff",
        variable=f"{UPSTREAM}LLADA_V",
        cases=("tests/upstream/cases/llada_v.py", "--only", "ReDiff"),
    ),
    upstream("vidlada", "ziHoHe/VidLaDA"),
    upstream("mmada", "Gen-Verse/MMaDA"),
    upstream("lumina_dimoo", "Alpha-VLLM/Lumina-DiMOO"),
    upstream("dream_vl", "DreamLM/Dream-VLX"),
    upstream("dimple", "yu-rp/Dimple"),
    upstream("diffusion_vl", "hustvl/DiffusionVL"),
    upstream("mineru_diffusion", "opendatalab/MinerU-Diffusion"),
    upstream("sdar_vl", "JetAstra/SDAR-VL"),
    upstream("internvl_chat", "OpenGVLab/InternVL"),
)

#: part of a test's reason for being skipped → why that is no fault of this run
EXCUSED: dict[str, str] = {}


@dataclass(frozen=True)
class Result:
    """What came of a referee's tests: a row of the table, and of the stored file."""

    name: str
    judges: str
    code: str
    versions: str
    passed: int
    failed: int
    skipped: tuple[str, ...]
    conformance: str
    command: str

    @property
    def good(self) -> bool:
        """Whether everything ran and passed; what is excused is named in the table."""
        unexcused = [r for r in self.skipped if not any(known in r for known in EXCUSED)]
        return bool(self.passed) and not (self.failed or unexcused or self.conformance == "fails")

    def cells(self) -> list[str]:
        """A row of the table."""
        skipped = "; ".join(f"{self.skipped.count(r)} × {r}" for r in sorted(set(self.skipped)))
        counts = [str(self.passed), str(self.failed), skipped or "0"]
        return [self.name, self.judges, self.code, self.versions, *counts, self.conformance or "–"]


def judge(referee: Referee, checkouts: Path | None, arguments: Sequence[str]) -> Result:
    """Run one referee's tests and conformance cases."""
    environment = {**os.environ, "PYTHONPATH": "tests"}
    code, shown = "package", ""
    if referee.repository:
        if checkouts is None or not referee.checkout(checkouts).is_dir():
            where = referee.checkout(checkouts or Path("FOLDER"))
            raise typer.BadParameter(
                f"no checkout of {referee.repository} at {where}: clone it there, or leave the "
                f"referee out with --only"
            )
        checkout = referee.checkout(checkouts).resolve()
        try:
            code = f"{referee.repository} {commit(checkout)}"
        except ValueError as error:
            raise typer.BadParameter(str(error)) from error
        environment[referee.variable] = str(checkout)
        shown = f"{referee.variable}=CHECKOUT "
    python = [sys.executable, "-m"]
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        pytest = ["pytest", "-q", *referee.tests]
        run = [*python, *pytest, *arguments, f"--junitxml={report}"]
        subprocess.run(run, cwd=ROOT, env=environment, check=False)
        counts = read_report(report) if report.is_file() else (0, 1, ())
    conformance = ""
    if referee.cases:
        stored = ["--store", "docs/conformance.json", "--into", "docs/ADAPTERS.md"]
        run = [*python, "captum_dcam.testing", *referee.cases, *stored]
        failed = subprocess.run(run, cwd=ROOT, env=environment, check=False).returncode
        conformance = "fails" if failed else "passes"
    versions = ", ".join(f"{name} {version(name)}" for name in referee.packages)
    quoted = " ".join(f'"{a}"' if " " in a else a for a in pytest)
    return Result(
        referee.name, referee.judges, code, versions, *counts, conformance, f"{shown}{quoted}"
    )


def document(text: str, results: Sequence[Result]) -> str:
    """A document with the table, the excuses and the commands between its two marks."""
    names = ["Referee", "Judges", "Code", "Versions", "Passed", "Failed", "Skipped", "Conformance"]
    table = tabulate([r.cells() for r in results], names, tablefmt="github", disable_numparse=True)
    excused = [f"- skipped, “{part}”: {why}" for part, why in EXCUSED.items()]
    commands = [f"- {r.name}: `{r.command}`" for r in results]
    made = "\n".join([table, "", *excused, *([""] if excused else []), *commands])
    return rewritten(text, MARKS, made)


@app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
def main(
    context: typer.Context,
    checkouts: Annotated[
        Path | None, typer.Option(help="Folder of the authors' checkouts.", file_okay=False)
    ] = None,
    only: Annotated[list[str] | None, typer.Option(help="Name of a referee; repeatable.")] = None,
    store: Annotated[Path, typer.Option(help="Results of all referees.")] = ROOT
    / "docs/referees.json",
    page: Annotated[Path, typer.Option("--document", help="Where the table stands.")] = ROOT
    / "docs/REFEREES.md",
) -> None:
    """Run the referees; arguments that are unknown here go on to pytest."""
    known = [referee.name for referee in REFEREES]
    if wrong := sorted(set(only or ()) - set(known)):
        raise typer.BadParameter(f"no referee {', '.join(wrong)}: expected {', '.join(known)}")
    kept = {r["name"]: Result(**{**r, "skipped": tuple(r["skipped"])}) for r in _stored(store)}
    ran = []
    for referee in REFEREES:
        if only and referee.name not in only:
            continue
        kept[referee.name] = result = judge(referee, checkouts, context.args)
        ran.append(result)
        every = [kept[name] for name in known if name in kept]
        store.write_text(json.dumps([asdict(r) for r in every], indent=1) + "\n", encoding="utf-8")
        page.write_text(document(page.read_text(encoding="utf-8"), every), encoding="utf-8")
    for result in ran:
        print(f"{'passed' if result.good else 'NOT PASSED'}: {' | '.join(result.cells())}")
    raise typer.Exit(0 if all(result.good for result in ran) else 1)


def _stored(path: Path) -> list[dict[str, object]]:
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else []


if __name__ == "__main__":
    app()
