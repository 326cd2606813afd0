r"""Output folders: pictures to look at, and the data; all of it or nothing."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

from PIL import Image

from captum_dcam.files import check_folder, new_folder
from captum_dcam.results.comparison import Comparison
from captum_dcam.results.explanation import Explanation
from captum_dcam.viewer.overlay import fitted, word_overlay
from captum_dcam.viewer.panel import comparison_panel
from captum_dcam.viewer.sheet import contact_sheet

SHEET, DATA, PANEL = "sheet.png", "explanation", "panel.png"
#: names of the pictures beside the data
_BESIDE = r"word-\d+-.*\.png|sheet\.png"
#: longer side in pixels of the pictures of single words: at least, at most
SMALLEST, LARGEST = 480, 1600


def prepare_folder(folder: str | Path, kind: str = "explanation") -> Path:
    r"""Check, before any long work, that ``folder`` can be written.

    Args:
        folder (path): where to.
        kind (str, optional): what it may hold of an earlier run: ``explanation`` or
            ``comparison``. Default: ``"explanation"``

    Returns:
        Path: absolute, links followed.

    Raises:
        OccupiedError: it exists and is not an earlier output.
        NoFolderError, ForbiddenError: it cannot be written.
    """
    folder = Path(folder).resolve()
    check_folder(folder, kind, _BESIDE if kind == DATA else None)
    return folder


def word_file(number: int, word: str, image: int | None = None) -> str:
    """``word-03-circle.png``, with ``-image-2`` where there are several pictures."""
    slug = re.sub(r"[^\w]+", "-", word.lower()).strip("-_")[:40] or "token"
    suffix = "" if image is None else f"-image-{image + 1}"
    return f"word-{number:02d}-{slug}{suffix}.png"


def word_files(explanation: Explanation) -> list[tuple[int, int, str]]:
    """(target, picture, file name) of every overlay, numbers from 0."""
    several = len(explanation.images) > 1
    return [
        (n, i, word_file(n + 1, word, i if several else None))
        for n, word in enumerate(explanation.words)
        for i in range(len(explanation.images))
    ]


def write_folder(
    explanation: Explanation,
    folder: str | Path,
    *,
    mode: str = "bilinear",
    progress: Callable[[str], None] | None = None,
) -> Path:
    r"""Write overlays, sheet and data into ``folder``, which appears complete or not at all.

    Files: ``word-01-….png``, … (the picture's own size, enlarged or reduced to a longer side of
    480 to 1600 px), ``sheet.png``, and ``explanation/`` as :meth:`Explanation.save` writes it. An
    earlier output of the same name is replaced.

    Args:
        explanation (Explanation): the result.
        folder (path): where to.
        mode (str, optional): ``bilinear`` or ``nearest``. Default: ``"bilinear"``
        progress (callable, optional): is told every file's name before it is written.

    Raises:
        FileError: as :func:`prepare_folder`, or it cannot be written; nothing is left behind.
    """
    folder = prepare_folder(folder)
    say = progress if progress is not None else _silent
    with new_folder(folder, DATA, _BESIDE) as new:
        for number, image, name in word_files(explanation):
            say(name)
            size = _shown_size(explanation.images[image])
            word_overlay(explanation, number, image, size=size, mode=mode).save(new / name)
        say(SHEET)
        contact_sheet(explanation, mode).save(new / SHEET)
        say(DATA)
        explanation.save(new / DATA)
    return folder


def write_comparison(
    comparison: Comparison, folder: str | Path, *, scale: str = "map", mode: str = "bilinear"
) -> Path:
    r"""Write a comparison and its panel into ``folder``, which appears complete or not at all.

    Files: ``panel.png``, and what :meth:`Comparison.save` writes.

    Args:
        comparison (Comparison): the result.
        folder (path): where to; an earlier comparison there is replaced.
        scale (str, optional), mode (str, optional): as in
            :func:`captum_dcam.viewer.comparison_panel`.

    Raises:
        FileError: as :func:`prepare_folder`, or it cannot be written; nothing is left behind.
    """
    folder = prepare_folder(folder, "comparison")
    panel = comparison_panel(comparison, scale=scale, mode=mode)
    return comparison.save(folder, {PANEL: panel})


def _silent(_name: str) -> None:
    pass


def _shown_size(picture: Image.Image) -> tuple[int, int]:
    longest = max(picture.size)
    side = min(max(longest, SMALLEST), LARGEST)
    return fitted(picture.size, side, side)
