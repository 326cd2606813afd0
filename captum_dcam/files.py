r"""The only writer of files and folders: each appears complete or not at all.

Also what every written result shares: plain JSON, manifests with a version, and hashes. Whatever
the operating system refuses while writing becomes a :class:`captum_dcam.errors.FileError` that
names what was to be written.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import safetensors
from safetensors.torch import load_file, save_file
from torch import Tensor

from captum_dcam.errors import (
    DcamError,
    ExplanationError,
    FileError,
    ForbiddenError,
    InputError,
    MissingFileError,
    NoFolderError,
    OccupiedError,
)

VERSION = 1
#: what is saved → the file that holds its manifest
FILES = {"explanation": "manifest.json", "comparison": "comparison.json"}

#: plain JSON by name
Record = dict[str, Any]

# -- plain JSON ------------------------------------------------------------------------------------


def canonical(value: Any, ascii_only: bool = False) -> str:
    r"""JSON with sorted keys and without spaces: equal values give equal bytes.

    Raises:
        InputError: NaN or an infinity, which JSON does not have.
    """
    try:
        return json.dumps(
            value, sort_keys=True, separators=(",", ":"), ensure_ascii=ascii_only, allow_nan=False
        )
    except ValueError as error:
        raise InputError(
            f"{str(value)[:200]} holds NaN or an infinity ({error}): give a finite number"
        ) from error


def plain(value: Any) -> Any:
    """The value as JSON gives it back: lists for tuples, text for keys."""
    return json.loads(canonical(value))


def without_nan(value: Any) -> Any:
    """The same in strict JSON's terms: NaN and infinities become None, tuples lists."""
    if isinstance(value, Mapping):
        return {str(k): without_nan(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [without_nan(v) for v in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def digest(data: str | bytes) -> str:
    """SHA-256 of a text or of bytes."""
    return hashlib.sha256(data.encode() if isinstance(data, str) else data).hexdigest()


# -- one error -------------------------------------------------------------------------------------

#: what Python raises → the error of ours that is one as well
_ERRORS = (
    (PermissionError, ForbiddenError),
    (NotADirectoryError, NoFolderError),
    (FileExistsError, OccupiedError),
    (FileNotFoundError, MissingFileError),
)


def _kind(error: Exception) -> type[FileError]:
    return next((ours for theirs, ours in _ERRORS if isinstance(error, theirs)), FileError)


@contextmanager
def writing(path: Path, work: Path | None = None) -> Iterator[None]:
    r"""What the operating system refuses inside becomes a FileError that names ``path``.

    Args:
        path (Path): what is being written.
        work (Path, optional): where it is made. This place is gone when an error is read, so
            errors that name it name ``path`` instead. Default: it is made at ``path``
    """
    try:
        yield
    except BrokenPipeError:  # the reader of our output has gone, no file is at fault
        raise
    except (OSError, safetensors.SafetensorError) as error:
        reason = str(error) if work is None else str(error).replace(str(work), str(path))
        if isinstance(error, DcamError):
            if reason == str(error):
                raise
            raise type(error)(reason) from error
        raise _kind(error)(
            f"{path} cannot be written: {reason}. Nothing was left half written: make room there, "
            "or choose another place"
        ) from error


@contextmanager
def reading(path: str | Path) -> Iterator[None]:
    """What the operating system refuses inside becomes a FileError, which names ``path`` where the
    system names no file."""
    try:
        yield
    except DcamError:
        raise
    except OSError as error:
        raise _kind(error)(f"{error.filename or path}: {error.strerror or error}") from error


# -- files -----------------------------------------------------------------------------------------


def write_text(path: Path, text: str) -> None:
    """Write a text in UTF-8, all of it or nothing; its folder is made if need be."""
    write_atomically(path, [text.encode()])


def write_json(path: Path, value: Any, sort_keys: bool = False) -> None:
    """Write JSON for people to read as well, all of it or nothing."""
    text = json.dumps(value, indent=1, sort_keys=sort_keys, ensure_ascii=False)
    write_text(path, text + "\n")


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write a safetensors file into a new folder."""
    # safetensors refuses tensors that share memory, so each is copied
    with writing(path):
        save_file({n: t.detach().cpu().contiguous().clone() for n, t in tensors.items()}, path)


def write_atomically(path: Path, chunks: Iterable[bytes]) -> None:
    """Write a file all at once or not at all; the caller holds the lock that guards it."""
    new = path.with_name(f".{path.name}.new")
    with writing(path, new):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with open(new, "wb", buffering=0) as file:
                for chunk in chunks:
                    _write(file.fileno(), chunk)
                os.fsync(file.fileno())
            new.replace(path)
        except BaseException:
            new.unlink(missing_ok=True)
            raise
        sync_folder(path.parent)


def _write(file: int, data: bytes) -> None:
    """Write all bytes without a buffer, so that nothing is written after an error."""
    view = memoryview(data)
    while view:
        view = view[os.write(file, view) :]


def sync_folder(folder: Path) -> None:
    """Put the names of new files in a folder on the disk (POSIX)."""
    if os.name == "posix":
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


class Growing:
    r"""A file that grows at its end; what was appended is on the disk.

    Args:
        path (Path): made if need be.
    """

    def __init__(self, path: Path) -> None:
        flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | getattr(os, "O_BINARY", 0)
        self.path = path
        with writing(path):
            self._file = os.open(path, flags, 0o666)

    @property
    def size(self) -> int:
        """Bytes so far."""
        return os.fstat(self._file).st_size

    def append(self, data: bytes) -> None:
        """Add bytes. After an error a part of them may be there, see :meth:`shorten`."""
        with writing(self.path):
            _write(self._file, data)
            os.fsync(self._file)

    def shorten(self, size: int) -> None:
        """Keep the first ``size`` bytes alone."""
        with writing(self.path):
            os.ftruncate(self._file, size)

    def close(self) -> None:
        """Close the file."""
        os.close(self._file)


def shorten(path: Path, size: int) -> None:
    """Keep the first ``size`` bytes of a file alone."""
    with writing(path):
        os.truncate(path, size)


# -- folders ---------------------------------------------------------------------------------------


@contextmanager
def new_folder(
    folder: str | Path, kind: str = "explanation", beside: str | None = None
) -> Iterator[Path]:
    r"""A new folder to fill. At the end it replaces ``folder``; after an error it is removed.

    The earlier folder is restored if it cannot be replaced.

    Args:
        folder (path), kind (str), beside (str, optional): as for :func:`check_folder`.

    Raises:
        FileError: as :func:`check_folder`, or it cannot be written; nothing is left behind.
    """
    folder = Path(folder)
    check_folder(folder, kind, beside)
    with new_entries([folder]) as (new,):
        new.mkdir()
        yield new


@contextmanager
def new_entries(targets: Sequence[Path]) -> Iterator[list[Path]]:
    r"""Places to fill. At the end they become ``targets``, one after another, all or none.

    What was there before is replaced, and restored if another of them fails.

    Args:
        targets (sequence of Path): files or folders of one file system.

    Raises:
        FileError: one cannot be written; none of them is replaced then.
    """
    root = Path(os.path.commonpath([target.absolute().parent for target in targets]))
    nearest = next(folder for folder in (root, *root.parents) if folder.is_dir())
    named = targets[0] if len(targets) == 1 else root
    with ExitStack() as stack:
        with writing(named):
            made = tempfile.TemporaryDirectory(
                prefix=".new-", dir=nearest, ignore_cleanup_errors=True
            )
            work = Path(stack.enter_context(made))
        stack.enter_context(writing(named, work / named.absolute().relative_to(root)))
        places = [work / target.absolute().relative_to(root) for target in targets]
        for place in places:
            place.parent.mkdir(parents=True, exist_ok=True)
        yield places
        with ExitStack() as undo:
            for n, (place, target) in enumerate(zip(places, targets, strict=True)):
                target.parent.mkdir(parents=True, exist_ok=True)
                if target.exists():
                    old = work / f".old-{n}"
                    target.rename(old)
                    undo.callback(old.rename, target)
                place.rename(target)
                undo.callback(target.rename, place)
            undo.pop_all()


def check_folder(folder: str | Path, kind: str = "explanation", beside: str | None = None) -> None:
    r"""Check that a folder can be written: there is none yet, or nothing but an earlier result.

    Args:
        folder (path): where to.
        kind (str, optional): what it may hold from earlier, a key of :data:`FILES`.
            Default: ``"explanation"``
        beside (str, optional): a pattern of further names, where the result lies in a folder of
            its own called ``kind``. Default: the folder is the result

    Raises:
        OccupiedError: it exists and holds something else.
        NoFolderError, ForbiddenError: it cannot be made or written.
    """
    folder = Path(folder)
    other = f"{folder} exists and is not an earlier {kind}"
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
            raise OccupiedError(f"{other} (it holds {strange[0]}): choose another folder")


def _strange(folder: Path, kind: str, beside: str | None) -> list[str]:
    """Names in a folder that no result of this kind knows; all of them if there is none."""
    names = sorted(f.name for f in folder.iterdir())
    if beside is not None:
        ours = (folder / kind / FILES[kind]).is_file()
        return [n for n in names if not ours or (n != kind and not re.fullmatch(beside, n))]
    try:
        known = {FILES[kind], *read_manifest(folder, kind).get("files", ())}
    except ExplanationError:
        known = set()
    return [name for name in names if name not in known]


# -- manifests -------------------------------------------------------------------------------------


def write_manifest(folder: Path, content: Mapping[str, Any], kind: str = "explanation") -> None:
    """Write the manifest beside the files that are there already, with a hash of each."""
    files = {f.name: digest(f.read_bytes()) for f in sorted(folder.iterdir())}
    record = {"format": f"captum-dcam {kind}", "version": VERSION, **content, "files": files}
    write_json(folder / FILES[kind], record)


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
    check_version(path, manifest, VERSION, ExplanationError)
    return manifest


def check_version(
    path: Path, record: Mapping[str, Any], known: int, error: type[DcamError]
) -> None:
    """Raise ``error`` for a record of a later version of its format."""
    version = record.get("version")
    if not isinstance(version, int) or version > known:
        raise error(
            f"{path} has format version {version!r}, this package reads up to {known}: update "
            "captum-dcam"
        )


@contextmanager
def opened(folder: str | Path, kind: str = "explanation") -> Iterator[dict[str, Any]]:
    """The manifest of a saved result, from which the result is built inside; ExplanationError
    names the file that is missing or is not what was saved."""
    folder = Path(folder)
    manifest = read_manifest(folder, kind)
    try:
        for name, expected in manifest["files"].items():
            file = folder / name
            if not file.is_file() or digest(file.read_bytes()) != expected:
                raise ExplanationError(
                    f"{file} is missing or differs from what was saved: the {kind} is damaged; "
                    "make it again"
                )
        yield manifest
    except ExplanationError:
        raise
    except (KeyError, TypeError, IndexError, AttributeError, ValueError) as error:
        raise ExplanationError(
            f"{folder / FILES[kind]} is damaged ({error!r}): make the {kind} again"
        ) from error


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Tensors of a safetensors file; ExplanationError when it is damaged."""
    try:
        return load_file(path)
    except safetensors.SafetensorError as error:
        raise ExplanationError(f"{path} is damaged: {error}") from error
