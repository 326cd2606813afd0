r"""A store to look at: every image that was measured, the worst ones first."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from captum_dcam.errors import DcamError
from captum_dcam.evaluation.harness import open_data
from captum_dcam.evaluation.store import Store
from captum_dcam.files import Record, plain
from captum_dcam.viewer.explorer_index import Case, index_page

if TYPE_CHECKING:
    from captum_dcam.data import Dataset, Sample

HOW = (
    "Every image that was measured, sorted by the mean of a score over its words. Choose one to "
    "see what its words scored, and the command that shows their maps."
)


def store_page(folder: str | Path, root: str | Path | None = None) -> str:
    r"""The index of a store as one HTML page.

    Args:
        folder (path): what ``evaluate`` wrote.
        root (path, optional): where the data set's files lie; without them the page has no
            pictures, and says why.

    Raises:
        StoreError: no store, or a damaged one.
    """
    store = Store.read(folder)
    data, missing = _data(store, root)
    cases, problems = [], [] if missing is None else [missing]
    for record in store.records():
        sample = None
        if data is not None:
            try:
                sample = data.sample(record["id"])
                cases.append(_case(record, store.header, sample))
                continue
            except (DcamError, OSError) as error:  # an image that is missing or damaged
                problems.append(f"no picture of image {record['id']}: {error}")
        cases.append(_case(record, store.header, None))
    if lacks := len(store.missing()):
        problems.append(f"{lacks} of {store.count} images are not measured yet")
    problems += [store.note] if store.note else []
    plan, facts = store.header["plan"], store.header["facts"]
    shown = {k: plan[k] for k in ("model", "seed", "dtype") if plan.get(k) is not None}
    shown |= {"data": plan["dataset"].get("name")}
    shown |= {k: facts[k] for k in ("family", "regime", "weights") if k in facts}
    return index_page(
        f"{Path(folder).resolve().name}: {len(cases)} images",
        cases,
        how=HOW,
        facts=shown | dict(facts.get("versions", {})),
        warnings=problems[:5] + ([f"and {len(problems) - 5} more"] if len(problems) > 5 else []),
        first="f3",
        methods=[variant["name"] for variant in plan["variants"]],
    )


def _data(store: Store, root: str | Path | None) -> tuple[Dataset[Any] | None, str | None]:
    """The store's data set, or why it is not here."""
    try:
        data = open_data(store.header["plan"]["dataset"], root)
    except DcamError as error:
        return None, f"without pictures, the data set is not here: {error}; give --root"
    if plain(data.describe()) != store.header["facts"].get("data"):
        return None, "without pictures: the data set here is not the one that was measured"
    return data, None


def _case(record: Record, header: Record, sample: Sample | None) -> Case:
    """One image's record; its pixels and masks where the data set is here."""
    words = record.get("words", [])
    named = {name for word in words for name in word["objects"]}
    masks = {} if sample is None else {o.name: o for o in sample.objects if o.name in named}
    return Case(
        name=f"image {record['id']}",
        image=None if sample is None else sample.image(),
        prompt=record.get("prompt"),
        answer=record.get("answer"),
        error=record.get("error"),
        words=tuple(
            {
                "text": word["text"],
                "commit": max(word["commit"]),
                "probability": min(word["confidence"]) if all(word["confidence"]) else None,
            }
            for word in words
        ),
        scores={n: _numbers(v.get("scores", {})) for n, v in record.get("variants", {}).items()},
        masks={name: torch.from_numpy(one.mask()) for name, one in masks.items()},
        command=None if sample is None or "error" in record else _command(record, header, sample),
    )


def _numbers(scores: Mapping[str, Sequence[Any]]) -> dict[str, Sequence[float | None]]:
    """The scores that are numbers."""
    return {
        name: column
        for name, column in scores.items()
        if any(v is not None for v in column)
        and all(v is None or isinstance(v, int | float) for v in column)
    }


def _command(record: Record, header: Record, sample: Sample) -> str | None:
    """The line that explains the same answer, and opens its page."""
    from captum_dcam.data.scenes import HELD_OUT

    plan = header["plan"]
    if sample.path is not None:
        what = [str(sample.path)]
    elif plan["dataset"] == {"name": "scenes"} or plan["dataset"].get("seed") == HELD_OUT:
        what = ["--scene", str(record["id"])]
    else:
        return None
    line = ["captum-dcam", "explain", *what, "-p", record["prompt"], "-m", plan["model"]]
    if plan["answer"].get("name") == "generated":
        line += [f for k, v in plan["generation"].items() for f in ("--generation", f"{k}={v}")]
        line += ["--every-step"]
    else:
        line += ["--answer", record["answer"]]
    return shlex.join([*line, "-o", f"case-{record['id']}", "--open"])
