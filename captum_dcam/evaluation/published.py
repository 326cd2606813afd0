r"""What the papers print, to stand beside one's own results: other models and other data.

A table's name is the paper's short name, the table's number and, where it has several parts, the
part: ``Diffusion-CAM 2``, ``TAM 3 COCO``, ``MSEA+ARC 3 Qwen2-VL-2B``. Percent, except contrast
(a ratio), milliseconds and gigabytes.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import cache
from types import MappingProxyType
from typing import NamedTuple

from captum_dcam.errors import InputError, UnknownNameError, near
from captum_dcam.evaluation.published_figures import DIFFUSION_CAM, PAPERS, Printed
from captum_dcam.evaluation.published_plausibility import MSEA_ARC, TAM

#: a row's label → column → figure; what is not printed is not in it
Rows = Mapping[str, Mapping[str, float]]

_F3 = "F3 above that of the printed means: no mean of F3s is, for the harmonic mean is concave"
_F1 = "F1-IoU is not that of the printed IoUs"
#: (table, row) → what does not agree in it, or with another table. Everything else agrees.
DOUBTFUL: Mapping[tuple[str, str], str] = MappingProxyType(
    {
        ("Diffusion-CAM 1 GranDf", "Diffusion-CAM"): "F3 is 0.04 below that of the printed means",
        ("Diffusion-CAM 2", "+ Denoising"): "F3 is 0.04 above that of the printed means",
        ("Diffusion-CAM 2", "Full"): "Table 1 prints another concentration",
        ("Diffusion-CAM 3", "LLaVA-CAM: layer 10"): "Table 1 prints another F3",
        ("Diffusion-CAM 5", "t = 0"): _F3,
        ("Diffusion-CAM 6", "0.18"): f"{_F3}; the branches' shares add up to 101",
        **{("Diffusion-CAM 6", row): _F3 for row in ("0.20", "0.26")},
        **{("Diffusion-CAM 7", row): _F3 for row in ("0.28", "0.32", "0.38", "0.42")},
        **{("Diffusion-CAM 8", row): _F3 for row in ("0.20", "0.23", "0.28", "0.30")},
        **{("Diffusion-CAM 9", row): _F3 for row in ("All α − 5", "All α + 5", "Fixed α = 85")},
        **{("Diffusion-CAM 12", row): _F3 for row in ("original", "verbose", "repeated")},
        ("Diffusion-CAM 11", "Diffusion-CAM (full)"): "1.8 ms less than Table 10 adds up to",
        ("TAM 3 OpenPSG", "Grad-Rollout"): f"{_F1}, 3.09: a digit too many",
        ("MSEA+ARC 1 OpenPSG", "Grad-Rollout"): f"{_F1}, 3.09: taken over from TAM",
        ("MSEA+ARC 2 COCO", "InternVL2.5-8B: Ours"): f"{_F1}, 44.69",
        ("MSEA+ARC 2 OpenPSG", "Qwen2-VL-2B: CAM"): f"{_F1}: Table 1 prints Func-IoU 48.57",
        ("MSEA+ARC 3 LLaVA1.5-7B", "TAM"): "Table 2 prints the row Mean mitigation for TAM",
    }
)


class _Part(NamedTuple):
    """One part of a printed table: its figures, and where they stand."""

    rows: Rows
    source: str


def _lines(text: str) -> Iterator[tuple[str, list[list[str]]]]:
    """(label, the numbers of every group) of a table's text."""
    for line in text.strip().splitlines():
        label, *groups = line.split("|")
        yield label.strip(), [group.split() for group in groups]


def _rows(printed: Printed, group: int) -> Rows:
    """The figures of one group of columns."""

    def numbers(text: str) -> dict[str, dict[str, float]]:
        found: dict[str, dict[str, float]] = {}
        for label, groups in _lines(text):
            pairs = zip(printed.columns, groups[group], strict=True)
            row = {column: float(value) for column, value in pairs if value != "-"}
            if found.setdefault(label, row) is not row:
                raise InputError(f"{printed.paper} {printed.number} has the row {label!r} twice")
        return found

    rows = numbers(printed.rows)
    for label, gains in numbers(printed.gains).items():
        base = rows[label]
        rows[f"{label} + Ours"] = {c: round(base[c] + gain, 2) for c, gain in gains.items()}
    return MappingProxyType({label: MappingProxyType(row) for label, row in rows.items()})


@cache
def _parts() -> Mapping[str, _Part]:
    """Every part by its name."""
    found: dict[str, _Part] = {}
    for printed in (*DIFFUSION_CAM, *TAM, *MSEA_ARC):
        for group, (end, what) in enumerate(printed.groups.items()):
            name = f"{printed.paper} {printed.number} {end}".rstrip()
            source = f"{PAPERS[printed.paper]}, Table {printed.number} ({what})"
            found[name] = _Part(_rows(printed, group), source)
    return MappingProxyType(found)


def _part(table: str) -> _Part:
    if table not in _parts():
        raise UnknownNameError(f"unknown published table {table!r}{near(table, _parts())}")
    return _parts()[table]


def published_tables() -> tuple[str, ...]:
    """Names of all tables, paper after paper."""
    return tuple(_parts())


def figures(table: str) -> Rows:
    """All rows of a table; UnknownNameError with near names if there is none of that name."""
    return _part(table).rows


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
    return _part(table).source
