"""Every example of a docstring runs, in a namespace of its module and of what stands below."""

import doctest
import importlib
import pkgutil

import pytest
import torch

import captum_dcam
import captum_dcam.adapters

#: what examples take for granted, as a reader does
SHARED = {"captum_dcam": captum_dcam, "torch": torch}


def modules():
    for package in (captum_dcam, captum_dcam.adapters):
        for found in pkgutil.walk_packages(package.__path__, f"{package.__name__}."):
            if not found.name.endswith("__main__"):
                yield found.name
    yield "captum_dcam"


def examples():
    finder = doctest.DocTestFinder(exclude_empty=True)
    for name in sorted(set(modules())):
        module = importlib.import_module(name)
        for test in finder.find(module, globs={**vars(module), **SHARED}):
            if test.examples:
                yield test


@pytest.mark.parametrize("example", list(examples()), ids=lambda e: e.name)
def test_example(example):
    runner = doctest.DocTestRunner(
        optionflags=doctest.ELLIPSIS
        | doctest.NORMALIZE_WHITESPACE
        | doctest.IGNORE_EXCEPTION_DETAIL,
    )
    said = []
    runner.run(example, out=said.append)
    assert not runner.failures, "".join(said)
    assert runner.tries
