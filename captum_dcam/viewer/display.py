"""What :mod:`captum_dcam.results.display` shows results with."""

from __future__ import annotations

import io
from pathlib import Path

from PIL import Image

from captum_dcam.results.comparison import Comparison
from captum_dcam.results.explanation import Explanation
from captum_dcam.viewer.animation import write_animation as animate
from captum_dcam.viewer.explorer import check_page, explorer_page, write_page
from captum_dcam.viewer.figure import word_figure as plot
from captum_dcam.viewer.panel import comparison_panel
from captum_dcam.viewer.sheet import contact_sheet

__all__ = ["animate", "page", "plot", "png", "write"]

#: width of the picture beside a notebook's frame, and its number of colours: a stored notebook
#: stays small
WIDTH, COLORS = 1000, 256

page = explorer_page


def write(result: Explanation | Comparison, file: str | Path) -> Path:
    """Write the explorer; what is no earlier page is refused before it is made."""
    check_page(file)
    return write_page(explorer_page(result), file)


def png(result: Explanation | Comparison) -> bytes:
    """The contact sheet, or the panel of a comparison, as PNG with few colours."""
    if isinstance(result, Comparison):
        picture = comparison_panel(result, width=WIDTH)
    else:
        picture = contact_sheet(result, width=WIDTH)
    file = io.BytesIO()
    small = picture.quantize(COLORS, Image.Quantize.FASTOCTREE, dither=Image.Dither.NONE)
    small.save(file, "png", optimize=True)
    return file.getvalue()
