r"""Texts of others where they are shown: on a terminal, in Markdown, in a spreadsheet.

Prompts, answers, names of files, and what other people's plans and stores say are data. None of it
moves a cursor, breaks a table or is computed.

>>> print(harmless("red\x1b[31m circle"), in_markdown("a|b"), no_formula("=1+1"), no_formula(-1))
red\x1b[31m circle a\|b '=1+1 -1
"""

from __future__ import annotations

import re
from typing import Any

#: what a terminal obeys instead of showing it, or shows in another order: control characters but
#: for the end of a line, marks of direction, and bytes that are no text
ORDERS = re.compile(
    "[\x00-\x09\x0b-\x1f\x7f-\x9f\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]"
)
#: how a formula begins, in Excel, LibreOffice and Google Sheets
_FORMULA = frozenset("=+-@\t\r＝＋－＠")


def harmless(text: str) -> str:
    r"""The text with everything that a terminal obeys written out: ``\x1b`` for an escape."""
    return ORDERS.sub(_written_out, text)


def _written_out(found: re.Match[str]) -> str:
    code = ord(found[0])
    return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}"


def in_markdown(cell: str) -> str:
    """A cell of a Markdown table that stays one cell, on one line."""
    return cell.replace("\n", " ").replace("\r", " ").replace("|", r"\|")


def no_formula(cell: Any) -> Any:
    """A cell of a CSV file: a text that a spreadsheet would compute gets an apostrophe before it,
    and none ends its line; numbers stay."""
    if not isinstance(cell, str):
        return cell
    text = cell.replace("\r", " ")
    return f"'{text}" if cell[:1] in _FORMULA else text
