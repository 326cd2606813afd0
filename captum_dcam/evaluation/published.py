r"""What the papers print, to stand beside one's own results: other models and other data.

The figures lie in ``tables/published.toml``, which also says how it is written. A table's name is
the paper's short name, the table's number and, where it has several parts, the part:
``Diffusion-CAM 2``, ``TAM 3 COCO``, ``MSEA+ARC 3 Qwen2-VL-2B``. Percent, except contrast (a ratio),
milliseconds and gigabytes.

>>> published("Diffusion-CAM 1 COCO", "Diffusion-CAM", "F3")
23.04
>>> source("TAM 1")
'TAM, Li et al., ICCV 2025, Table 1 (Qwen2-VL-2B, COCO Caption minival)'
>>> DOUBTFUL["Diffusion-CAM 11", "Diffusion-CAM (full)"]
'1.8 ms less than Table 10 adds up to'
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

from captum_dcam.errors import UnknownNameError, near

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

#: a row's label → column → figure; what is not printed is not in it
Rows = Mapping[str, Mapping[str, float]]


def read_toml(path: Path) -> dict[str, Any]:
    """The content of a TOML file."""
    return tomllib.loads(path.read_text(encoding="utf-8"))


_TABLES = read_toml(Path(__file__).parent / "tables" / "published.toml")
#: (table, row) → what does not agree in it, or with another table. Everything else agrees.
DOUBTFUL: Mapping[tuple[str, str], str] = MappingProxyType(
    {(t, row): why for t, one in _TABLES.items() for row, why in one.get("doubtful", {}).items()}
)


def _rows(table: Mapping[str, Any]) -> Rows:
    """The figures of a table, and the gains that it prints, added to their bases."""
    rows = {
        label: dict(zip(table["columns"], map(float, printed), strict=False))
        for label, printed in table["rows"].items()
    }
    for label, gains in table.get("gains", {}).items():
        base = rows[label].items()
        rows[f"{label} + Ours"] = {
            column: round(value + gain, 2)
            for (column, value), gain in zip(base, gains, strict=True)
        }
    return MappingProxyType({label: MappingProxyType(row) for label, row in rows.items()})


_ROWS = {name: _rows(table) for name, table in _TABLES.items()}


def published_tables() -> tuple[str, ...]:
    """Names of all tables, paper after paper."""
    return tuple(_TABLES)


def figures(table: str) -> Rows:
    """All rows of a table; UnknownNameError with near names if there is none of that name."""
    if table not in _ROWS:
        raise UnknownNameError(f"unknown published table {table!r}{near(table, _ROWS)}")
    return _ROWS[table]


def published(table: str, row: str, column: str) -> float | None:
    r"""A figure as it is printed.

    Args:
        table (str): one of :func:`published_tables`.
        row (str): label of its row.
        column (str): such as ``Obj-IoU``, ``Contrast``, ``Concentration``, ``F3``, ``Func-IoU``,
            ``F1-IoU``, ``Time (ms)``; ``F3 ±`` where a spread is printed.

    Returns:
        float or None: percent (contrast: a ratio); None where the table prints nothing of the kind.

    Raises:
        UnknownNameError: no such table, with near names.
    """
    return figures(table).get(row, {}).get(column)


def source(table: str) -> str:
    """Paper, table number, model and data of a table; UnknownNameError for an unknown one."""
    figures(table)
    return str(_TABLES[table]["source"])
