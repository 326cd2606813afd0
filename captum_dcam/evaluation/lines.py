r"""Files of JSON lines that survive a killed process: read, cut, rewritten, written for good."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from filelock import FileLock, Timeout


class StoreError(ValueError):
    """A store that is damaged, in use, unfinished, or belongs to another plan."""


class Line(NamedTuple):
    """Where a stored image lies in its file."""

    image: int
    failed: bool
    offset: int
    size: int


def scan(path: Path, indices: range, digest: str) -> tuple[list[Line], int]:
    r"""The complete lines of a file, and where they end; what follows was never finished.

    Raises:
        StoreError: a damaged line before the last, an image twice, or one of another shard or plan.
    """
    lines: list[Line] = []
    seen: set[int] = set()
    end, broken = 0, None
    with path.open("rb") as file:
        for number, text in enumerate(file, 1):
            if broken is not None:
                raise StoreError(f"{path}, line {broken} is damaged: remove the line and run again")
            found = _parsed(text)
            if found is None:
                broken = number  # the last line may be: its writing was interrupted
                continue
            index, failed, plan = found
            if plan != digest:
                raise StoreError(
                    f"{path}, line {number} was made by another plan or machine ({plan}, here "
                    f"{digest}): it does not belong in this folder"
                )
            if index in seen or index not in indices:
                why = "comes twice" if index in seen else "belongs to another shard"
                raise StoreError(f"{path}, line {number}: the image with index {index} {why}")
            seen.add(index)
            lines.append(Line(index, failed, end, len(text)))
            end += len(text)
    return lines, end


def _parsed(text: bytes) -> tuple[int, bool, Any] | None:
    """(index, failed, plan) of a complete line, else None."""
    if not text.endswith(b"\n"):
        return None
    try:
        record = json.loads(text)
        return int(record["index"]), "error" in record, record["plan"]
    except (ValueError, TypeError, KeyError):
        return None


def cut(path: Path, indices: range, digest: str) -> list[Line]:
    """Complete lines of a file that may not be there; an unfinished one is cut off."""
    if not path.exists():
        return []
    lines, end = scan(path, indices, digest)
    if path.stat().st_size > end:
        os.truncate(path, end)
    return lines


def keep(path: Path, lines: list[Line], indices: set[int]) -> list[Line]:
    """Rewrite a file with the lines of these images alone, unless it holds no others."""
    if all(line.image in indices for line in lines):
        return lines
    with path.open("rb") as file:
        texts = []
        for line in lines:
            if line.image in indices:
                file.seek(line.offset)
                texts.append(file.read(line.size))
    write_atomically(path, texts)
    return [line for line in lines if line.image in indices]


def write_atomically(path: Path, chunks: Iterable[bytes]) -> None:
    """Write a file all at once or not at all; the caller holds the lock that guards it."""
    flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | getattr(os, "O_BINARY", 0)
    new = path.with_name(f".{path.name}.new")
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


@contextlib.contextmanager
def locked(path: Path, timeout: float, what: str) -> Iterator[None]:
    try:
        with FileLock(path, timeout=timeout):
            yield
    except Timeout as error:
        raise StoreError(f"{what} by another process for {timeout:g} s: try again") from error
