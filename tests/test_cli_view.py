"""``captum-dcam view``: pages of anything saved, and of folders of it; --open."""

import json
import shutil
from pathlib import Path

import pytest
from typer.testing import CliRunner
from viewer.made import made
from viewer.test_explorer_page import document_in

from captum_dcam.cli.app import app
from captum_dcam.viewer import write_folder

FIXTURES = Path(__file__).parent / "fixtures"


def call(*arguments):
    return CliRunner().invoke(app, [str(a) for a in arguments], catch_exceptions=False)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A folder that holds one of each."""
    folder = tmp_path_factory.mktemp("saved")
    write_folder(made(2), folder / "ours")
    for name, called in (("explanation", "bare"), ("comparison",) * 2, ("store",) * 2):
        shutil.copytree(FIXTURES / name, folder / called)
    return folder


@pytest.mark.parametrize(
    ("name", "kind", "form"),
    [
        ("ours", "explanation", "captum-dcam explorer"),
        ("bare", "explanation", "captum-dcam explorer"),
        ("comparison", "comparison", "captum-dcam explorer"),
        ("store", "store", "captum-dcam index"),
        (".", "folder", "captum-dcam index"),
    ],
)
def test_a_page_of_anything_saved(saved, tmp_path, name, kind, form, monkeypatch):
    opened = []
    monkeypatch.setattr("webbrowser.open", lambda address: opened.append(address) or True)
    file = tmp_path / "page.html"
    run = call("view", saved / name, "-o", file, "--json", "--open")
    assert run.exit_code == 0, run.output
    assert json.loads(run.stdout) == {"page": str(file), "kind": kind}
    assert opened == [file.as_uri()]
    found = document_in(file.read_text())
    assert found["format"] == form
    if name == "ours":
        assert file.read_text() == (saved / name / "index.html").read_text()
    if kind == "folder":
        cases = {case["name"]: case for case in found["cases"]}
        assert set(cases) == {"ours", "bare", "comparison", "store"}
        place = (tmp_path / cases["ours"]["link"]).resolve()
        assert place == (saved / "ours" / "index.html").resolve()
        assert cases["comparison"]["words"] and "captum-dcam view" in cases["store"]["command"]


def test_the_page_lies_beside_the_folder_and_replaces_pages_alone(saved):
    page = saved / "comparison.html"
    for _ in range(2):
        assert call("view", saved / "comparison").exit_code == 0
    page.write_text("mine")
    run = call("view", saved / "comparison")
    assert run.exit_code == 2 and "is not an earlier page" in run.stderr
    assert page.read_text() == "mine"
    page.unlink()


def test_what_holds_nothing_is_refused(tmp_path):
    (tmp_path / "empty").mkdir()
    for folder in (tmp_path / "empty", tmp_path / "none", __file__):
        run = call("view", folder, "-o", tmp_path / "x.html")
        assert run.exit_code == 2 and "holds nothing that can be shown" in run.stderr
    assert "which folder?" in call("view").stderr
    assert not (tmp_path / "x.html").exists()
