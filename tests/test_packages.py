"""What only some users need is missed in one way, before any work.

That the core runs without it is seen in ``test_packaging.py``.
"""

import ast
import sys
from pathlib import Path

import pytest
import tiny
import torch
from test_house import SOURCES
from typer.testing import CliRunner

import captum_dcam
from captum_dcam.cli.app import app
from captum_dcam.errors import MissingPackageError
from captum_dcam.evaluation import Plan, evaluate
from captum_dcam.metrics import Reliability, auroc
from captum_dcam.packages import EXTRAS

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).resolve().parents[1]
#: module → distribution, where the names differ
CALLED = {
    "pytorch_grad_cam": "grad-cam",
    "skimage": "scikit-image",
    "sklearn": "scikit-learn",
}


def test_the_extras_are_those_of_the_distribution():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    core, extras = project["dependencies"], project["optional-dependencies"]
    for module, extra in EXTRAS.items():
        own = CALLED.get(module, module)
        assert any(line.startswith(own) for line in extras[extra]), own
        assert not any(line.startswith(own) for line in core), own
    (everything,) = extras["all"]
    listed = everything.removeprefix("captum-dcam[").removesuffix("]").split(",")
    assert set(listed) == extras.keys() - {"all", "test", "dev"}


def imported(tree: ast.AST) -> set[str]:
    """Top-level packages that a module's own statements import."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and not node.level:
            found.add((node.module or "").partition(".")[0])
    return found


def test_no_module_imports_an_extra_by_itself():
    found = {name: imported(ast.parse(path.read_text())) for name, path in SOURCES.items()}
    assert {"torch", "captum"} <= set().union(*found.values())
    for name, packages in found.items():
        assert not packages & EXTRAS.keys(), f"{name}: use captum_dcam.packages.needed"


def reliability():
    return Reliability.fit(torch.rand(4, 6), torch.tensor([True, False, True, False]))


def spread():
    captum_dcam.load(device_map="auto")


def compared():
    captum_dcam.compare(
        tiny.adapter("none"), tiny.picture(), tiny.PROMPT, [0], ["lime"], errors="raise"
    )


def evaluated():
    evaluate(Plan(("diffusion_cam", "kernel_shap")), "nowhere", adapter=tiny.adapter("none"))


CALLS = {
    "Reliability": ("sklearn", reliability, "Reliability.fit needs"),
    "auroc": ("sklearn", lambda: auroc(torch.rand(2), torch.tensor([True, False])), "auroc needs"),
    "device_map": ("accelerate", spread, "device_map='auto' needs"),
    "compare": ("sklearn", compared, "method 'lime' needs"),
    "evaluate": ("sklearn", evaluated, "method 'kernel_shap' needs"),
}


@pytest.mark.parametrize("case", CALLS)
def test_a_missing_package_is_said_before_any_work(case, monkeypatch, tmp_path):
    package, call, said = CALLS[case]
    monkeypatch.chdir(tmp_path)
    for name in [n for n in sys.modules if n.partition(".")[0] == package]:
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.setitem(sys.modules, package, None)
    monkeypatch.setattr("captum_dcam.model.forward.DenoisingForward.generate", None)
    wanted = rf"{said} the package {package}.*pip install 'captum-dcam\[{EXTRAS[package]}\]'"
    with pytest.raises(MissingPackageError, match=wanted):
        call()
    assert not list(tmp_path.iterdir())


COMMANDS = {
    "named": ("sklearn", ["compare", "-M", "diffusion_cam,lime"]),
    "inside of another": ("sklearn", ["compare", "-M", "tam_over:base=kernel_shap"]),
    "grad-cam": ("pytorch_grad_cam", ["compare", "-M", "pgc_gradcam"]),
    "Markdown": ("tabulate", ["table", "placebo", "-r", ".", "--markdown"]),
}


@pytest.mark.parametrize("case", COMMANDS)
def test_a_command_says_it_before_any_work(case, monkeypatch, tmp_path):
    package, arguments = COMMANDS[case]
    monkeypatch.chdir(tmp_path)
    for name in [n for n in sys.modules if n.partition(".")[0] == package]:
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.setitem(sys.modules, package, None)
    monkeypatch.setattr("captum_dcam.model.hub.load", None)
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 2, done.output
    assert f"pip install 'captum-dcam[{EXTRAS[package]}]'" in " ".join(done.stderr.split())
    assert not list(tmp_path.iterdir())
