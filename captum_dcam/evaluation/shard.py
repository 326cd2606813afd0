r"""The writing end of one part of a store."""

from __future__ import annotations

import contextlib
import os
import socket
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING

from filelock import FileLock, Timeout

from captum_dcam.evaluation.jsonable import Record, canonical
from captum_dcam.evaluation.lines import StoreError, cut, keep, sync_folder, write

if TYPE_CHECKING:
    from captum_dcam.evaluation.store import Store

RESULTS, COSTS = "results", "costs"


class Shard:
    r"""The writing end of a store's part; made by :meth:`Store.shard`, used in ``with``.

    Attributes:
        done (dict): index of every stored image → whether it failed.
    """

    def __init__(self, store: Store, number: int, retry: bool) -> None:
        self.store, self.number, self.retry = store, number, retry
        self.done: dict[int, bool] = {}
        self._files: dict[str, int] = {}
        name = f".shard-{number:05d}-of-{store.shards:05d}"
        self._lock = FileLock(store.folder / f"{name}.lock")
        self._owner = store.folder / f"{name}.owner"

    @property
    def indices(self) -> range:
        """Indices in the data set of this shard's images."""
        return self.store.indices(self.number)

    def __enter__(self) -> Shard:
        try:
            # The system lets go of the lock when its holder dies, however it dies.
            self._lock.acquire(timeout=0)
        except Timeout as error:
            raise StoreError(
                f"shard {self.number}/{self.store.shards} of {self.store.folder} is being written "
                f"by another process ({_owner(self._owner)}): wait for it, or end it first"
            ) from error
        try:
            self._owner.write_text(f"process {os.getpid()} on {socket.gethostname()}")
            self._recover()
            flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | getattr(os, "O_BINARY", 0)
            for kind in (COSTS, RESULTS):
                self._files[kind] = os.open(self.store.path(kind, self.number), flags, 0o644)
            sync_folder(self.store.folder)
        except BaseException:
            self._close()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._close()

    def append(self, record: Record, cost: Record) -> None:
        r"""Store an image's result and cost, ``{"index": …, "id": …, …}``; on the disk on return.

        Raises:
            StoreError: the image is stored already, or belongs to another shard.
            OSError: it cannot be written (a full disk): the store is as before the call.
        """
        index = record["index"]
        if index in self.done or index not in self.indices:
            why = "is stored already" if index in self.done else f"is not in shard {self.number}"
            raise StoreError(f"image {record['id']} (index {index}) {why}")
        lines = {COSTS: cost, RESULTS: record}
        before = {kind: os.fstat(self._files[kind]).st_size for kind in lines}
        try:
            for kind, content in lines.items():
                text = canonical({**content, "plan": self.store.digest})
                write(self._files[kind], text.encode() + b"\n")
        except BaseException:
            for kind, size in before.items():
                with contextlib.suppress(OSError):  # the next run cuts it off, if this cannot
                    os.ftruncate(self._files[kind], size)
            raise
        self.done[index] = "error" in record

    def _recover(self) -> None:
        """Cut off what a killed process left half written; forget failures that are retried."""
        results, costs = (self.store.path(kind, self.number) for kind in (RESULTS, COSTS))
        lines = cut(results, self.indices, self.store.digest)
        if self.retry and any(line.failed for line in lines):
            for kind in (RESULTS, COSTS):  # what they held is no longer so
                (self.store.folder / f"{kind}.jsonl").unlink(missing_ok=True)
            lines = keep(results, lines, {line.image for line in lines if not line.failed})
        self.done = {line.image: line.failed for line in lines}
        spent = cut(costs, self.indices, self.store.digest)
        keep(costs, spent, set(self.done))

    def _close(self) -> None:
        for file in self._files.values():
            os.close(file)
        self._files = {}
        self._owner.unlink(missing_ok=True)
        self._lock.release()


def _owner(path: Path) -> str:
    try:
        return path.read_text() or "unknown"
    except OSError:
        return "unknown"
