r"""Conformance of an adapter: seven checks that a third party runs against its own.

Describe the adapter by an :class:`AdapterCase`, then run :func:`check_all`, a single check, or all
of them as tests (:class:`AdapterSuite`); ``python -m captum_dcam.testing FILE…`` prints the table.
"""

from captum_dcam.errors import ConformanceError
from captum_dcam.testing.case import SIZES, AdapterCase, Reference
from captum_dcam.testing.gradients import (
    Feasibility,
    check_feasible,
    check_gradient,
    feasibility,
)
from captum_dcam.testing.head import check_head
from captum_dcam.testing.inputs import check_inputs
from captum_dcam.testing.placing import check_layout
from captum_dcam.testing.replay import check_replay
from captum_dcam.testing.report import (
    CHECKS,
    AdapterSuite,
    ConformanceRow,
    Outcome,
    check_all,
    markdown,
)
from captum_dcam.testing.residue import check_nothing_left

__all__ = [
    "CHECKS",
    "SIZES",
    "AdapterCase",
    "AdapterSuite",
    "ConformanceError",
    "ConformanceRow",
    "Feasibility",
    "Outcome",
    "Reference",
    "check_all",
    "check_feasible",
    "check_gradient",
    "check_head",
    "check_inputs",
    "check_layout",
    "check_nothing_left",
    "check_replay",
    "feasibility",
    "markdown",
]
