r"""Stored results as columns of numbers, and as flat rows: ``pandas.DataFrame(rows(store))``."""

from __future__ import annotations

from array import array
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from captum_dcam.errors import StoreError
from captum_dcam.evaluation.store import Store
from captum_dcam.evaluation.words import KINDS
from captum_dcam.files import Record
from captum_dcam.metrics import BootstrapInterval, cluster_bootstrap

#: resamples of every interval, and the seed that draws them
RESAMPLES, SEED = 1000, 0


@dataclass(frozen=True, eq=False)
class Values:
    r"""One score of N words.

    Args:
        scores (Tensor): (N,) float64.
        images (Tensor): (N,) int64, index of the image in the data set.
        words (Tensor): (N,) int64, number of the word in its image: with ``images`` its name.
        rows (Tensor): (N,) int64, number of the word among all of its frame.
    """

    scores: Tensor
    images: Tensor
    words: Tensor
    rows: Tensor

    def __len__(self) -> int:
        return len(self.scores)

    def mean(self) -> BootstrapInterval | None:
        """Mean over words with a 95 % interval over images; None without any word."""
        if not len(self):
            return None
        generator = torch.Generator().manual_seed(SEED)
        return cluster_bootstrap(self.scores, self.images, generator, RESAMPLES)

    def minus(self, other: Values) -> Values:
        """Differences on the words that both have."""
        mine, theirs = self._keys(), other._keys()
        both = sorted(mine.keys() & theirs.keys())
        a = torch.tensor([mine[k] for k in both], dtype=torch.long)
        b = torch.tensor([theirs[k] for k in both], dtype=torch.long)
        return Values(self.scores[a] - other.scores[b], self.images[a], self.words[a], self.rows[a])

    def scaled(self, factor: float) -> Values:
        """Scores times a factor."""
        return replace(self, scores=self.scores * factor)

    def _keys(self) -> dict[tuple[int, int], int]:
        pairs = zip(self.images.tolist(), self.words.tolist(), strict=True)
        return {pair: n for n, pair in enumerate(pairs)}


class _Column:
    """Values of the words where a metric of a variant is defined."""

    def __init__(self) -> None:
        self.words = array("q")
        self.values: array[float] | list[Any] = array("d")

    def append(self, word: int, value: Any) -> None:
        """One more; the first that is no plain number makes it a list of anything."""
        if isinstance(self.values, array) and not isinstance(value, int | float):
            self.values = list(self.values)
        self.words.append(word)
        self.values.append(value)


class Frame:
    r"""One part of an evaluation, read once, line by line, into columns of numbers.

    Args:
        folder (path): a store.

    Attributes:
        header (dict): plan and facts.
        records (list of dict): the images that could be measured: answer, steps and lengths, words
            without their scores.
        failed (int): images that could not.
        note (str): of the store: ``"without checksum"``, or empty.
    """

    def __init__(self, folder: str | Path) -> None:
        store = Store.read(folder)
        self.folder, self.header, self.note = Path(folder), store.header, store.note
        self.records: list[Record] = []
        self.failed = 0
        self._columns: dict[tuple[str, str], _Column] = {}
        self._states: dict[str, Counter[tuple[str, str]]] = {}
        self._image, self._number, kinds = array("q"), array("q"), []
        for record in store.records():
            if "error" in record:
                self.failed += 1
                continue
            try:
                kinds += self._words(record)
                self.records.append(record)
            except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
                raise StoreError(
                    f"{folder}: the image with index {record['index']} is damaged ({error!r}): "
                    "remove its line and run again"
                ) from error
        self._kinds = torch.tensor(kinds, dtype=torch.long)
        self.costs = list(store.costs())
        if not self.records:
            raise StoreError(f"{folder} holds no measured image yet: run it first")

    def _words(self, record: Record) -> list[int]:
        """Enter an image; returns the kind of each word."""
        first, words = len(self._image), record["words"]
        kinds = [KINDS.index(word["kind"]) for word in words]
        self._image.extend(record["index"] for _ in words)
        self._number.extend(range(len(words)))
        for name, own in record.pop("variants").items():
            self._enter(name, own, first)
        return kinds

    def _enter(self, variant: str, own: Record, first: int) -> None:
        """One image's record of a variant; ``first`` is the number of its first word."""
        words = len(self._image) - first
        key = own["status"], own.get("note", "")
        self._states.setdefault(variant, Counter())[key] += 1
        for metric, column in own.get("scores", {}).items():
            found = self._columns.setdefault((variant, metric), _Column())
            if len(column) != words:
                raise ValueError(f"{metric} has {len(column)} values for {words} words")
            for n, value in enumerate(column):
                if value is not None:
                    found.append(first + n, value)

    @property
    def variants(self) -> tuple[str, ...]:
        """Names, in the plan's order."""
        return tuple(v["name"] for v in self.header["plan"]["variants"])

    @property
    def images(self) -> int:
        """Images that were measured."""
        return len(self.records)

    @property
    def metrics(self) -> tuple[str, ...]:
        """Metrics whose values are plain numbers, in the order in which they were stored."""
        plain = (m for (_, m), c in self._columns.items() if isinstance(c.values, array))
        return tuple(dict.fromkeys(plain))

    def count(self, kind: str) -> int:
        """Words of a kind."""
        return int((self._kinds == KINDS.index(kind)).sum())

    def kinds(self, values: Values) -> list[str]:
        """The kind of each word."""
        return [KINDS[int(self._kinds[n])] for n in values.rows.tolist()]

    def values(
        self, variant: str, metric: str, kinds: Sequence[str] | None = None, at: int | None = None
    ) -> Values:
        r"""A metric of a variant, of all words where it is defined.

        Args:
            variant (str), metric (str): names; one that is not there gives no words.
            kinds (sequence of str, optional): of these kinds of words. Default: all
            at (int, optional): index into a metric that has several per word. Default: all of them,
                scores are then (N, values)
        """
        found = self._columns.get((variant, metric), _Column())
        rows = torch.tensor(found.words, dtype=torch.long)
        scores = torch.tensor(found.values, dtype=torch.float64)
        scores = scores if at is None or not len(rows) else scores[:, at]
        if kinds is not None:
            wanted = torch.tensor([KINDS.index(k) for k in kinds])
            keep = torch.isin(self._kinds[rows], wanted)
            rows, scores = rows[keep], scores[keep]
        images = torch.tensor(self._image, dtype=torch.long)[rows]
        return Values(scores, images, torch.tensor(self._number, dtype=torch.long)[rows], rows)

    def texts(self, variant: str, metric: str) -> list[str]:
        """A metric whose values are names, such as the branch that a map took."""
        return [str(value) for value in self._columns.get((variant, metric), _Column()).values]

    def status(self, variant: str) -> tuple[int, int, str]:
        """Images on which the variant was complete, images, and the commonest reason why not."""
        states = self._states.get(variant, Counter())
        done = sum(n for (status, _), n in states.items() if status == "done")
        notes = Counter({note: n for (status, note), n in states.items() if status != "done"})
        return done, states.total(), notes.most_common(1)[0][0] if notes else ""


def rows(store: Store | Iterable[Record]) -> Iterator[Record]:
    r"""Every word of every image by every variant that has a map of it.

    Args:
        store (Store or iterable): a store, or records from one.

    Yields:
        dict: ``index``, ``id``, ``variant``, the word's own fields (``text``, ``kind``, ``mask``,
        …) and its scores; a score that is not defined for the word is None. Failed images and
        variants give no rows: count them in the records.
    """
    for record in store.records() if isinstance(store, Store) else store:
        for name, own in record.get("variants", {}).items():
            scores, complete = own.get("scores"), own.get("complete")
            for n, word in enumerate(record["words"] if scores is not None else ()):
                if complete is None or complete[n]:
                    found = {"index": record["index"], "id": record["id"], "variant": name, **word}
                    yield found | {metric: column[n] for metric, column in scores.items()}
