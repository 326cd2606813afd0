r"""The papers' tables, and ours, from stored results.

>>> TABLES["placebo"].__doc__
"Another object's map in the place of the word's own."

``table("placebo", "runs/papers").markdown()`` makes it. A table is a :class:`TableSpec`; ours are
in ``tables.toml``. It reads the parts that it needs from folders under the results' folder, as
``captum-dcam evaluate --suite …`` leaves them; :mod:`captum_dcam.evaluation.suites` says what each
part measures.
"""

from pathlib import Path

from captum_dcam.evaluation.tables.engine import (
    TABLES,
    ColumnSpec,
    Results,
    TableRow,
    TableSpec,
    add_table,
    add_tables,
    register_cells,
    register_notes,
    register_rows,
    register_table,
    table,
)
from captum_dcam.registry import import_modules

__all__ = [
    "TABLES",
    "ColumnSpec",
    "Results",
    "TableRow",
    "TableSpec",
    "add_table",
    "add_tables",
    "register_cells",
    "register_notes",
    "register_rows",
    "register_table",
    "table",
]

import_modules(__name__, __path__)
for _path in sorted(Path(__file__).parent.glob("*.toml")):
    if _path.stem != "published":
        add_tables(_path)
