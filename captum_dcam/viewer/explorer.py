r"""The explorer: one HTML file that shows an answer as it was written, with the map of every word.

It needs no server and no network: style, script and data are in it, and its policy forbids all
else. Its parts are the files ``explorer.html``, ``explorer.css``, ``explorer_data.js``,
``explorer_draw.js`` and ``explorer.js`` (``index.js`` for an index over images) beside this one;
what they read is the document of :mod:`captum_dcam.viewer.explorer_document`, as JSON.
"""

from __future__ import annotations

import html
import json
import os
from collections.abc import Mapping
from functools import lru_cache
from importlib.resources import files as packaged
from pathlib import Path
from typing import Any

from captum_dcam.errors import OccupiedError
from captum_dcam.files import check_names, digest, without_nan, write_text
from captum_dcam.results.comparison import Comparison
from captum_dcam.results.explanation import Explanation
from captum_dcam.viewer.explorer_document import explorer_document

#: the scripts of both kinds of pages, in order
EXPLORER = ("explorer_data.js", "explorer_draw.js", "explorer.js")
INDEX = ("index.js",)
PAGE = "index.html"
#: the last line of a page: a digest of all before it, so that a later page may replace it
SEAL = "<!-- captum-dcam page {} -->\n"


def explorer_page(result: Explanation | Comparison) -> str:
    """The page of an explanation or a comparison, as HTML."""
    return page_of(explorer_document(result))


def page_of(document: Mapping[str, Any], scripts: tuple[str, ...] = EXPLORER) -> str:
    r"""A page from its document.

    Args:
        document (mapping): JSON-able; what is no finite number becomes null. Has a ``title``.
        scripts (tuple of str, optional): files beside this one. Default: the explorer's
    """
    data = json.dumps(without_nan(document), separators=(",", ":")).replace("<", "\\u003c")
    parts = {
        "title": html.escape(str(document["title"]).encode(errors="replace").decode()),
        "style": _part("explorer.css"),
        "script": "\n".join(map(_part, scripts)),
        "data": data,
    }
    page = _part("explorer.html" if scripts == EXPLORER else "index.html")
    pieces = page.split("@")
    # every second piece is a name between two signs; the template has no other
    body = "".join(parts[piece] if i % 2 else piece for i, piece in enumerate(pieces))
    return body + SEAL.format(digest(body))


@lru_cache(maxsize=8)
def _part(name: str) -> str:
    return packaged(__package__).joinpath(name).read_text(encoding="utf-8")


def check_page(file: str | Path) -> Path:
    r"""Check, before any work, that a page may be written: nothing is there but an earlier page.

    Raises:
        OccupiedError: something else is there, or a page that was changed since.
        FileError: a name that the file system does not take.
    """
    file = Path(file)
    check_names(file, 0)
    if os.path.lexists(file) and not _sealed(file):
        raise OccupiedError(
            f"{file} is not an earlier page, or was changed since it was written, and is yours: "
            "choose another file, or move it away"
        )
    return file


def write_page(page: str, file: str | Path) -> Path:
    """Write a page, all of it or nothing; raises as :func:`check_page`."""
    file = check_page(file)
    write_text(file, page)
    return file


def _sealed(file: Path) -> bool:
    """Whether a file is a page as it was written."""
    if file.is_symlink() or not file.is_file():
        return False
    body, _, last = file.read_bytes().rpartition(b"<!-- captum-dcam page ")
    return last.decode(errors="replace") == SEAL.format(digest(body)).removeprefix(
        "<!-- captum-dcam page "
    )
