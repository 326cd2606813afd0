r"""The first hour with real weights: can what I see be believed?

:func:`doctor` looks at a model in the order in which things go wrong, from its packages to its
maps, and reports line by line what it found and what to do next; ``captum-dcam doctor MODEL`` is
the same on the command line.
"""

from captum_dcam.doctor.checkup import doctor
from captum_dcam.doctor.report import VERDICTS, Line, Report

__all__ = ["VERDICTS", "Line", "Report", "doctor"]
