"""Every tutorial runs from its first cell to its last, and is kept without outputs."""

import os
from pathlib import Path

import pytest

nbclient = pytest.importorskip("nbclient")
nbformat = pytest.importorskip("nbformat")
pytest.importorskip("ipykernel")

TUTORIALS = sorted((Path(__file__).parents[1] / "tutorials").glob("*.ipynb"))
#: settings that are smaller here; every line of a tutorial runs
SMALLER = {
    "01-first-explanation": {
        "nt_samples=4": "nt_samples=2",
        "nt_samples_batch_size=4": "nt_samples_batch_size=2",
    },
    "02-compare-methods": {  # all methods on one of the two words
        "(forward, words, masks=masks)": "(forward, words[:1], masks=masks[:1])",
    },
    "03-evaluate": {  # two of the four scenes, and one of them before it is stopped
        'dataset={"name": "scenes", "count": 64}': 'dataset={"name": "scenes", "count": 62}',
        "stop=lambda: next(asked) == 2": "stop=lambda: next(asked) == 1",
        '"fractions": (0, 0.1, 0.3, 1)': '"fractions": (0, 0.3, 1)',
    },
}


def test_there_are_tutorials():
    assert TUTORIALS


@pytest.mark.parametrize("path", TUTORIALS, ids=lambda p: p.stem)
def test_outputs_are_cleared(path):
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    for cell in notebook.cells:
        assert not cell.get("outputs") and cell.get("execution_count") is None


@pytest.fixture(scope="module")
def client():
    """One kernel for all tutorials, because imports take longest.

    No cell has a time limit: a slow machine is no fault (startup_timeout has no "none").
    """
    one = nbclient.NotebookClient(
        nbformat.v4.new_notebook(), timeout=None, startup_timeout=86400, kernel_name="python3"
    )
    with one.setup_kernel(env={**os.environ, "OMP_NUM_THREADS": "1"}):
        yield one


def smaller(path):
    """A notebook with its settings of :data:`SMALLER`."""
    found, source = nbformat.read(path, as_version=4), ""
    for cell in found.cells:
        source += cell.source
        for setting, less in SMALLER.get(path.stem, {}).items():
            cell.source = cell.source.replace(setting, less)
    for setting in SMALLER.get(path.stem, ()):
        assert setting in source, f"{path.stem} has no {setting!r} any more"
    return found


@pytest.mark.slow
@pytest.mark.parametrize("path", TUTORIALS, ids=lambda p: p.stem)
def test_tutorial_runs(path, client, tmp_path):
    """In a folder of its own, and with no name that another tutorial has left behind."""
    client.nb = smaller(path)
    fresh = nbformat.v4.new_code_cell(f"%reset -f\n%cd -q {tmp_path}")
    for number, cell in enumerate([fresh, *client.nb.cells]):
        client.execute_cell(cell, number - 1)
    assert not list(tmp_path.iterdir()), "a tutorial left files behind"
