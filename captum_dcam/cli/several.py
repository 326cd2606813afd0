r"""Several images of one command: a folder for each, a summary and an index of all beside them."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from captum_dcam.cli.parsing import Subject
from captum_dcam.cli.printing import Say
from captum_dcam.errors import DcamError, EvaluationError, OccupiedError

SUMMARY = "summary.json"
#: of each kind of result: the file in a folder that holds one alone
ALONE = {"explanation": "explanation/manifest.json", "comparison": "comparison.json"}
#: what is done with one image: its folder, what it is, and who is told; gives its document
One = Callable[[Path, Subject, Say], dict[str, Any]]


@dataclass(frozen=True)
class Several:
    r"""What was made of several images, each in a folder of its own.

    Args:
        folder (Path): that of all.
        kind (str): ``explanation`` or ``comparison``.
        documents (tuple of dict): one per image, as the command's ``--json`` has it.
    """

    folder: Path
    kind: str
    documents: tuple[dict[str, Any], ...]

    @property
    def page(self) -> Path:
        """The index of all."""
        from captum_dcam.viewer.explorer import PAGE

        return self.folder / PAGE

    @property
    def places(self) -> dict[str, str]:
        """Where everything lies, for people."""
        return {
            "Page": str(self.page),
            "Summary": str(self.folder / SUMMARY),
            "Folder": f"{self.folder} (one per image)",
        }

    def document(self) -> dict[str, Any]:
        """All of it as plain data."""
        folder = str(self.folder)
        return {f"{self.kind}s": list(self.documents), "output": folder, "summary": SUMMARY}


def places_of(output: Path | None, found: Sequence[Subject], kind: str) -> dict[Path, Subject]:
    r"""A checked output folder for each. Images are read here, so that a bad one is refused before
    any work.

    Args:
        output (Path or None): ``--output``; None: ``kind``, and ``kind`` with an s of several.
        found (sequence of Subject): what is asked about.
        kind (str): of :data:`ALONE`.
    """
    from captum_dcam.results.manifests import check_listed
    from captum_dcam.viewer import prepare_folder

    if len(found) == 1:
        place = prepare_folder(output or Path(kind), kind)
        found[0].read()
        return {place: found[0]}
    folder = (output or Path(f"{kind}s")).resolve()
    for held, file in ALONE.items():
        if (folder / file).is_file():
            raise OccupiedError(
                f"{folder} holds the {held} of one image: choose another folder for {len(found)}"
            )
    check_listed(folder, f"{kind}s")
    places: dict[Path, Subject] = {}
    for subject in found:
        subject.read()
        stem = re.sub(r"[^\w.-]+", "-", (*subject.paths, *subject.videos)[0].stem).strip("-.")
        names = (stem or "image", *(f"{stem or 'image'}-{n}" for n in range(2, len(found) + 1)))
        place = next(folder / name for name in names if folder / name not in places)
        places[prepare_folder(place, kind)] = subject
    return places


def each(places: Mapping[Path, Subject], kind: str, one: One, say: Say) -> Several:
    """One image after the other. What comes before one that fails stays, and is summarised."""
    home, count = next(iter(places)).parent, len(places)
    documents: list[dict[str, Any]] = []
    for number, (folder, subject) in enumerate(places.items(), 1):

        def told(text: str, head: str = f"{number} of {count}, {subject.source}") -> None:
            say(f"{head}: {text}")

        try:
            documents.append(one(folder, subject, told))
        except DcamError as error:
            if documents:
                _write_summary(home, kind, documents)
            kept = f"; {len(documents)} of {count} are done, in {home}" if documents else ""
            raise EvaluationError(f"{subject.source}: {error}{kept}") from error
    _write_summary(home, kind, documents)
    return Several(home, kind, tuple(documents))


def _write_summary(folder: Path, kind: str, documents: Sequence[dict[str, Any]]) -> None:
    """The documents of all, and a page with a link to each, beside their folders."""
    from captum_dcam.cli.view import folder_page
    from captum_dcam.results.manifests import write_listed
    from captum_dcam.viewer.explorer import PAGE

    text = json.dumps({f"{kind}s": documents}, indent=1, ensure_ascii=False)
    write_listed(folder, {SUMMARY: text + "\n", PAGE: folder_page(folder, folder)}, f"{kind}s")
