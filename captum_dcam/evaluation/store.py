r"""A folder of results that survives being killed, filled by one process or by many.

    plan.json                         what was evaluated, written once; another plan is refused
    results-00000-of-00002.jsonl      one line per image, one file per shard, in the order measured
    costs-00000-of-00002.jsonl        the same for seconds and bytes, which no two runs share
    results.jsonl, costs.jsonl        all shards in the data set's order, once all are there

A line is on the disk before the next image begins. Costs are written before results, so that a
result always has its costs; what a killed process left half written is cut off on the next run.
The plan holds a digest of itself, and every line ends with a checksum, so that what was changed
since is refused. Stores that an earlier version began (``version`` 1) have neither, and go on so.
"""

from __future__ import annotations

import contextlib
import hashlib
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
    UNSEALED,
    VERSION,
    WITHOUT,
    Growing,
    Record,
    canonical,
    check_names,
    check_seal,
    digest,
    read_json,
    reading,
    sealed,
    shorten,
    sync_folder,
    write_atomically,
    write_json,
    write_text,
    writing,
)

FORMAT = "captum-dcam evaluation"
HEADER = "plan.json"
RESULTS, COSTS = "results", "costs"
#: seconds to wait for another process that writes the header or merges
PATIENCE = 120.0
#: lists of a plan whose records are compared by their names
NAMED = ("variants", "metrics")
#: what a plan of an earlier version could say of loading, and no plan may
TRUST = "trust_remote_code"
AGAIN = "begin in another folder, or copy the file here again"


class Store:
    r"""The folder of an evaluation; see :meth:`open` and :meth:`read`.

    Attributes:
        folder (Path): where it lies.
        header (dict): ``plan``, ``facts``, ``images`` and ``shards``, as in ``plan.json``.
        digest (str): of the first three; every line carries it.
        checked (bool): whether plan and lines have checksums.
        note (str): what a reader must know: ``"without checksum"`` where they have none.
    """

    def __init__(self, folder: Path, header: Record) -> None:
        self.folder, self.header = folder, header
        self.shards: int = header["shards"]
        self.start: int = header["images"]["start"]
        self.count: int = header["images"]["count"]
        made = {key: header[key] for key in ("plan", "facts", "images")}
        self.digest = digest(canonical(made))[:16]
        self.checked = header["version"] != UNSEALED
        self.note = "" if self.checked else WITHOUT

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

        A store of another plan in which nothing was measured is begun anew.

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
                write_json(folder / HEADER, sealed(header), sort_keys=True)
            elif (store := cls.read(folder)).others(header) and store.empty():
                with store.held_alone():
                    store.remove_lines()
                    write_json(folder / HEADER, sealed(header), sort_keys=True)
        store = cls.read(folder)
        store._refuse_other(header)
        return store

    @classmethod
    def read(cls, folder: str | Path) -> Store:
        """An existing store; StoreError when there is none, or one that is damaged or too new."""
        path = Path(folder) / HEADER
        if not cls.exists(folder):
            raise StoreError(f"{folder} holds no evaluation: it has no {HEADER}")
        header = read_json(path, StoreError, AGAIN)
        if header.get("format") != FORMAT:
            raise StoreError(f"{path} is not the header of an evaluation; {AGAIN}")
        check_seal(path, header, StoreError, AGAIN)
        _check_header(path, header)
        return cls(Path(folder), header)

    @classmethod
    def exists(cls, folder: str | Path) -> bool:
        """Whether a folder holds an evaluation."""
        with reading(folder):
            return (Path(folder) / HEADER).is_file()

    @classmethod
    def check(cls, folder: str | Path, plan: Record, shards: int) -> None:
        """Refuse a folder of another plan before the model is loaded; a new folder is fine, and one
        in which nothing was measured."""
        check_names(Path(folder), 60)
        if cls.exists(folder):
            store = cls.read(folder)
            here = {"plan": plan, "shards": shards}
            if not store.others(here) or not store.empty():
                store._refuse_other(here)

    def others(self, here: Mapping[str, Any]) -> list[str]:
        """What differs between the stored header and parts of another."""
        there = {**self.header, "plan": _without_trust(self.header["plan"])}
        return [d for key in here if key in PARTS for d in differences(there[key], here[key], key)]

    def _refuse_other(self, here: Mapping[str, Any]) -> None:
        """StoreError that names what differs between the stored header and this one."""
        found = self.others(here)
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

    # -- beginning anew -------------------------------------------------------------------------

    def empty(self) -> bool:
        """Whether no image was measured: none is stored, but for some that failed."""
        return all(line.failed for _, line in self._index(RESULTS))

    @contextlib.contextmanager
    def held_alone(self) -> Iterator[None]:
        """No process writes a shard inside; StoreError where one does."""
        with contextlib.ExitStack() as stack:
            for path in sorted(self.folder.glob(".shard-*.lock")):
                what = f"{self.folder} holds another evaluation, and is being written"
                stack.enter_context(locked(path, 0, what))
            yield

    def remove_lines(self) -> None:
        """Remove what shards and merges wrote."""
        for path in self.folder.iterdir():
            if _LINES.fullmatch(path.name):
                with writing(path):
                    path.unlink()

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
        lines = self._scan(path, self.indices(shard))[0] if path.exists() else []
        return {line.image: line.failed for line in lines}

    def missing(self) -> list[int]:
        """Indices of images that neither a shard nor a merged file holds."""
        there = {line.image for _, line in self._index(RESULTS)}
        return [i for i in range(self.start, self.start + self.count) if i not in there]

    def records(self) -> Iterator[Record]:
        """Results so far, one per image, in the data set's order."""
        return map(_content, self._lines(RESULTS))

    def costs(self) -> Iterator[Record]:
        """Costs so far, one per image, in the data set's order."""
        return map(_content, self._lines(COSTS))

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
            for line in self._scan(path, indices)[0]
        }
        return [found[image] for image in sorted(found)]

    def _scan(self, path: Path, indices: range) -> tuple[list[Line], int]:
        return scan(path, indices, self.digest, self.checked)

    def written(self, record: Record) -> bytes:
        """A record as the line that is stored."""
        text = canonical({**record, "plan": self.digest}).encode()
        return (with_sum(text) if self.checked else text) + b"\n"

    def guard(self, shard: int) -> tuple[FileLock, Path]:
        """The lock of a shard, and the note of who holds it."""
        name = f".shard-{shard:05d}-of-{self.shards:05d}"
        lock = FileLock(self.folder / f"{name}.lock", timeout=0)
        return lock, self.folder / f"{name}.owner"

    def tidy(self, shard: int) -> None:
        """Remove the note of a process that was killed after the last image of a shard."""
        lock, owner = self.guard(shard)
        if owner.exists():
            with contextlib.suppress(Timeout, OSError), lock:
                owner.unlink(missing_ok=True)

    def path(self, kind: str, shard: int) -> Path:
        """File of a shard's results or costs."""
        return self.folder / f"{kind}-{shard:05d}-of-{self.shards:05d}.jsonl"


#: parts of a header that an evaluation must have in common with its store
PARTS = ("plan", "facts", "images", "shards")
#: names of the files that hold lines
_LINES = re.compile(rf"({RESULTS}|{COSTS})(-\d+-of-\d+)?\.jsonl")


def _check_header(path: Path, header: Record) -> None:
    """StoreError for a header that lacks what every one has."""
    images = header.get("images")
    own = images if isinstance(images, dict) else {}
    numbers = ((header.get("shards"), 1), (own.get("start"), 0), (own.get("count"), 1))
    whole = all(type(number) is int and number >= least for number, least in numbers)
    records = all(isinstance(header.get(key), dict) for key in PARTS[:3])
    if not records or not whole or "digest" not in own:
        raise StoreError(
            f"{path} is damaged: expected plan, facts, images (start, count, digest) and shards; "
            f"{AGAIN}"
        )


def _without_trust(plan: Record) -> Record:
    """A plan of an earlier version as today's: none lets a checkpoint's code run."""
    if TRUST not in plan.get("load", ()):
        return plan
    load = {name: value for name, value in plan["load"].items() if name != TRUST}
    return {k: v for k, v in plan.items() if k != "load"} | ({"load": load} if load else {})


def _refuse_orphans(folder: Path) -> None:
    """Results without the plan that made them are nobody's."""
    with reading(folder):
        found = sorted(p.name for p in folder.iterdir() if _LINES.fullmatch(p.name))
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


#: the end of a line that has a checksum: SHA-256 of the line without it, 16 digits
_SUM = re.compile(rb',"sum":"([0-9a-f]{16})"\}')


def with_sum(text: bytes) -> bytes:
    """A line's JSON with its checksum as the last entry."""
    return text[:-1] + b',"sum":"' + hashlib.sha256(text).hexdigest()[:16].encode() + b'"}'


def _content(line: bytes) -> Record:
    """What was stored: a line without its checksum."""
    found: Record = json.loads(line)
    found.pop("sum", None)
    return found


def scan(path: Path, indices: range, digest: str, checked: bool = False) -> tuple[list[Line], int]:
    r"""The complete lines of a file, and where they end; what follows was never finished.

    Args:
        path (Path): the file.
        indices (range): the images that may be in it.
        digest (str): of the plan, which every line carries.
        checked (bool, optional): every line has a checksum. Default: False

    Raises:
        StoreError: a damaged line, an image twice, or one of another shard or plan.
    """
    lines: dict[int, Line] = {}
    end = 0
    with reading(path), path.open("rb") as file:
        for number, text in enumerate(file, 1):
            found = _parsed(text, checked)
            if found is None:
                # an interrupted writing leaves the beginning of a line; this one has its end
                if text.endswith(b"\n") or _parsed(text[:-1] + b"\n", checked) is not None:
                    raise StoreError(
                        f"{path}, line {number} is damaged: remove the line and run again"
                    )
                break
            index, failed, plan = found
            if plan != digest:
                raise StoreError(
                    f"{path}, line {number} was made by another plan or machine "
                    f"({str(plan)[:40]}, here {digest}): it does not belong in this folder"
                )
            if index in lines or index not in indices:
                why = "comes twice" if index in lines else "belongs to another shard"
                raise StoreError(f"{path}, line {number}: the image with index {index} {why}")
            lines[index] = Line(index, failed, end, len(text))
            end += len(text)
    return list(lines.values()), end


def _parsed(text: bytes, checked: bool) -> tuple[int, bool, Any] | None:
    """(index, failed, plan) of a complete line, else None."""
    if not text.endswith(b"\n"):
        return None
    if checked:
        body = text[:-1]
        found = _SUM.search(body, max(0, len(body) - 64))
        if (
            found is None
            or found.end() != len(body)
            or with_sum(body[: found.start()] + b"}") != body
        ):
            return None
    try:
        record = json.loads(text)
        if type(record["index"]) is not int:
            return None
        return record["index"], "error" in record, record["plan"]
    except (ValueError, TypeError, KeyError, RecursionError):
        return None


def cut(path: Path, indices: range, digest: str, checked: bool = False) -> list[Line]:
    """Complete lines of a file that may not be there; an unfinished one is cut off."""
    if not path.exists():
        return []
    lines, end = scan(path, indices, digest, checked)
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
                self._files[kind].append(self.store.written(content))
        except BaseException:  # an interrupt too leaves the files as they were
            for file, size in before.items():
                with contextlib.suppress(OSError):  # the next run cuts it off, if this cannot
                    file.shorten(size)
            raise
        self.done[index] = "error" in record


@contextlib.contextmanager
def _writing(store: Store, number: int, retry: bool) -> Iterator[Shard]:
    """The shard's files under its lock, which the system frees when its holder dies."""
    lock, owner = store.guard(number)
    with writing(owner):
        try:
            lock.acquire()
        except Timeout as error:
            who = "unknown"
            with contextlib.suppress(OSError):
                who = owner.read_text(errors="replace")[:200] or who
            raise StoreError(
                f"shard {number}/{store.shards} of {store.folder} is being written by another "
                f"process ({who}): wait for it, or end it first"
            ) from error
    with contextlib.ExitStack() as stack:
        stack.callback(lock.release)
        stack.callback(owner.unlink, missing_ok=True)
        with locked(store.folder / ".store.lock", PATIENCE, f"{store.folder} is being written"):
            if Store.read(store.folder).digest != store.digest:
                raise StoreError(
                    f"{store.folder} was begun anew by another process, with another plan: choose "
                    "another folder"
                )
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
    lines = cut(results, indices, store.digest, store.checked)
    if retry and any(line.failed for line in lines):
        for kind in (RESULTS, COSTS):  # what they held is no longer so
            merged = store.folder / f"{kind}.jsonl"
            with writing(merged):
                merged.unlink(missing_ok=True)
        lines = keep(results, lines, {line.image for line in lines if not line.failed})
    done = {line.image: line.failed for line in lines}
    keep(costs, cut(costs, indices, store.digest, store.checked), set(done))
    return done
