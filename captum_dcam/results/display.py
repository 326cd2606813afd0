r"""How results are shown in notebooks and browsers.

The viewer lies above the results and draws them; the package enters it here (:func:`enter_viewer`),
and it is imported when something is shown first. This module imports nothing heavy: it is read
with the package.
"""

from __future__ import annotations

import base64
import html
import sys
import webbrowser
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

from captum_dcam.errors import NotBoundError

#: height of a notebook's frame in pixels
HEIGHT = 940


class Viewer(Protocol):
    """What draws results: :mod:`captum_dcam.viewer.display`."""

    def page(self, result: Any) -> str:
        """One HTML file."""

    def write(self, result: Any, file: str | Path) -> Path:
        """The same, written."""

    def png(self, result: Any) -> bytes:
        """A picture of the whole result."""

    def plot(self, result: Any, words: Any, **how: Any) -> Any:
        """A matplotlib figure of some words."""

    def animate(self, result: Any, file: str | Path, **how: Any) -> Path:
        """A GIF of the answer filling in."""


_entered: list[Callable[[], Viewer]] = []


def enter_viewer(load: Callable[[], Viewer]) -> None:
    """Let ``load`` give the viewer when something is shown; the last one entered counts."""
    _entered[:] = [load]


def viewer() -> Viewer:
    """The viewer that was entered."""
    if not _entered:
        raise NotBoundError("no viewer is there: import captum_dcam first")
    return _entered[0]()


class Displayed:
    """A result that can be looked at."""

    def to_html(self, path: str | Path | None = None) -> str | Path:
        r"""The explorer: one HTML file that opens without a server and without a network.

        Args:
            path (path, optional): where to write it; an earlier page is replaced, nothing else is.
                Default: it is not written

        Returns:
            str or Path: the HTML, or where it was written.

        Raises:
            OccupiedError: a file is there that is no earlier page.
            FileError: it cannot be written; nothing is left half written.
        """
        return viewer().page(self) if path is None else viewer().write(self, path)

    def show(self) -> None:
        """Display the explorer in a notebook; elsewhere open it in a browser."""
        ipython = sys.modules.get("IPython")
        shell = None if ipython is None else ipython.get_ipython()
        if shell is not None and hasattr(shell, "kernel"):
            ipython.display.display(self)  # type: ignore[union-attr]  # it is there: it has a shell
            return
        from captum_dcam.files import write_temporary

        webbrowser.open(write_temporary("explorer.html", viewer().page(self)).as_uri())

    def _repr_html_(self) -> str:
        """The explorer in a frame of its own, so that nothing of it meets the notebook's page."""
        page = html.escape(viewer().page(self), quote=True)
        style = f"width:100%;height:{HEIGHT}px;border:0"
        return f'<iframe sandbox="allow-scripts" style="{style}" srcdoc="{page}"></iframe>'

    def _repr_mimebundle_(self, include: Any = None, exclude: Any = None) -> dict[str, str]:
        """The frame, and a picture for where frames are stripped, as on hosts of repositories."""
        return {
            "text/plain": repr(self),
            "text/html": self._repr_html_(),
            "image/png": base64.b64encode(viewer().png(self)).decode(),
        }
