"""Every table keeps its text, byte for byte, whatever the code behind it becomes.

Up to the rows that every method has since with affinity beside it, the fixtures hold what the code
before tables became specifications (commit 8b3c7cd) made of the stores that are made here. Where a
suite gets other rows, ``write`` makes them again: the numbers are drawn in the rows' order.
"""

import csv
import io
from pathlib import Path

import pytest
from evaluation import made_results

from captum_dcam.evaluation.suites import Part, suite
from captum_dcam.evaluation.table import FORMATS
from captum_dcam.evaluation.tables import TABLES, Results, table

GOLDEN = Path(__file__).parents[1] / "fixtures" / "tables"


def golden(suffix):
    """Name → text of every table in a format."""
    text = (GOLDEN / f"tables.{suffix}").read_text(encoding="utf-8")
    return dict(part.split("\n", 1) for part in text.split("== ")[1:])


def write(folder):
    """Make the fixtures again; look at what changed before it is committed."""
    tables = drawn_in(folder)
    for suffix in ("md", "csv", "tex"):
        texts = (f"== {name}\n{FORMATS[suffix](one)}" for name, one in tables.items())
        (GOLDEN / f"tables.{suffix}").write_text("".join(texts), encoding="utf-8")


def drawn_in(folder):
    """All tables of stores with drawn scores; ``test_inventions`` makes those of inventions."""
    made_results.results(folder, "all", count=4, fails=("tam:eci", "attention"))
    plan = suite("plausibility", made_results.setting())[0].plan
    made_results.fill(folder, Part(".", plan), 3)
    results = Results(folder)
    return {name: table(name, results) for name in TABLES if not name.startswith("inventions")}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    return drawn_in(tmp_path_factory.mktemp("golden"))


def test_the_tables_are_those_of_before_in_their_order(made):
    assert list(made) == list(golden("md")) == list(golden("csv"))


@pytest.mark.parametrize(
    "suffix, name", [(suffix, name) for suffix in ("md", "tex") for name in golden(suffix)]
)
def test_text_is_the_same_to_the_byte(made, suffix, name):
    assert FORMATS[suffix](made[name]) == golden(suffix)[name]


@pytest.mark.parametrize("name", golden("csv"))
def test_figures_are_the_same_to_the_last_digits(made, name):
    """Processors may differ in the very last one."""
    expected, found = (
        list(csv.reader(io.StringIO(text))) for text in (golden("csv")[name], made[name].csv())
    )
    for row, other in zip(expected, found, strict=True):
        for cell, mine in zip(row, other, strict=True):
            if cell != mine:
                assert float(mine) == pytest.approx(float(cell), rel=1e-12)
