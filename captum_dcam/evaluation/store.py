r"""A folder of results that survives being killed, filled by one process or by many.

    plan.json                         what was evaluated, written once; another plan is refused
    results-00000-of-00002.jsonl      one line per image, one file per shard, in the order measured
    costs-00000-of-00002.jsonl        the same for seconds and bytes, which no two runs share
    results.jsonl, costs.jsonl        all shards in the data set's order, once all are there

A line is on the disk before the next image begins. Costs are written before results, so that a
result always has its costs; what a killed process left half written is cut off on the next run.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import socket
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from filelock import FileLock, Timeout

from captum_dcam.errors import StoreError
from captum_dcam.files import (
    Growing,
    Record,
    canonical,
    digest,
    reading,
    shorten,
    sync_folder,
    write_atomically,
    write_json,
    write_text,
    writing,
)

FORMAT, VERSION = "captum-dcam evaluation", 1
HEADER = "plan.json"
RESULTS, COSTS = "results", "costs"
#: seconds to wait for another process that writes the header or merges
PATIENCE = 120.0
#: lists of a plan whose records are compared by their names
NAMED = ("variants", "metrics")


class Store:
    r"""The folder of an evaluation; see :meth:`open` and :meth:`read`.

    Attributes:
        folder (Path): where it lies.
        header (dict): ``plan``, ``facts``, ``images`` and ``shards``, as in ``plan.json``.
        digest (str): of the first three; every line carries it.
    """

    def __init__(self, folder: Path, header: Record) -> None:
        self.folder, self.header = folder, header
        self.shards: int = header["shards"]
        self.start: int = header["images"]["start"]
        self.count: int = header["images"]["count"]
        made = {key: header[key] for key in ("plan", "facts", "images")}
        self.digest = digest(canonical(made))[:16]

    # -- opening --------------------------------------------------------------------------------

    @classmethod
    def open(
        cls,
        folder: str | Path,
        plan: Record,
        facts: Record,
        ids: Sequence[str],
        *,
        start: int = 0,
        shards: int = 1,
    ) -> Store:
        r"""Begin a store, or go on with one of the same plan.

        Args:
            folder (path): made if need be.
            plan (dict): every setting that results depend on.
            facts (dict): what else they depend on: versions, the model's weights.
            ids (sequence of str): the images, in the data set's order.
            start (int, optional): index of the first in the data set. Default: 0
            shards (int, optional): into how many parts the run is cut. Default: 1

        Raises:
            StoreError: the folder holds another evaluation; says which settings differ.
            FileError: it cannot be written; nothing is left half written.
        """
        folder = Path(folder)
        header = {
            "format": FORMAT,
            "version": VERSION,
            "plan": plan,
            "facts": facts,
            "images": {"start": start, "count": len(ids), "digest": digest("\n".join(ids))},
            "shards": shards,
        }
        with writing(folder):
            folder.mkdir(parents=True, exist_ok=True)
        with locked(folder / ".store.lock", PATIENCE, f"{folder} is being written"):
            if not (folder / HEADER).exists():
                _refuse_orphans(folder)
                write_json(folder / HEADER, header, sort_keys=True)
        store = cls.read(folder)
        store._refuse_other(header)
        return store

    @classmethod
    def read(cls, folder: str | Path) -> Store:
        """An existing store; StoreError when there is none, or one that is damaged or too new."""
        path = Path(folder) / HEADER
        if not cls.exists(folder):
            raise StoreError(f"{folder} holds no evaluation: it has no {HEADER}")
        try:
            with reading(path):
                header = json.loads(path.read_text(encoding="utf-8"))
            if header["format"] != FORMAT:
                raise StoreError(f"{path} is not the header of an evaluation")
            if header["version"] > VERSION:
                raise StoreError(
                    f"{path} has format version {header['version']}, this package reads up to "
                    f"{VERSION}: update captum-dcam"
                )
            return cls(Path(folder), header)
        except (KeyError, TypeError, json.JSONDecodeError, UnicodeDecodeError) as error:
            raise StoreError(f"{path} is damaged ({error!r}): begin in another folder") from error

    @classmethod
    def exists(cls, folder: str | Path) -> bool:
        """Whether a folder holds an evaluation."""
        with reading(folder):
            return (Path(folder) / HEADER).is_file()

    @classmethod
    def check(cls, folder: str | Path, plan: Record, shards: int) -> None:
        """Refuse a folder of another plan before the model is loaded; a new folder is fine."""
        if cls.exists(folder):
            cls.read(folder)._refuse_other({"plan": plan, "shards": shards})

    def _refuse_other(self, here: Mapping[str, Any]) -> None:
        """StoreError that names what differs between the stored header and this one."""
        found = [d for key in here for d in differences(self.header.get(key), here[key], key)]
        if not found:
            return
        if all(d.startswith("shards") for d in found):
            raise StoreError(
                f"{self.folder} was begun in {self.shards} shards, this run has {here['shards']}: "
                f"go on with i/{self.shards} (one process may run all shards in turn)"
            )
        shown = "; ".join(found[:6]) + (f"; and {len(found) - 6} more" if len(found) > 6 else "")
        raise StoreError(
            f"{self.folder} holds another evaluation: {shown}. Results of two settings do not mix: "
            "choose another folder, or the settings of that one"
        )

    # -- writing --------------------------------------------------------------------------------

    def shard(
        self, number: int, *, retry: bool = False
    ) -> contextlib.AbstractContextManager[Shard]:
        r"""The part ``number`` to write to, as a context manager; one process at a time.

        Args:
            number (int): from 0.
            retry (bool, optional): forget the images that failed, so that they are measured
                again. Default: False
        """
        if not 0 <= number < self.shards:
            raise StoreError(f"shard {number} is not one of {self.shards}, 0 to {self.shards - 1}")
        return _writing(self, number, retry)

    def indices(self, shard: int) -> range:
        """Indices in the data set of a shard's images: every n-th."""
        return range(self.start + shard, self.start + self.count, self.shards)

    def merge(self) -> Path:
        r"""Write ``results.jsonl`` and ``costs.jsonl``: all shards, in the data set's order.

        The bytes do not depend on how many shards there were. Images that only an earlier merged
        file holds (its shards' files lie elsewhere) are kept.

        Raises:
            StoreError: images are missing; says which shards to run.
        """
        if missing := self.missing():
            shards = sorted({(i - self.start) % self.shards for i in missing})
            names = ", ".join(f"{s}/{self.shards}" for s in shards[:8])
            raise StoreError(
                f"{self.folder} lacks {len(missing)} of {self.count} images, the first at index "
                f"{missing[0]}: run shard {names} to its end, or copy its files here"
            )
        with locked(self.folder / ".store.lock", PATIENCE, f"{self.folder} is being written"):
            for kind in (COSTS, RESULTS):
                write_atomically(self.folder / f"{kind}.jsonl", self._lines(kind))
        return self.folder / f"{RESULTS}.jsonl"

    # -- reading --------------------------------------------------------------------------------

    def stored(self, shard: int) -> dict[int, bool]:
        """Index of every image that a shard holds → whether it failed."""
        path = self.path(RESULTS, shard)
        lines = scan(path, self.indices(shard), self.digest)[0] if path.exists() else []
        return {line.image: line.failed for line in lines}

    def missing(self) -> list[int]:
        """Indices of images that neither a shard nor a merged file holds."""
        there = {line.image for _, line in self._index(RESULTS)}
        return [i for i in range(self.start, self.start + self.count) if i not in there]

    def records(self) -> Iterator[Record]:
        """Results so far, one per image, in the data set's order."""
        return map(json.loads, self._lines(RESULTS))

    def costs(self) -> Iterator[Record]:
        """Costs so far, one per image, in the data set's order."""
        return map(json.loads, self._lines(COSTS))

    def _lines(self, kind: str) -> Iterator[bytes]:
        """Stored lines in order, one at a time in memory."""
        index = self._index(kind)
        with contextlib.ExitStack() as stack, reading(self.folder):
            files = {p: stack.enter_context(p.open("rb")) for p in {p for p, _ in index}}
            for path, line in index:
                files[path].seek(line.offset)
                yield files[path].read(line.size)

    def _index(self, kind: str) -> list[tuple[Path, Line]]:
        """(file, line) of every stored image, in the data set's order.

        A shard's line goes before a merged one, which may be older.
        """
        whole = range(self.start, self.start + self.count)
        files = [(self.folder / f"{kind}.jsonl", whole)]
        files += [(self.path(kind, n), self.indices(n)) for n in range(self.shards)]
        found = {
            line.image: (path, line)
            for path, indices in files
            if path.exists()
            for line in scan(path, indices, self.digest)[0]
        }
        return [found[image] for image in sorted(found)]

    def path(self, kind: str, shard: int) -> Path:
        """File of a shard's results or costs."""
        return self.folder / f"{kind}-{shard:05d}-of-{self.shards:05d}.jsonl"


def _refuse_orphans(folder: Path) -> None:
    """Results without the plan that made them are nobody's."""
    pattern = re.compile(rf"({RESULTS}|{COSTS})(-\d+-of-\d+)?\.jsonl")
    with reading(folder):
        found = sorted(p.name for p in folder.iterdir() if pattern.fullmatch(p.name))
    if found:
        raise StoreError(
            f"{folder} holds {found[0]} but no {HEADER}: results whose plan is lost; choose "
            "another folder"
        )


def differences(there: Any, here: Any, path: str) -> Iterator[str]:
    r"""What two JSON values do not have in common: ``"plan.seed is 0 there and 1 here"``.

    Variants and metrics are compared by their names, in whatever order they stand.
    """
    if path.rsplit(".", 1)[-1] in NAMED and isinstance(there, list) and isinstance(here, list):
        there, here = (
            {str(one.get("label") or one["name"]): one for one in side} for side in (there, here)
        )
    if isinstance(there, Mapping) and isinstance(here, Mapping):
        for key in sorted(there.keys() | here.keys()):
            at = f"{path}.{key}"
            if key not in there:
                yield f"{at} is here only"
            elif key not in here:
                yield f"{at} is there only"
            else:
                yield from differences(there[key], here[key], at)
    elif there != here:
        yield f"{path} is {canonical(there)} there and {canonical(here)} here"


# -- files of JSON lines that survive a killed process ---------------------------------------------


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
    lines: dict[int, Line] = {}
    end, broken = 0, None
    with reading(path), path.open("rb") as file:
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
            if index in lines or index not in indices:
                why = "comes twice" if index in lines else "belongs to another shard"
                raise StoreError(f"{path}, line {number}: the image with index {index} {why}")
            lines[index] = Line(index, failed, end, len(text))
            end += len(text)
    return list(lines.values()), end


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
        shorten(path, end)
    return lines


def keep(path: Path, lines: list[Line], indices: set[int]) -> list[Line]:
    """Rewrite a file with the lines of these images alone, unless it holds no others."""
    kept = [line for line in lines if line.image in indices]
    if len(kept) < len(lines):
        with reading(path):
            content = path.read_bytes()
        write_atomically(path, [content[k.offset : k.offset + k.size] for k in kept])
    return kept


@contextlib.contextmanager
def locked(path: Path, timeout: float, what: str) -> Iterator[None]:
    """A lock file, held inside; StoreError when another process keeps it."""
    lock = FileLock(path, timeout=timeout)
    with writing(path):
        try:
            lock.acquire()
        except Timeout as error:
            raise StoreError(f"{what} by another process for {timeout:g} s: try again") from error
    try:
        yield
    finally:
        lock.release()


# -- the writing end of one part of a store --------------------------------------------------------


class Shard:
    r"""The writing end of a store's part; made by :meth:`Store.shard`.

    Attributes:
        done (dict): index of every stored image → whether it failed.
    """

    def __init__(
        self, store: Store, number: int, done: dict[int, bool], files: dict[str, Growing]
    ) -> None:
        self.store, self.number, self.done, self._files = store, number, done, files

    @property
    def indices(self) -> range:
        """Indices in the data set of this shard's images."""
        return self.store.indices(self.number)

    def append(self, record: Record, cost: Record) -> None:
        r"""Store an image's result and cost, ``{"index": …, "id": …, …}``; on the disk on return.

        Raises:
            StoreError: the image is stored already, or belongs to another shard.
            FileError: it cannot be written (a full disk): the store is as before the call.
        """
        index = record["index"]
        if index in self.done or index not in self.indices:
            why = "is stored already" if index in self.done else f"is not in shard {self.number}"
            raise StoreError(f"image {record['id']} (index {index}) {why}")
        before = {file: file.size for file in self._files.values()}
        try:
            for kind, content in ((COSTS, cost), (RESULTS, record)):
                text = canonical({**content, "plan": self.store.digest})
                self._files[kind].append(text.encode() + b"\n")
        except BaseException:
            for file, size in before.items():
                with contextlib.suppress(OSError):  # the next run cuts it off, if this cannot
                    file.shorten(size)
            raise
        self.done[index] = "error" in record


@contextlib.contextmanager
def _writing(store: Store, number: int, retry: bool) -> Iterator[Shard]:
    """The shard's files under its lock, which the system frees when its holder dies."""
    name = f".shard-{number:05d}-of-{store.shards:05d}"
    owner = store.folder / f"{name}.owner"
    lock = FileLock(store.folder / f"{name}.lock", timeout=0)
    with writing(owner):
        try:
            lock.acquire()
        except Timeout as error:
            who = "unknown"
            with contextlib.suppress(OSError):
                who = owner.read_text() or who
            raise StoreError(
                f"shard {number}/{store.shards} of {store.folder} is being written by another "
                f"process ({who}): wait for it, or end it first"
            ) from error
    with contextlib.ExitStack() as stack:
        stack.callback(lock.release)
        stack.callback(owner.unlink, missing_ok=True)
        write_text(owner, f"process {os.getpid()} on {socket.gethostname()}")
        done = _recover(store, number, retry)
        files = {
            kind: stack.enter_context(contextlib.closing(Growing(store.path(kind, number))))
            for kind in (COSTS, RESULTS)
        }
        sync_folder(store.folder)
        yield Shard(store, number, done, files)


def _recover(store: Store, number: int, retry: bool) -> dict[int, bool]:
    """Cut off what a killed process left half written; forget failures that are retried."""
    results, costs = (store.path(kind, number) for kind in (RESULTS, COSTS))
    indices = store.indices(number)
    lines = cut(results, indices, store.digest)
    if retry and any(line.failed for line in lines):
        for kind in (RESULTS, COSTS):  # what they held is no longer so
            merged = store.folder / f"{kind}.jsonl"
            with writing(merged):
                merged.unlink(missing_ok=True)
        lines = keep(results, lines, {line.image for line in lines if not line.failed})
    done = {line.image: line.failed for line in lines}
    keep(costs, cut(costs, indices, store.digest), set(done))
    return done
