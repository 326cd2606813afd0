r"""The only writer of files and folders: each appears complete or not at all.

Also what every written record shares: plain JSON, a version and a digest. Whatever the operating
system refuses while writing becomes a :class:`captum_dcam.errors.FileError` that names what was to
be written. :mod:`captum_dcam.results.manifests` says what is there already and may be replaced.
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

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from captum_dcam.errors import (
    DcamError,
    FileError,
    ForbiddenError,
    InputError,
    MissingFileError,
    NoFolderError,
    OccupiedError,
)

#: of PNG files: half the time of Pillow's own (6), files a twentieth larger
COMPRESSION = 4
#: of manifests and headers of stores; since 3 a score may be a step's number, a word may have a
#: foil, and an explanation may hold maps of every step; since 5 it may hold scores of its words
VERSION = 5
#: the first version, which has no digest: what such a record says is believed, and marked so
UNSEALED = 1
WITHOUT = "without checksum"
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
        record (mapping): of a version up to :data:`VERSION`, with a digest, or of
            :data:`UNSEALED`, without one.
        error (type): raised where it is neither.
        again (str): what to do then.
    """
    check_version(path, record, range(UNSEALED, VERSION + 1), error)
    there = record.get("digest")
    if (there is None) if record["version"] == UNSEALED else (there == _seal(record)):
        return
    raise error(
        f"{path} is not what was written (its digest is {str(there)[:80]!r}): damaged, or edited "
        f"by hand; {again}"
    )


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
    except (OSError, SafetensorError) as error:
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


def write_temporary(name: str, text: str) -> Path:
    """Write a text into a new folder for what is needed for a while; the system clears it away."""
    with writing(Path(tempfile.gettempdir())):
        path = Path(tempfile.mkdtemp(prefix="captum-dcam-")) / name
    write_text(path, text)
    return path


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
        except BaseException:  # an interrupt too leaves no half file
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
