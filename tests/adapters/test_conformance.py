"""Every family in every mode passes the same seven checks."""

from pathlib import Path

import pytest

from captum_dcam.testing import CHECKS
from captum_dcam.testing.__main__ import cases_in

CASES = cases_in(Path(__file__).parent / "cases")


@pytest.mark.parametrize("check", CHECKS)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_conformance(case, check):
    CHECKS[check](case)
