"""Every example of a docstring runs, with its module's names, ``captum_dcam`` and ``torch``."""

import doctest
import importlib
from pathlib import Path

import pytest
import torch

import captum_dcam

ROOT = Path(__file__).parents[1]
FLAGS = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE | doctest.IGNORE_EXCEPTION_DETAIL


def modules():
    """Modules whose text holds an example; none is imported before its test."""
    for folder, package in (
        (ROOT / "captum_dcam", "captum_dcam"),
        (ROOT / "adapters", "captum_dcam.adapters"),
    ):
        for file in sorted(folder.rglob("*.py")):
            if ">>>" in file.read_text(encoding="utf-8"):
                inner = file.relative_to(folder).with_suffix("").parts
                name = ".".join((package, *inner)).removesuffix(".__init__")
                if not (package == "captum_dcam" and inner[0] == "adapters"):  # a link to the other
                    yield name


@pytest.mark.parametrize("name", list(modules()))
def test_examples(name):
    module, said, ran = importlib.import_module(name), [], 0
    shared = {**vars(module), "captum_dcam": captum_dcam, "torch": torch}
    for example in doctest.DocTestFinder().find(module, globs=shared):
        failed, tried = doctest.DocTestRunner(optionflags=FLAGS).run(example, out=said.append)
        assert not failed, "".join(said)
        ran += tried
    assert ran, f"{name} has >>> that doctest does not find"
