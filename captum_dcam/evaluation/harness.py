r"""Evaluate a plan into a store: image after image, killed and resumed, alone or in shards."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from captum_dcam.errors import EvaluationError, InputError
from captum_dcam.evaluation.launch import launched_device, launched_shard
from captum_dcam.evaluation.plan import Plan
from captum_dcam.evaluation.store import Shard, Store
from captum_dcam.evaluation.trial import Trial
from captum_dcam.files import Record, reading
from captum_dcam.model.adapter import Adapter
from captum_dcam.model.progress import Progress, ProgressLike, as_progress
from captum_dcam.model.trajectory import STORED_CACHES
from captum_dcam.model.weights import fingerprint
from captum_dcam.results.explanation import versions

if TYPE_CHECKING:
    from captum_dcam.data import Dataset

POLICIES = ("raise", "skip")
#: this number of failures at the start, with no image measured, is a mistake in the settings
HOPELESS = 5


@dataclass(frozen=True)
class Summary:
    r"""What a call did, and how its shard stands.

    Args:
        folder (Path): the store.
        shard (tuple): (i, n).
        total (int): images of the shard.
        measured (int): by this call, failures included.
        failed (int): images of the shard that could not be measured.
        left (int): images of the shard that are not stored yet.
        merged (Path or None): ``results.jsonl``, once all shards are complete.
        problems (tuple of str): what the data set left out.
    """

    folder: Path
    shard: tuple[int, int]
    total: int
    measured: int
    failed: int
    left: int
    merged: Path | None
    problems: tuple[str, ...] = ()


def evaluate(
    plan: Plan,
    folder: str | Path,
    *,
    root: str | Path | None = None,
    shard: tuple[int, int] | None = None,
    device: str | torch.device | None = None,
    on_error: str = "raise",
    retry: bool = False,
    progress: ProgressLike = None,
    stop: Callable[[], bool] | None = None,
    adapter: Adapter | None = None,
    data: Dataset[Any] | None = None,
    trust_remote_code: bool = False,
) -> Summary:
    r"""Measure what a plan says; what the folder holds already is not measured again.

    Args:
        plan (Plan): every setting that decides the numbers.
        folder (path): the store, new or of the same plan.
        root (path, optional): where the data set's files lie.
        shard (tuple, optional): (i, n): every n-th image from the i-th. Default: the process's
            place under ``accelerate launch`` or ``torchrun``, else everything
        device (optional): Default: the process's GPU, or the CPU without one
        on_error (str, optional): ``raise``, or ``skip``: an image that cannot be measured is stored
            with the reason, and so is a variant that fails on an image. Default: ``"raise"``
        retry (bool, optional): measure images again that were stored as failed. Default: False
        progress (bool, callable or Progress, optional): True shows a bar, see
            :mod:`captum_dcam.model.progress`. Default: nothing
        stop (callable, optional): asked before every image whether to end here.
        adapter (Adapter, optional): a loaded model in place of the plan's. Default: it is loaded
        data (Dataset, optional): an open data set in place of the plan's. Default: it is opened
        trust_remote_code (bool, optional): let Python code inside the plan's checkpoint run on this
            machine; a plan cannot say so itself. Default: False

    Returns:
        Summary: of this shard.

    Raises:
        StoreError: the folder belongs to another plan, or another process writes this shard.
        MissingPackageError: a method lacks a package and ``on_error`` is ``raise``.
        EvaluationError: an image failed and ``on_error`` is ``raise``, or all of the first few did.
        FileError: the store cannot be written (a full disk); what is stored stays, run again.
    """
    if on_error not in POLICIES:
        raise InputError(f"on_error is {on_error!r}: expected one of {', '.join(POLICIES)}")
    folder, progress = Path(folder), as_progress(progress, "evaluate")
    number, count = launched_shard() if shard is None else shard
    if not 0 <= number < count:
        raise InputError(f"shard is {(number, count)}: expected (i, n) with i from 0 to n - 1")
    Store.check(folder, plan.record(), count)
    if (finished := _finished(folder, (number, count), retry)) is not None:
        return finished
    if on_error == "raise":
        plan.check_packages()
    with threads(plan.threads):
        progress.say("data")
        data = open_data(plan.dataset, root) if data is None else data
        ids = _selected(plan, data)
        progress.say("model")
        adapter = _load(plan, device, trust_remote_code) if adapter is None else adapter
        trial = Trial(plan, adapter, on_error)
        store = Store.open(
            folder,
            plan.record(),
            facts_of(adapter, data, trial),
            [repr(i) for i in ids],
            start=plan.start,
            shards=count,
        )
        with store.shard(number, retry=retry) as part:
            try:
                measured = _fill(
                    part, trial, data, dict(enumerate(ids, plan.start)), progress, stop
                )
            finally:
                progress.end()
    problems = tuple(str(p) for p in getattr(data, "problems", ()))
    return _summary(store, number, measured, problems)


def _summary(store: Store, number: int, measured: int, problems: tuple[str, ...]) -> Summary:
    """How a shard stands; merges the store once all shards are complete."""
    done, total = store.stored(number), len(store.indices(number))
    return Summary(
        store.folder,
        (number, store.shards),
        total,
        measured,
        sum(done.values()),
        total - len(done),
        None if store.missing() else store.merge(),
        problems,
    )


def _finished(folder: Path, shard: tuple[int, int], retry: bool) -> Summary | None:
    """The summary of a shard that has nothing left to do: no model is loaded for it."""
    if not Store.exists(folder):
        return None
    store = Store.read(folder)
    if store.shards != shard[1]:
        return None  # it was begun anew in other shards, or will be
    done = store.stored(shard[0])
    if len(done) < len(store.indices(shard[0])) or (retry and any(done.values())):
        return None
    store.tidy(shard[0])
    return _summary(store, shard[0], 0, ())


def _fill(
    part: Shard,
    trial: Trial,
    data: Dataset[Any],
    ids: dict[int, Any],
    progress: Progress,
    stop: Callable[[], bool] | None,
) -> int:
    """Measure the images that a shard lacks; returns how many."""
    todo = [i for i in part.indices if i not in part.done]
    progress.begin(len(part.indices), len(part.done), sum(part.done.values()))
    failures = 0
    works = not all(part.done.values())  # an image of an earlier call was measured
    for count, index in enumerate(todo):
        if stop is not None and stop():
            return count
        key = {"index": index, "id": ids[index]}
        try:
            sample = data.sample(ids[index])
            result, cost = trial.measure(ids[index], sample, progress.say)
        except Exception as error:  # a damaged image is a result, not the end
            text = " ".join(f"{type(error).__name__}: {error}".split())
            if trial.on_error == "raise":
                raise EvaluationError(
                    f"image {ids[index]!r} (index {index}): {text}. It is not stored, "
                    "what came before is: run again to go on; on_error='skip' stores it as failed"
                ) from error
            result, cost = {"error": text}, {}
            failures += failures == count  # counts as long as nothing has worked
        part.append({**key, **result}, {**key, **cost})
        progress.image("error" in result)
        if failures == HOPELESS and count + 1 == HOPELESS < len(todo) and not works:
            raise EvaluationError(
                f"the first {HOPELESS} images all failed, the last with {result['error']}. Mend "
                "the settings or the data, and run again with retry"
            )
    return len(todo)


def facts_of(adapter: Adapter, data: Dataset[Any], trial: Trial) -> Record:
    """What results depend on beyond the plan: a store refuses to go on where one differs."""
    return {
        "versions": versions(),
        "family": adapter.family,
        "regime": STORED_CACHES[adapter.cache],
        "dtype": str(adapter.dtype).removeprefix("torch."),
        "device": adapter.device.type,
        "blocks": len(adapter.blocks),
        "weights": fingerprint(adapter.model),
        "layers": trial.layers,
        "data": data.describe(),
    }


def open_data(record: Record, root: str | Path | None) -> Dataset[Any]:
    """The data set of a plan's record, whose files lie in ``root``."""
    from captum_dcam.data import dataset

    options = dict(record)
    name = options.pop("name")
    with reading(root or name):
        return dataset(name, root, **options)


def _selected(plan: Plan, data: Dataset[Any]) -> list[Any]:
    end = None if plan.limit is None else plan.start + plan.limit
    ids = list(data.ids)[plan.start : end]
    if not ids:
        raise InputError(
            f"no images: the data set has {len(data.ids)}, the plan starts at {plan.start}"
        )
    return ids


def _load(plan: Plan, device: str | torch.device | None, trusted: bool = False) -> Adapter:
    from captum_dcam.model.hub import load

    where = launched_device() if device is None else torch.device(device)
    if where.type == "cuda" and where.index is None:
        where = launched_device()  # "cuda" is the process's own GPU, not the first one for all
    if where.type == "cuda":
        torch.cuda.set_device(where)
    dtype = None if plan.dtype is None else getattr(torch, plan.dtype)
    given = {"cache": plan.cache, "device": where, "dtype": dtype, **plan.load}
    return load(plan.model, trust_remote_code=trusted, **given)


@contextmanager
def threads(count: int) -> Iterator[None]:
    """Give torch this number of threads, and restore the old one; 0 changes nothing."""
    before = torch.get_num_threads()
    if count:
        torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
