r"""The output folder of an explanation: pictures to look at, and the data; all of it or nothing."""

from __future__ import annotations

import os
import re
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

from PIL import Image

from captum_dcam.explanation import Explanation
from captum_dcam.viewer.overlay import fitted, word_overlay
from captum_dcam.viewer.sheet import contact_sheet

SHEET, DATA = "sheet.png", "explanation"
_OURS = re.compile(r"word-\d+-.*\.png|sheet\.png|explanation")
#: longer side in pixels of the pictures of single words: at least, at most
SMALLEST, LARGEST = 480, 1600


def prepare_folder(folder: str | Path) -> Path:
    r"""Check, before any long work, that ``folder`` can be written.

    Returns:
        Path: absolute, links followed.

    Raises:
        FileExistsError: it exists and is not an earlier output.
        OSError: it cannot be written.
    """
    folder = Path(folder).resolve()
    if folder.exists():
        _check_ours(folder)
    parent = next(p for p in folder.parents if p.exists())
    if not parent.is_dir():
        raise NotADirectoryError(f"{parent} is not a folder: choose another output folder")
    for place in (parent, folder):
        if place.exists() and not os.access(place, os.W_OK | os.X_OK):
            raise PermissionError(f"{place} is not writable: choose another output folder")
    return folder


def _check_ours(folder: Path) -> None:
    if not folder.is_dir():
        raise FileExistsError(f"{folder} exists and is not a folder: choose another output")
    names = sorted(p.name for p in folder.iterdir())
    strange = [name for name in names if not _OURS.fullmatch(name)]
    if strange or (names and not (folder / DATA / "manifest.json").is_file()):
        found = f" (it holds {strange[0]})" if strange else ""
        raise FileExistsError(
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
    folder.parent.mkdir(parents=True, exist_ok=True)
    say = progress if progress is not None else _silent
    work = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        new = work / "new"
        new.mkdir()
        for number, image, name in word_files(explanation):
            say(name)
            size = _shown_size(explanation.images[image])
            word_overlay(explanation, number, image, size=size, mode=mode).save(new / name)
        say(SHEET)
        contact_sheet(explanation, mode).save(new / SHEET)
        say(DATA)
        explanation.save(new / DATA)
        _swap(new, folder, work / "old")
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return folder


def _silent(_name: str) -> None:
    pass


def _shown_size(picture: Image.Image) -> tuple[int, int]:
    longest = max(picture.size)
    side = min(max(longest, SMALLEST), LARGEST)
    return fitted(picture.size, side, side)


def _swap(new: Path, folder: Path, old: Path) -> None:
    """Put ``new`` in the place of ``folder``; what was there comes back if that fails."""
    there = folder.exists()
    if there:
        folder.rename(old)
    try:
        new.rename(folder)
    except OSError:
        if there:
            old.rename(folder)
        raise
