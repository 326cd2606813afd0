r"""The papers' tables, and ours, from stored results.

    table("comparison", "runs/papers").markdown()

A table reads the parts that it needs from folders under the results' folder, as
``captum-dcam evaluate --suite …`` leaves them; :mod:`captum_dcam.evaluation.suites` says what each
part measures.
"""

# Being imported enters tables in the registry.
from captum_dcam.evaluation.tables import (  # noqa: F401
    cost,
    faithful,
    objects,
    plausible,
    reliable,
    steps,
    summary,
)
from captum_dcam.evaluation.tables.registry import TABLES, Results, register_table, table

__all__ = ["TABLES", "Results", "register_table", "table"]
