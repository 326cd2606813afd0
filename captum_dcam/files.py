r"""The only writer of files and folders: each appears complete or not at all.

Also what every written result shares: plain JSON, manifests with a version, a digest and a hash of
every file. Whatever the operating system refuses while writing becomes a
:class:`captum_dcam.errors.FileError` that names what was to be written. What is there already is
replaced where a manifest names it with its hash, and refused otherwise: it is the user's.
"""

from __future__ import annotations

import ctypes
import errno
import hashlib
import json
import math
import os
import stat
import sys
import tempfile
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import safetensors
from PIL import Image
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
    SavedError,
)

VERSION = 2
#: manifests of before, which have no digest: what they say is believed, and marked so
UNSEALED = 1
WITHOUT = "without checksum"
#: what is saved → the file that holds its manifest
FILES = {
    "explanation": "manifest.json",
    "comparison": "comparison.json",
    "tables": "tables.json",
}

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


def read_json(path: Path, error: type[DcamError], again: str) -> dict[str, Any]:
    r"""The object that a JSON file holds.

    Args:
        path (Path): the file.
        error (type): raised, with what is wrong, where it is no JSON, no text in UTF-8, has a key
            twice, or holds anything but an object.
        again (str): what to do then.

    Raises:
        FileError: it cannot be read.
    """
    with reading(path):
        data = path.read_bytes()
    try:
        found = json.loads(data.decode(), object_pairs_hook=_once)
    except (ValueError, RecursionError) as cause:
        raise error(f"{path} is damaged or not JSON: {cause}; {again}") from cause
    if not isinstance(found, dict):
        raise error(f"{path} holds a {type(found).__name__}: expected {{…}}; {again}")
    return found


def _once(pairs: list[tuple[str, Any]]) -> Record:
    """An object none of whose keys comes twice."""
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"the key {twice!r} comes twice")
    return found


def sealed(record: Mapping[str, Any]) -> Record:
    """The record with a digest of all the rest, as :func:`check_seal` expects it."""
    content: Record = json.loads(json.dumps(record))  # as it will be read
    return {**content, "digest": _seal(content)}


def _seal(record: Mapping[str, Any]) -> str:
    rest = {name: value for name, value in record.items() if name != "digest"}
    return digest(json.dumps(rest, sort_keys=True, separators=(",", ":")))


def check_seal(path: Path, record: Mapping[str, Any], error: type[DcamError], again: str) -> None:
    r"""Check the version of a record, and that it is what was written.

    Args:
        path (Path): where it was read.
        record (mapping): of :data:`VERSION`, with a digest, or of :data:`UNSEALED`, without one.
        error (type): raised where it is neither.
        again (str): what to do then.
    """
    check_version(path, record, (UNSEALED, VERSION), error)
    there = record.get("digest")
    if (there is None) if record["version"] == UNSEALED else (there == _seal(record)):
        return
    raise error(
        f"{path} is not what was written (its digest is {str(there)[:80]!r}): damaged, or edited "
        f"by hand; {again}"
    )


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
    try:
        data = text.encode()
    except UnicodeEncodeError as error:
        raise FileError(f"{path} cannot be written: {error}; give texts in UTF-8") from error
    write_atomically(path, [data])


def write_json(path: Path, value: Any, sort_keys: bool = False) -> None:
    """Write JSON for people to read as well, all of it or nothing."""
    text = json.dumps(value, indent=1, sort_keys=sort_keys, ensure_ascii=False)
    write_text(path, text + "\n")


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write a safetensors file into a new folder."""
    with writing(path):
        path.touch()
        mode = stat.S_IMODE(path.stat().st_mode)  # as the umask has it; safetensors takes 0600
        # safetensors refuses tensors that share memory, so each is copied
        save_file({n: t.detach().cpu().contiguous().clone() for n, t in tensors.items()}, path)
        path.chmod(mode)


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


@contextmanager
def new_entries(targets: Sequence[Path]) -> Iterator[list[Path]]:
    r"""Places to fill. At the end they become ``targets``, one after another, all or none.

    What was there before is replaced, and restored if another of them fails. Whenever a process is
    ended, each target is what it was or what it becomes, on systems that swap two names in one
    step (Linux, macOS); elsewhere a process that is killed between two renames leaves what was
    there in a folder ``.new-…/.old-…`` beside the target.

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
                _put(place, target, work / f".old-{n}", undo)
            undo.pop_all()


def _put(place: Path, target: Path, old: Path, undo: ExitStack) -> None:
    """Let what lies at ``place`` become ``target``; ``undo`` learns how to restore what was."""
    if os.path.lexists(target):
        if exchanged(place, target):
            undo.callback(exchanged, place, target)
            return
        undo.callback(_restore, old, target)  # known before: Ctrl-C may come between the renames
        target.rename(old)
    place.rename(target)
    undo.callback(target.rename, place)


def _restore(old: Path, target: Path) -> None:
    if os.path.lexists(old) and not os.path.lexists(target):
        old.rename(target)


#: the systems' functions that swap two names: their name, arguments before each path, and flag
_SWAPS = {"linux": ("renameat2", (-100,), 2), "darwin": ("renamex_np", (), 2)}
#: what a file system says that cannot swap
_NO_SWAP = (errno.ENOSYS, errno.EINVAL, errno.EOPNOTSUPP, errno.ENOTSUP)


def exchanged(one: Path, other: Path) -> bool:
    r"""Swap two files or folders in one step, which nothing can come between.

    Returns:
        bool: False where the system or the file system cannot; nothing was done then.
    """
    name, before, flag = _SWAPS.get(sys.platform, ("", (), 0))
    swap = getattr(ctypes.CDLL(None, use_errno=True), name, None) if name else None
    if swap is None:
        return False
    if not swap(*before, os.fsencode(one), *before, os.fsencode(other), ctypes.c_uint(flag)):
        return True
    code = ctypes.get_errno()
    if code in _NO_SWAP:
        return False
    raise OSError(code, os.strerror(code), str(other))


#: the longest name that is written into a folder, in bytes: a word's picture
_LONGEST = 190


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


def check_names(path: Path, within: int = _LONGEST) -> None:
    r"""FileError where the file system does not take a path, or names in it.

    Args:
        path (Path): a file or folder that will be made.
        within (int, optional): bytes of the longest name that is then written into it; 0 for a
            file, which is written under a name of five bytes more. Default: a word's picture
    """
    path = path.absolute()
    with writing(path):
        nearest = next(folder for folder in path.parents if os.path.isdir(folder))
        new = path.relative_to(nearest).parts
        longest = path / ("x" * within) if within else path.with_name(f"{path.name}.....")
        for place in (*(nearest / name for name in (*new, longest.name)), longest):
            try:
                os.lstat(place)
            except (FileNotFoundError, NotADirectoryError):
                pass
            except ValueError as error:  # a name with a zero byte
                raise OSError(errno.EINVAL, str(error)) from error


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
    places = [(folder, name, aside) for name in names if not beside or name != kind]
    if beside:
        places += [(home, name, known) for name in sorted(f.name for f in home.iterdir())]
    else:
        places = [(folder, name, known) for name in names]
    for place, name, own in places:
        file = place / name
        if place == home and name == FILES[kind]:
            continue
        if name not in own:
            return f"it holds {name}, which its manifest does not name"
        if file.is_symlink() or not file.is_file() or digest(file.read_bytes()) != own[name]:
            return f"{file} was changed since it was written, and is yours"
    return None


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
            if not os.path.lexists(file):
                continue
            if (
                file.is_symlink()
                or not file.is_file()
                or digest(file.read_bytes()) != known.get(name)
            ):
                raise OccupiedError(
                    f"{file} is not an earlier table, or was changed since it was written, and is "
                    "yours: choose another folder, or move it away"
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


def check_version(
    path: Path, record: Mapping[str, Any], known: Collection[int], error: type[DcamError]
) -> None:
    """Raise ``error`` for a record of another version of its format."""
    version = record.get("version")
    if type(version) is int and version in known:
        return
    if type(version) is int and version > max(known):
        raise error(
            f"{path} has format version {version!r}, this package reads up to {max(known)}: update "
            "captum-dcam"
        )
    wanted = " or ".join(map(str, sorted(known)))
    raise error(
        f"{path} has format version {str(version)[:80]}: expected {wanted}; it is damaged or "
        "edited, make it again"
    )


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
    except safetensors.SafetensorError as error:
        raise ExplanationError(f"{path} is damaged: {error}") from error
