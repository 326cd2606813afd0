"""docs/ADAPTERS.md: its example runs, passes the suite, and is found by its entry point."""

import re
import sys
from importlib.metadata import EntryPoint
from pathlib import Path

import pytest
import tiny
import torch
from safetensors.torch import save_model

import captum_dcam
from captum_dcam.model import families
from captum_dcam.model.families import ADAPTERS, GROUP
from captum_dcam.testing import CHECKS

GUIDE = (Path(__file__).parents[2] / "docs" / "ADAPTERS.md").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def package(tmp_path_factory):
    """The guide's files, importable, and its entry point, installed."""
    folder = tmp_path_factory.mktemp("guide")
    files = re.findall(r"```python\n# (toy_vl/\w+\.py)\n(.*?)```", GUIDE, re.DOTALL)
    assert [name for name, _ in files] == [
        "toy_vl/model.py",
        "toy_vl/adapter.py",
        "toy_vl/test_adapter.py",
    ]
    (folder / "toy_vl").mkdir()
    for name, source in files:
        (folder / name).write_text(source)
    (name, module), *others = re.findall(r"^(\w+) = \"([\w.]+)\"$", GUIDE, re.MULTILINE)
    assert not others
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(folder))
        patch.setattr(families, "_seen", {})
        point = EntryPoint(name, module, GROUP)
        patch.setattr(families, "_installed", lambda _path: {name: point})
        yield folder
    for family in [n for n, cls in ADAPTERS.items() if cls.__module__.startswith("toy_vl.")]:
        ADAPTERS.remove(family)  # others that were imported meanwhile would not come back
    for name in [n for n in sys.modules if n.split(".")[0] == "toy_vl"]:
        del sys.modules[name]


@pytest.mark.parametrize("check", CHECKS)
def test_the_example_passes_every_check(package, check):
    from toy_vl.test_adapter import CASES, TestToy

    (case,) = CASES
    assert TestToy.case is case
    getattr(TestToy(), f"test_{check.replace(' ', '_')}")()


def test_the_example_is_found_and_explained(package, tmp_path):
    from toy_vl.model import Tokenizer, ToyVL

    torch.manual_seed(0)
    model = ToyVL().eval()
    (tmp_path / "config.json").write_text('{"model_type": "toy_vl"}')
    save_model(model, str(tmp_path / "model.safetensors"))
    loaded = captum_dcam.load(tmp_path)
    assert loaded.family == "toy_vl" and "toy_vl" in captum_dcam.families()
    wrapped = captum_dcam.wrap(model, Tokenizer())
    maps = [captum_dcam.explain(a, tiny.picture(), "what is this ?") for a in (loaded, wrapped)]
    assert torch.equal(maps[0].maps[0], maps[1].maps[0])
    assert maps[0].maps[0].shape[1:] == (6, 6) and maps[0].maps[0].any()


def test_the_table_of_checks_names_them_all():
    rows = re.findall(
        r"^\| (\w[\w ]*) \| ", GUIDE.split("## The conformance suite")[1], re.MULTILINE
    )
    assert rows[1 : 1 + len(CHECKS)] == list(CHECKS)
