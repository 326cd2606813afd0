r"""The papers' tables, and ours, from stored results.

    table("comparison", "runs/papers").markdown()

A table reads the parts that it needs from folders under the results' folder, as
``captum-dcam evaluate --suite …`` leaves them; :mod:`captum_dcam.evaluation.suites` says what each
part measures.
"""

from captum_dcam.evaluation.tables.registry import TABLES, Results, register_table, table
from captum_dcam.registry import import_modules

__all__ = ["TABLES", "Results", "register_table", "table"]

import_modules(__name__, __path__)
