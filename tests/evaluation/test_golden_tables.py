"""Every table as it was before tables became specifications: the same text, byte for byte.

The fixtures hold what the code of before (commit 8b3c7cd) made of the stores that are made here.
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


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("golden")
    made_results.results(folder, "all", count=4, fails=("tam:eci", "attention"))
    plan = suite("plausibility", made_results.setting())[0].plan
    made_results.fill(folder, Part(".", plan), 3)
    results = Results(folder)
    return {name: table(name, results) for name in TABLES}


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
