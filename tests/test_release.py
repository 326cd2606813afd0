"""What is said of a version in several files is the same in all; `docs/RELEASE.md` lists them."""

import re
import runpy
import sys
from pathlib import Path

import pytest

from captum_dcam import __version__

ROOT = Path(__file__).resolve().parents[1]
text = {n: (ROOT / n).read_text(encoding="utf-8") for n in ("CHANGELOG.md", "CITATION.cff")}


def field(name: str) -> str:
    """A line of CITATION.cff."""
    (found,) = re.findall(rf"^{name}: (.+)$", text["CITATION.cff"], re.MULTILINE)
    return found


def test_the_version_and_the_address_are_the_same_everywhere():
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    sections = re.findall(r"^## (\S+) \((.+)\)$", text["CHANGELOG.md"], re.MULTILINE)
    versions = [tuple(map(int, version.split("."))) for version, _ in sections]
    assert sections[0][0] == __version__ == field("version")
    assert versions == sorted(set(versions), reverse=True)
    for place, (_, day) in enumerate(sections):
        dated = re.fullmatch(r"\d{4}-\d\d-\d\d", day)
        assert dated or (place == 0 and day == "unreleased"), day
    assert f'Repository = "{field("repository-code")}"' in project
    assert f'license = "{field("license")}"' in project


def test_the_checklist_names_what_there_is(monkeypatch, capsys):
    guide = (ROOT / "docs" / "RELEASE.md").read_text(encoding="utf-8")
    commands = set(re.findall(r"`python3 start\.py (\w+)", guide))
    assert {"test", "referees", "attacks"} <= commands
    monkeypatch.setattr(sys, "argv", ["start.py", "--help"])
    with pytest.raises(SystemExit):
        runpy.run_path(str(ROOT / "start.py"), run_name="__main__")
    shown = capsys.readouterr().out
    assert all(command in shown for command in commands)
    for name in re.findall(r"`([\w./-]+\.(?:py|toml|md|cff))`", guide):
        assert (ROOT / name).is_file(), name
