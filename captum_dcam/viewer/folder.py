r"""Output folders: pictures to look at, and the data; all of it or nothing."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

from captum_dcam.files import COMPRESSION, write_text
from captum_dcam.results.comparison import Comparison
from captum_dcam.results.explanation import Explanation
from captum_dcam.results.manifests import check_folder, new_folder
from captum_dcam.results.model_comparison import ModelComparison
from captum_dcam.viewer.explorer import PAGE, explorer_page
from captum_dcam.viewer.models_panel import models_panel
from captum_dcam.viewer.overlay import fitted, word_overlay
from captum_dcam.viewer.panel import comparison_panel
from captum_dcam.viewer.sheet import captioned, contact_sheet
from captum_dcam.viewer.step_sheet import step_sheet

SHEET, DATA, PANEL = "sheet.png", "explanation", "panel.png"
#: beside the sheet, where there are maps of every step
STEPS = "steps.png"
#: longer side, in pixels, of a single word's picture: at least, at most
SMALLEST, LARGEST = 480, 1600


def prepare_folder(folder: str | Path, kind: str = "explanation") -> Path:
    r"""Check, before any long work, that ``folder`` can be written.

    Args:
        folder (path): where to.
        kind (str, optional): what it may hold from earlier: ``explanation`` or
            ``comparison``. Default: ``"explanation"``

    Returns:
        Path: absolute, links followed.

    Raises:
        OccupiedError: it exists and is not an earlier output, or holds a file that was changed.
        NoFolderError, ForbiddenError: it cannot be written.
    """
    folder = Path(folder).resolve()
    check_folder(folder, kind, beside=kind == DATA)
    return folder


def word_files(explanation: Explanation) -> list[tuple[int, int, str]]:
    """(target, image, file name) of every overlay, numbers from 0.

    Names are ``word-03-circle.png``, with ``-image-2`` where there are several images.
    """
    images = explanation.layout.images
    out = []
    for n, word in enumerate(explanation.words):
        slug = re.sub(r"[^\w]+", "-", word.lower()).strip("-_")[:40] or "token"
        for i in images:
            suffix = f"-image-{i + 1}" if len(explanation.images) > 1 else ""
            out.append((n, i, f"word-{n + 1:02d}-{slug}{suffix}.png"))
    return out


def write_folder(
    explanation: Explanation,
    folder: str | Path,
    *,
    mode: str = "bilinear",
    progress: Callable[[str], None] | None = None,
) -> Path:
    r"""Write overlays, sheet and data into ``folder``, which appears complete or not at all.

    Files: ``word-01-….png``, … (the image's own size, enlarged or reduced to a longer side of
    480 to 1600 px, and lines that say what it is), ``sheet.png``, ``steps.png`` where there are
    maps of every step, ``index.html`` (the explorer), and ``explanation/`` as
    :meth:`Explanation.save` writes it, with the hashes of the files beside it. An earlier output of
    the same name is replaced, unless it holds a file that its manifest does not name, or that was
    changed since.

    Args:
        explanation (Explanation): the result.
        folder (path): where to.
        mode (str, optional): ``bilinear`` or ``nearest``. Default: ``"bilinear"``
        progress (callable, optional): receives every file's name before it is written.

    Raises:
        FileError: as :func:`prepare_folder`, or it cannot be written; nothing is left behind.
    """
    folder = prepare_folder(folder)
    say = progress or (lambda _name: None)
    with new_folder(folder, DATA, beside=True) as new:
        for number, image, name in word_files(explanation):
            say(name)
            own = explanation.images[image].size
            side = min(max(*own, SMALLEST), LARGEST)
            size = fitted(own, side, side)
            shown = word_overlay(explanation, number, image, size=size, mode=mode)
            captioned(shown, explanation, number).save(new / name, compress_level=COMPRESSION)
        say(SHEET)
        contact_sheet(explanation, mode).save(new / SHEET, compress_level=COMPRESSION)
        if explanation.steps is not None:
            say(STEPS)
            step_sheet(explanation).save(new / STEPS, compress_level=COMPRESSION)
        say(PAGE)
        write_text(new / PAGE, explorer_page(explanation))
        say(DATA)
        explanation.save(new / DATA, sorted(new.iterdir()))
    return folder


def write_comparison(
    comparison: Comparison, folder: str | Path, *, scale: str = "map", mode: str = "bilinear"
) -> Path:
    r"""Write a comparison and its panel into ``folder``, which appears complete or not at all.

    Files: ``panel.png``, ``index.html`` (the explorer), and what :meth:`Comparison.save` writes.

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
    return comparison.save(folder, {PANEL: panel}, {PAGE: explorer_page(comparison)})


def write_models(found: ModelComparison, folder: str | Path) -> Path:
    r"""Write a comparison of models with its panel and page into ``folder``, which appears complete
    or not at all.

    Files: ``panel.png``, ``index.html`` (the explorer), and what :meth:`ModelComparison.save`
    writes.

    Raises:
        FileError: as :func:`prepare_folder`, or it cannot be written; nothing is left behind.
    """
    folder = prepare_folder(folder, "comparison")
    return found.save(folder, {PANEL: models_panel(found)}, {PAGE: explorer_page(found.comparison)})
