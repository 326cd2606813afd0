r"""Saved results: folders and files that a manifest names, with a hash of each.

What is there already is replaced where a manifest names it with its hash, and refused otherwise: it
is the user's.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from PIL import Image
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from captum_dcam.errors import (
    ExplanationError,
    FileError,
    ForbiddenError,
    NoFolderError,
    OccupiedError,
    SavedError,
)
from captum_dcam.files import (
    UNSEALED,
    VERSION,
    WITHOUT,
    check_names,
    check_seal,
    digest,
    new_entries,
    read_json,
    reading,
    sealed,
    write_json,
    write_text,
    writing,
)

#: what is saved → the file that holds its manifest
FILES = {
    "explanation": "manifest.json",
    "comparison": "comparison.json",
    "tables": "tables.json",
    "explanations": "explanations.json",
    "comparisons": "comparisons.json",
}


# -- folders --------------------------------------------------------------------------------------


@contextmanager
def new_folder(
    folder: str | Path, kind: str = "explanation", beside: bool = False
) -> Iterator[Path]:
    r"""A new folder to fill. At the end it replaces ``folder``; after an error it is removed.

    Args:
        folder (path), kind (str), beside (bool, optional): as for :func:`check_folder`.

    Raises:
        FileError: as :func:`check_folder`, or it cannot be written; nothing is left behind.
    """
    folder = Path(folder).resolve()
    check_folder(folder, kind, beside)
    with new_entries([folder]) as (new,):
        new.mkdir()
        yield new
        check_folder(folder, kind, beside)  # what the user saved there meanwhile


def check_folder(folder: str | Path, kind: str = "explanation", beside: bool = False) -> None:
    r"""Check that a folder can be written: there is none yet, or nothing but an earlier result.

    Args:
        folder (path): where to.
        kind (str, optional): what it may hold from earlier, a key of :data:`FILES`.
            Default: ``"explanation"``
        beside (bool, optional): the result lies in a folder of its own called ``kind``, beside
            files that its manifest names. Default: the folder is the result

    Raises:
        OccupiedError: it exists and holds something else, or a file that was changed since.
        NoFolderError, ForbiddenError: it cannot be made or written.
        FileError: a name that the file system does not take.
    """
    folder = Path(folder)
    other = f"{folder} exists and is not an earlier {kind}"
    check_names(folder)
    with writing(folder):
        if folder.exists() and not folder.is_dir():
            raise OccupiedError(f"{other} (it is not a folder): choose another folder")
        parent = next(p for p in folder.absolute().parents if p.exists())
        if not parent.is_dir():
            raise NoFolderError(f"{parent} is not a folder: choose another output folder")
        for place in (parent, folder):
            if place.exists() and not os.access(place, os.W_OK | os.X_OK):
                raise ForbiddenError(f"{place} is not writable: choose another output folder")
        if folder.exists() and (strange := _strange(folder, kind, beside)):
            raise OccupiedError(f"{other} ({strange}): choose another folder")


def _strange(folder: Path, kind: str, beside: bool) -> str | None:
    """What a folder holds that no manifest of this kind names with its hash; None for nothing."""
    home = folder / kind if beside else folder
    names = sorted(f.name for f in folder.iterdir())
    if beside and home.is_symlink():
        return f"it holds {kind}, a link"
    try:
        manifest = read_manifest(home, kind)
        known = _named(home, kind, manifest)
        aside = _named(home, kind, manifest, "beside") if beside else {}
    except ExplanationError as error:
        edited = "not what was written" in str(error)
        return (str(error) if edited else f"it holds {names[0]}") if names else None
    places = [(file, known) for file in sorted(home.iterdir()) if file.name != FILES[kind]]
    if beside:
        others = [(folder / name, aside) for name in names if name != kind]
        places = others + places
    for file, own in places:
        if file.name not in own:
            return f"it holds {file.name}, which its manifest does not name"
        if not _as_written(file, own[file.name]):
            return f"{file} was changed since it was written, and is yours"
    return None


def _as_written(file: Path, expected: str | None) -> bool:
    """Whether a file, and no link to one, is what its hash says."""
    return not file.is_symlink() and file.is_file() and digest(file.read_bytes()) == expected


# -- files among the user's ------------------------------------------------------------------------


def check_listed(folder: Path, kind: str) -> dict[str, str]:
    r"""The files in a folder that its manifest names, with their hashes; others may lie beside.

    Raises:
        FileError: it cannot be made, or a manifest there is damaged.
    """
    check_names(folder)
    with writing(folder):
        if folder.exists() and not folder.is_dir():
            raise NoFolderError(f"{folder} is not a folder: choose another output folder")
        if not os.path.lexists(folder / FILES[kind]):
            return {}
    try:
        return _named(folder, kind, read_manifest(folder, kind))
    except ExplanationError as error:
        raise OccupiedError(f"{error}; choose another folder, or move it away") from error


def write_listed(folder: Path, texts: Mapping[str, str], kind: str) -> None:
    r"""Write texts into a folder that may hold other files, all or none, and list them in a
    manifest with their hashes, so that a later call may replace them.

    Args:
        folder (Path): made if need be.
        texts (mapping): name → text.
        kind (str): a key of :data:`FILES`.

    Raises:
        OccupiedError: a file of that name is there that the manifest does not name, or that was
            changed since.
        FileError: it cannot be written.
    """
    known = check_listed(folder, kind)
    with writing(folder):
        for name in texts:
            file = folder / name
            if os.path.lexists(file) and not _as_written(file, known.get(name)):
                raise OccupiedError(
                    f"{file} is none of the earlier {kind}, or was changed since it was written, "
                    "and is yours: choose another folder, or move it away"
                )
    own = {name: digest(text) for name, text in texts.items()}
    kept = {n: h for n, h in known.items() if os.path.lexists(folder / n)}
    record = {"format": f"captum-dcam {kind}", "version": VERSION, "files": {**kept, **own}}
    with new_entries([*(folder / name for name in texts), folder / FILES[kind]]) as places:
        for place, text in zip(places, texts.values(), strict=False):
            write_text(place, text)
        write_json(places[-1], sealed(record))


# -- manifests -------------------------------------------------------------------------------------


def write_manifest(folder: Path, content: Mapping[str, Any], kind: str = "explanation") -> None:
    """Write the manifest beside the files that are there already, with a hash of each, and a digest
    of all that it says."""
    record = {"format": f"captum-dcam {kind}", "version": VERSION, **content}
    record["files"] = hashes(sorted(folder.iterdir()))
    write_json(folder / FILES[kind], sealed(record))


def hashes(files: Iterable[Path]) -> dict[str, str]:
    """Name → hash of files."""
    return {file.name: digest(file.read_bytes()) for file in files}


def read_manifest(folder: Path, kind: str = "explanation") -> dict[str, Any]:
    """Content of the manifest; ExplanationError when it is none, damaged, edited or of a version
    that is not known."""
    path, again = folder / FILES[kind], f"make the {kind} again"
    with reading(path):
        if not path.is_file():
            raise ExplanationError(f"{folder} is not a saved {kind}: it has no {path.name}")
    manifest = read_json(path, ExplanationError, again)
    if manifest.get("format") != f"captum-dcam {kind}":
        raise ExplanationError(f"{path} is not the manifest of a saved {kind}; {again}")
    check_seal(path, manifest, ExplanationError, again)
    return manifest


def note_of(manifest: Mapping[str, Any]) -> str:
    """:data:`WITHOUT` for what was read without a digest, now or before it was saved again."""
    return WITHOUT if manifest["version"] == UNSEALED else str(manifest.get("note", ""))


def _named(
    folder: Path, kind: str, manifest: Mapping[str, Any], key: str = "files"
) -> dict[str, str]:
    """The files that a manifest names, with their hashes; ExplanationError where it names none as
    it should."""
    named = manifest.get(key, {} if key == "beside" else None)
    whole = isinstance(named, dict) and all(
        isinstance(value, str) and name == Path(name).name for name, value in named.items()
    )
    if not whole or (key == "files" and not named):
        raise ExplanationError(
            f"{folder / FILES[kind]} is damaged: {key!r} is {str(named)[:80]}: expected names of "
            f"files with their hashes; make the {kind} again"
        )
    return dict(named)


#: what reading damaged content raises, before anything is made of it
_DAMAGE = (
    KeyError,
    TypeError,
    IndexError,
    AttributeError,
    ValueError,
    OverflowError,
    OSError,
    RuntimeError,
    Image.DecompressionBombError,
)


@contextmanager
def opened(folder: str | Path, kind: str = "explanation") -> Iterator[dict[str, Any]]:
    """The manifest of a saved result, from which the result is built inside; ExplanationError
    names the file that is missing or is not what was saved."""
    folder = Path(folder)
    try:
        manifest = read_manifest(folder, kind)
        for name, expected in _named(folder, kind, manifest).items():
            file = folder / name
            if not file.is_file() or digest(file.read_bytes()) != expected:
                raise ExplanationError(
                    f"{file} is missing or differs from what was saved: the {kind} is damaged; "
                    "make it again"
                )
        yield manifest
    except (SavedError, FileError):
        raise
    except _DAMAGE as error:
        raise ExplanationError(
            f"{folder / FILES[kind]} is damaged ({error!r}): make the {kind} again"
        ) from error


def listed(folder: Path, manifest: Mapping[str, Any], name: str) -> Path:
    """A file of a saved result; ExplanationError where its manifest does not name it, so that
    nothing said whether it is what was saved."""
    if name not in manifest["files"]:
        raise ExplanationError(
            f"{folder} names no {name} among its files: its manifest is damaged; make it again"
        )
    return folder / name


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Tensors of a safetensors file; ExplanationError when it is damaged."""
    try:
        return load_file(path)
    except SafetensorError as error:
        raise ExplanationError(f"{path} is damaged: {error}") from error
