r"""Output folders: pictures to look at, and the data; all of it or nothing."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from pathlib import Path

from PIL import Image

from captum_dcam.errors import ForbiddenError, NoFolderError, OccupiedError
from captum_dcam.files import file_errors, new_folder
from captum_dcam.results.comparison import Comparison, check_folder, save_comparison
from captum_dcam.results.explanation import Explanation
from captum_dcam.viewer.overlay import fitted, word_overlay
from captum_dcam.viewer.panel import comparison_panel
from captum_dcam.viewer.sheet import contact_sheet

SHEET, DATA, PANEL = "sheet.png", "explanation", "panel.png"
_OURS = re.compile(r"word-\d+-.*\.png|sheet\.png|explanation")
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
        FileExistsError: it exists and is not an earlier output.
        OSError: it cannot be written.
    """
    folder = Path(folder).resolve()
    with file_errors(folder):
        if kind == "comparison":
            check_folder(folder)
        elif folder.exists():
            _check_ours(folder)
        parent = next(p for p in folder.parents if p.exists())
        if not parent.is_dir():
            raise NoFolderError(f"{parent} is not a folder: choose another output folder")
        for place in (parent, folder):
            if place.exists() and not os.access(place, os.W_OK | os.X_OK):
                raise ForbiddenError(f"{place} is not writable: choose another output folder")
    return folder


def _check_ours(folder: Path) -> None:
    if not folder.is_dir():
        raise OccupiedError(f"{folder} exists and is not a folder: choose another output")
    names = sorted(p.name for p in folder.iterdir())
    strange = [name for name in names if not _OURS.fullmatch(name)]
    if strange or (names and not (folder / DATA / "manifest.json").is_file()):
        found = f" (it holds {strange[0]})" if strange else ""
        raise OccupiedError(
            f"{folder} exists and is not an earlier output{found}: choose another folder"
        )


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
        FileExistsError, OSError: as :func:`prepare_folder`; nothing is left behind.
    """
    folder = prepare_folder(folder)
    say = progress if progress is not None else _silent
    with new_folder(folder) as new:
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
        FileExistsError, OSError: as :func:`prepare_folder`; nothing is left behind.
    """
    folder = prepare_folder(folder, "comparison")
    panel = comparison_panel(comparison, scale=scale, mode=mode)
    return save_comparison(comparison, folder, {PANEL: panel})


def _silent(_name: str) -> None:
    pass


def _shown_size(picture: Image.Image) -> tuple[int, int]:
    longest = max(picture.size)
    side = min(max(longest, SMALLEST), LARGEST)
    return fitted(picture.size, side, side)
