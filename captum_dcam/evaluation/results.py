r"""Stored records as flat rows, one a variant and word: ``pandas.DataFrame(rows(store))``."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from captum_dcam.evaluation.store import Store
from captum_dcam.files import Record


def rows(store: Store | Iterable[Record]) -> Iterator[Record]:
    r"""Every word of every image by every variant that has a map of it.

    Args:
        store (Store or iterable): a store, or records from one.

    Yields:
        dict: ``index``, ``id``, ``variant``, the word's own fields (``text``, ``kind``, ``mask``,
        …) and its scores; a score that is not defined for the word is None. Failed images and
        variants give no rows: count them in the records.
    """
    records = store.records() if isinstance(store, Store) else store
    for record in records:
        if "error" in record:
            continue
        for name, own in record["variants"].items():
            scores = own.get("scores")
            if scores is None:
                continue
            for n, word in enumerate(record["words"]):
                if "complete" in own and not own["complete"][n]:
                    continue
                row: dict[str, Any] = {
                    "index": record["index"],
                    "id": record["id"],
                    "variant": name,
                    **word,
                }
                row.update({metric: column[n] for metric, column in scores.items()})
                yield row
