"""``start.py``: what it says of the download, and which torch it asks pip for."""

import json
import re
import runpy
import subprocess
from pathlib import Path
from types import SimpleNamespace

import pytest

START = Path(__file__).resolve().parents[1] / "start.py"


class Pip:
    """Answers for pip: requirement → [(name, version, bytes)], from files of these sizes."""

    def __init__(self, folder: Path, answers: dict[str, list[tuple[str, str, int]]]):
        self.folder, self.answers, self.asked = folder, answers, []

    def __call__(self, command, **_options):
        assert "--dry-run" in command
        self.asked.append(command[-1])
        if command[-1] not in self.answers:
            return SimpleNamespace(returncode=1, stdout="")
        items = [self.item(*one) for one in self.answers[command[-1]]]
        return SimpleNamespace(returncode=0, stdout=json.dumps({"install": items}))

    def item(self, name, version, size):
        path = self.folder / f"{name}-{version}"
        path.write_bytes(bytes(size))
        url = {"url": path.as_uri()}
        return {"metadata": {"name": name, "version": version}, "download_info": url}


CUDA = [("torch", "2.9.0", 3_000_000), ("nvidia-cublas-cu12", "12.8", 5_000_000)]
SMALL = [("torch", "2.9.0+cpu", 2_000_000)]
CASES = {
    "a CPU build is there": (
        {"torch": CUDA, "torch==2.9.0+cpu": SMALL},
        False,
        ["torch==2.9.0+cpu"],
        "1 packages to download for torch 2.9.0+cpu, 2 MB",
    ),
    "pip takes it by itself": ({"torch": SMALL}, False, [], "torch 2.9.0+cpu, 2 MB"),
    "there is none": ({"torch": CUDA}, False, [], "8 MB[^$]*no NVIDIA GPU[^$]*PIP_EXTRA_INDEX_URL"),
    "there is a GPU": (
        {"torch": CUDA, "torch==2.9.0+cpu": SMALL},
        True,
        [],
        "2 packages to download for torch 2.9.0, 8 MB, and 100 to 200 MB for everything else$",
    ),
    "pip cannot tell": ({}, False, [], "several hundred MB"),
}


@pytest.mark.parametrize("case", CASES)
def test_the_torch_that_pip_is_asked_for(case, monkeypatch, tmp_path, capsys):
    answers, gpu, wanted, said = CASES[case]
    start = runpy.run_path(str(START))
    pip = Pip(tmp_path, answers)
    monkeypatch.setattr(subprocess, "run", pip)
    monkeypatch.setattr("shutil.which", lambda _name: "found" if gpu else None)
    assert start["torch_for"](["pip", "install"]) == wanted
    assert set(pip.asked) <= {"torch", "torch==2.9.0+cpu"} and pip.asked[0] == "torch"
    shown = " ".join(capsys.readouterr().out.split())
    assert re.search(said.replace("+", r"\+"), shown), shown


def test_what_follows_notebooks_goes_on(monkeypatch):
    start, ran = runpy.run_path(str(START))["main"], []
    monkeypatch.setitem(start.__globals__, "environment", lambda *_: Path("bin"))
    monkeypatch.setitem(start.__globals__, "quiet_threads", lambda: None)
    monkeypatch.setitem(start.__globals__, "run", lambda command: ran.append(command) or 3)
    monkeypatch.setattr("sys.argv", ["start.py", "notebooks", "05", "--check"])
    assert start() == 3
    assert ran == [[str(Path("bin/python")), "benchmarks/notebooks.py", "05", "--check"]]
