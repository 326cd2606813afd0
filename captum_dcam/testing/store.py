"""Rows of the conformance table, kept in a file, as runs for different families add them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from captum_dcam.errors import InputError
from captum_dcam.files import write_json
from captum_dcam.testing.report import ConformanceRow, Outcome, markdown

#: what stands around the table in a document
BEGIN, END = "<!-- conformance table: begin -->", "<!-- conformance table: end -->"


def read_rows(path: Path) -> list[ConformanceRow]:
    """Rows of a file; none where there is no file."""
    if not path.exists():
        return []
    records = json.loads(path.read_text(encoding="utf-8"))
    return [
        ConformanceRow(**{**r, "outcomes": tuple(Outcome(**o) for o in r["outcomes"])})
        for r in records
    ]


def merge_rows(path: Path, rows: Sequence[ConformanceRow]) -> list[ConformanceRow]:
    """Add rows to a file in place of earlier ones of the same case and code; returns all, by
    name."""
    merged = {(r.name, r.code): r for r in (*read_rows(path), *rows)}
    ordered = [merged[key] for key in sorted(merged)]
    write_json(path, [asdict(r) for r in ordered])
    return ordered


def document(text: str, rows: Sequence[ConformanceRow]) -> str:
    """A document with the table, and the commands that made it, between its two marks."""
    if text.count(BEGIN) != 1 or text.count(END) != 1:
        raise InputError(f"the document must hold the lines {BEGIN} and {END} once")
    head, rest = text.split(BEGIN)
    tail = rest.split(END)[1]
    return f"{head}{BEGIN}\n{markdown(rows)}\n\n{_commands(rows)}\n{END}{tail}"


def _commands(rows: Sequence[ConformanceRow]) -> str:
    """Every command once, with the versions that it ran with."""
    found = sorted({(r.command, r.versions) for r in rows})
    lines = [f"- `{command}` ({versions})" for command, versions in found]
    return "\n".join(["Commands that gave these rows:", "", *lines])
