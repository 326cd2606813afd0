"""Fixtures that several folders of tests share; the same threads, draws and examples everywhere."""

import functools
import gc
import os
import random
import zlib

# Before torch is imported, and for the programs that tests start: a thread that waits gives its
# core away, and processes of pytest-xdist share the cores. Spinning threads beside a busy core
# make everything many times slower.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
if workers := int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", 0)):
    threads = max(1, (os.cpu_count() or 1) // workers)
    os.environ.setdefault("OMP_NUM_THREADS", str(threads))
if gc.isenabled():  # until all is collected: imports leave little to free, and looking takes 5 s
    gc.disable()

import hypothesis
import numpy as np
import pytest

from captum_dcam.errors import MissingPackageError

# torch is imported where it is used: the process that only hands tests to workers needs none, and
# they start when it has read this file.

# Examples are the same on every machine and in every run, however long one takes.
hypothesis.settings.register_profile("tests", derandomize=True, database=None, deadline=None)
hypothesis.settings.load_profile("tests")

#: every case of tests/bad_input, and 50 rounds of threads; `python3 start.py attacks` sets it
EVERY_CASE = "CAPTUM_DCAM_EVERY_CASE"


def pytest_collection_modifyitems(config, items):
    """Long tests first: none is left over for the end, when the other workers are done. Of the
    cases of bad input a tenth runs, the same everywhere, and at least one of every test."""
    items.sort(key=lambda item: "slow" not in item.keywords)
    if os.environ.get(EVERY_CASE) or any("::" in argument for argument in config.args):
        return
    seen, left = set(), []
    for item in items:
        if item.path.parent.name != "bad_input" or not hasattr(item, "callspec"):
            continue
        test = item.nodeid.partition("[")[0]
        if test in seen and zlib.crc32(item.nodeid.encode()) % 10:
            left.append(item)
        seen.add(test)
    config.hook.pytest_deselected(items=left)
    gone = set(left)
    items[:] = [item for item in items if item not in gone]


def pytest_collection_finish():
    """What lives until the end is not looked at again and again: a tenth of the tests' time."""
    gc.enable()
    gc.collect()
    gc.freeze()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item):
    return (yield from _skipped_where_no_family_runs())


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_setup(item):
    """Every test draws the same, whichever ran before it."""
    _torch_seed()(0)
    np.random.seed(0)
    random.seed(0)
    return (yield from _skipped_where_no_family_runs())


@functools.cache
def _torch_seed():
    """torch.manual_seed takes a millisecond where there is no device: it keeps a stack trace per
    device."""
    import torch

    return torch.manual_seed if torch.cuda.is_available() else torch.default_generator.manual_seed


def _skipped_where_no_family_runs():
    """With older transformers than a family runs with, which the error says, its tests skip."""
    try:
        return (yield)
    except MissingPackageError as error:
        if "runs with transformers" in str(error):
            pytest.skip(str(error))
        raise


@pytest.fixture(params=("prefix", "none"))
def cache(request):
    return request.param


@pytest.fixture
def packaged():
    """The packaged weights' folder; skips where the weights are not built yet."""
    from captum_dcam.mini import loading

    if not (loading.WEIGHTS / "model.safetensors").is_file():
        pytest.skip(f"{loading.WEIGHTS} holds no model.safetensors")
    return loading.WEIGHTS


@pytest.fixture(scope="module")
def weights_read_once():
    """Every command loads the packaged model, and none writes to its weights."""
    from captum_dcam.mini import loading

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loading, "_read_model", functools.cache(loading._read_model))
        yield
