r"""Folders that results are saved into: complete or not at all, with a versioned manifest."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import safetensors
from safetensors.torch import load_file
from torch import Tensor

from captum_dcam.errors import (
    DcamError,
    ExplanationError,
    FileError,
    ForbiddenError,
    MissingFileError,
)

VERSION = 1
#: what is saved → the file that holds its manifest
FILES = {"explanation": "manifest.json", "comparison": "comparison.json"}


@contextmanager
def file_errors(path: str | Path) -> Iterator[None]:
    r"""What the operating system says of a file or folder of the user's, as a FileError naming it.

    Args:
        path (path): named where the system names nothing.

    Raises:
        MissingFileError, ForbiddenError, FileError: for every OSError that is none of ours.
    """
    try:
        yield
    except DcamError:
        raise
    except OSError as error:
        kinds = {FileNotFoundError: MissingFileError, PermissionError: ForbiddenError}
        text = f"{error.filename or path}: {error.strerror or error}"
        raise kinds.get(type(error), FileError)(text) from error


@contextmanager
def new_folder(folder: str | Path) -> Iterator[Path]:
    """A new folder to fill; on leaving it takes the place of ``folder``, after an error it goes.

    The earlier folder comes back if it cannot be replaced.
    """
    folder = Path(folder)
    with file_errors(folder):
        folder.parent.mkdir(parents=True, exist_ok=True)
        work = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
        try:
            new = work / "new"
            new.mkdir()
            yield new
            _swap(new, folder, work / "old")
        finally:
            shutil.rmtree(work, ignore_errors=True)


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


def replaceable(folder: Path, kind: str = "explanation") -> bool:
    """Whether a folder holds nothing, or a saved result of this kind and nothing besides."""
    return folder.is_dir() and not unknown_files(folder, kind)


def unknown_files(folder: Path, kind: str = "explanation") -> list[str]:
    """Names in a folder that no saved result of this kind knows; all of them if none is there."""
    try:
        known = {FILES[kind], *read_manifest(folder, kind).get("files", ())}
    except ExplanationError:
        known = set()
    return sorted({f.name for f in folder.iterdir()} - known)


def write_manifest(folder: Path, content: Mapping[str, Any], kind: str = "explanation") -> None:
    """Write the manifest beside the files that are there already, with a hash of each."""
    files = {f.name: digest_of(f) for f in sorted(folder.iterdir())}
    record = {"format": f"captum-dcam {kind}", "version": VERSION, **content, "files": files}
    text = json.dumps(record, indent=1, ensure_ascii=False) + "\n"
    (folder / FILES[kind]).write_text(text, encoding="utf-8")


def read_manifest(folder: Path, kind: str = "explanation") -> dict[str, Any]:
    """Content of the manifest; ExplanationError when it is none, damaged or too new."""
    path = folder / FILES[kind]
    if not path.is_file():
        raise ExplanationError(f"{folder} is not a saved {kind}: it has no {path.name}")
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ExplanationError(f"{path} is damaged: {error}") from error
    if not isinstance(manifest, dict) or manifest.get("format") != f"captum-dcam {kind}":
        raise ExplanationError(f"{path} is not the manifest of a saved {kind}")
    version = manifest.get("version")
    if not isinstance(version, int) or version > VERSION:
        raise ExplanationError(
            f"{path} has format version {version!r}, this package reads up to {VERSION}: update "
            "captum-dcam"
        )
    return manifest


def check_files(folder: Path, manifest: Mapping[str, Any], kind: str = "explanation") -> None:
    """ExplanationError when a file is missing, or is not what was saved."""
    for name, digest in manifest["files"].items():
        if not (folder / name).is_file() or digest_of(folder / name) != digest:
            raise ExplanationError(
                f"{folder / name} is missing or differs from what was saved: the {kind} is "
                "damaged; make it again"
            )


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Tensors of a safetensors file; ExplanationError when it is damaged."""
    try:
        return load_file(path)
    except safetensors.SafetensorError as error:
        raise ExplanationError(f"{path} is damaged: {error}") from error


def digest_of(path: Path) -> str:
    """SHA-256 of a file."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


# -- layouts, which every result holds -----------------------------------------------------------


def canonical(value: Any) -> str:
    """JSON with sorted keys and nothing superfluous: equal values give equal bytes."""
    return json.dumps(
        value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False
    )


def plain(value: Any) -> Any:
    """The value as JSON gives it back: lists for tuples, text for keys."""
    return json.loads(canonical(value))


def write_atomically(path: Path, chunks: Iterable[bytes]) -> None:
    """Write a file all at once or not at all; the caller holds the lock that guards it."""
    flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | getattr(os, "O_BINARY", 0)
    new = path.with_name(f".{path.name}.new")
    with file_errors(path):
        try:
            file = os.open(new, flags, 0o644)
            try:
                for chunk in chunks:
                    write(file, chunk, sync=False)
                os.fsync(file)
            finally:
                os.close(file)
            new.replace(path)
        except BaseException:
            new.unlink(missing_ok=True)
            raise
        sync_folder(path.parent)


def write(file: int, data: bytes, sync: bool = True) -> None:
    """All bytes, unbuffered: what a failed write leaves behind must not be written later."""
    view = memoryview(data)
    while view:
        view = view[os.write(file, view) :]
    if sync:
        os.fsync(file)


def sync_folder(folder: Path) -> None:
    """Make new names in a folder last (POSIX)."""
    if os.name == "posix":
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
