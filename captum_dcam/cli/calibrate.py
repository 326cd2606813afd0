r"""What ``captum-dcam calibrate`` does, without its printing."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from captum_dcam.calibration import (
    Calibration,
    Collection,
    Gain,
    collect,
    compare,
    fit_labelled,
    fit_unlabelled,
    values_of,
)
from captum_dcam.calibration.fit import QUANTILES
from captum_dcam.calibration.maps import WORDS
from captum_dcam.cli.explain import check_device, check_name, progress
from captum_dcam.cli.parsing import DTYPES, load_model, setting_pairs
from captum_dcam.data import DATASETS, dataset
from captum_dcam.errors import CalibrationError, MissingFileError
from captum_dcam.evaluation.harness import fingerprint
from captum_dcam.evaluation.progress import Live
from captum_dcam.model.adapter import Adapter
from captum_dcam.model.prompts import open_picture
from captum_dcam.presets import check_writable, write_preset
from captum_dcam.presets import preset as find_preset
from captum_dcam.results.explanation import versions

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff")


@dataclass(frozen=True)
class CalibrateOptions:
    r"""The options of ``captum-dcam calibrate``.

    Args:
        images (Path or None): a folder of pictures without masks, in place of a data set.
        dataset (str): name of a data set. Default of the command: ``"scenes"``
        root (Path or None): folder with its files.
        data (list of str or None): its settings, ``name=value``.
        labels (bool): search with the masks for the highest F3; else look at maps alone.
        words (str): without labels: ``"nouns"`` or ``"all"``. Default of the command: ``"nouns"``
        start (int), limit (int or None): images, in the data's order.
        check_start (int or None), check_limit (int or None): other images, with masks, on which
            the gain is measured; they must not overlap. Either asks for the check.
        prompt (str or None): Default: the data's
        preset (str): to start from. Default of the command: ``"default"``
        model, regime, layer, device, dtype: as in ``captum-dcam explain``.
        load (list of str or None): settings of loading, ``name=value``.
        generation (list of str or None): decoding settings, ``name=value``.
        seed (int): of sampled decoding, the parts of the cross-validation, the bootstrap.
        threads (int): of torch on the CPU; 0 leaves them. Default of the command: 1
        output (Path): the preset file. Default of the command: ``preset.json``
        json (bool): print one JSON document.
    """

    images: Path | None
    dataset: str
    root: Path | None
    data: list[str] | None
    labels: bool
    words: str
    start: int
    limit: int | None
    check_start: int | None
    check_limit: int | None
    prompt: str | None
    preset: str
    model: str
    load: list[str] | None
    regime: str | None
    layer: int | None
    generation: list[str] | None
    seed: int
    device: str
    dtype: str
    threads: int
    output: Path
    json: bool

    @property
    def checks(self) -> bool:
        """Whether the gain on other images is asked for."""
        return self.check_start is not None or self.check_limit is not None


@dataclass(frozen=True)
class Calibrated:
    r"""What was fitted and written.

    Args:
        file (Path): the preset file.
        calibration (Calibration): before and after.
        checked (tuple or None): the gain on other images, and DACG's routing there before and
            after.
        record (dict): what the file says of the fit.
    """

    file: Path
    calibration: Calibration
    checked: tuple[Gain, tuple[dict[str, float], dict[str, float]]] | None
    record: dict[str, Any]


class Pictures:
    """A folder's pictures in the order of their names, without masks; an id is a file's name."""

    def __init__(self, folder: Path) -> None:
        if not folder.is_dir():
            raise MissingFileError(f"{folder} is no folder: give --images a folder of pictures")
        found = (p for p in folder.iterdir() if p.is_file() and p.suffix.lower() in SUFFIXES)
        self.folder, self.ids = folder, tuple(sorted(p.name for p in found))
        if not self.ids:
            raise MissingFileError(f"{folder} has no pictures: expected {', '.join(SUFFIXES)}")

    def sample(self, image_id: str) -> _Picture:
        """One picture; not opened yet."""
        return _Picture(self.folder / image_id)

    def describe(self) -> dict[str, Any]:
        """JSON-able record."""
        return {"name": "pictures", "images": len(self.ids)}


@dataclass(frozen=True)
class _Picture:
    path: Path
    prompt: None = None
    objects: tuple[()] = ()

    def image(self) -> Any:
        return open_picture(self.path)


def run(options: CalibrateOptions) -> Calibrated:
    """Fit, check and write; everything that can be checked is checked before any work."""
    check_name("dtype", options.dtype, DTYPES)
    check_name("words", options.words, WORDS)
    base = find_preset(options.preset)
    stages = tuple(base.refinements())
    values_of(stages)  # refuses what has nothing to fit
    device = check_device(options.device)
    check_writable(options.output)
    generation = setting_pairs("--generation", options.generation)
    settings = setting_pairs("--load", options.load)
    data = _opened(options)
    ids, check_ids = _chosen(data.ids, options)
    with _threads(options.threads):
        adapter = load_model(
            options.model, settings, regime=options.regime, device=device, dtype=options.dtype
        )
        layer = adapter.check_layer(options.layer)

        def gathered(which: Sequence[Any], labelled: bool, label: str) -> Collection:
            return collect(
                adapter,
                data,
                which,
                base,
                labelled=labelled,
                words=options.words,
                layer=layer,
                prompt=options.prompt,
                generation=generation,
                seed=options.seed,
                progress=Live(label),
            )

        maps = gathered(ids, options.labels, "calibrate")
        with progress() as say:
            if options.labels:
                found = fit_labelled(maps, stages, seed=options.seed, say=say)
            else:
                found = fit_unlabelled(maps, stages)
        checked = None
        if check_ids:
            others = gathered(check_ids, True, "check")
            checked = compare(others, found.start, found.fitted, options.seed)
    record = _record(options, adapter, layer, generation, data, ids, found)
    if checked is not None:
        record["check"] = {"images": list(check_ids), **_compared(*checked)}
    write_preset(options.output, options.preset, base, found.fitted, record)
    return Calibrated(options.output, found, checked, record)


def _opened(options: CalibrateOptions) -> Any:
    """The data set, or a folder of pictures."""
    if options.images is None:
        check_name("data set", options.dataset, DATASETS)
        return dataset(options.dataset, options.root, **setting_pairs("--data", options.data))
    if options.labels or options.checks:
        raise CalibrationError(
            "--images are pictures without masks: --labels and --check-start need a data set "
            "(--dataset folder reads your own pictures and masks)"
        )
    if options.root is not None or options.data:
        raise CalibrationError("--images brings its own files: leave out --root and --data")
    if options.prompt is None:
        raise CalibrationError("--images have no prompt: give one with --prompt")
    return Pictures(options.images)


def _chosen(known: Sequence[Any], options: CalibrateOptions) -> tuple[list[Any], list[Any]]:
    """Ids to fit on, and ids to check on, which must be others."""

    def part(start: int, limit: int | None, name: str) -> list[Any]:
        found = list(known)[start : None if limit is None else start + limit]
        if not found:
            raise CalibrationError(
                f"--{name} is {start}, and the data set has {len(known)} images: no image is left"
                " (the data set 'scenes' has as many as --data count=… says)"
            )
        return found

    ids = part(options.start, options.limit, "start")
    if not options.checks:
        return ids, []
    after = options.start + len(ids)
    start = after if options.check_start is None else options.check_start
    check_ids = part(start, options.check_limit, "check-start")
    if shared := set(ids) & set(check_ids):
        raise CalibrationError(
            f"{len(shared)} images are in both parts, {min(shared, key=ids.index)!r} first: a gain "
            f"on images that were fitted on is none. Give --limit, or --check-start {after}"
        )
    return ids, check_ids


def _record(
    options: CalibrateOptions,
    adapter: Adapter,
    layer: int,
    generation: dict[str, Any],
    data: Any,
    ids: Sequence[Any],
    found: Calibration,
) -> dict[str, Any]:
    """What the file says of the fit: enough to make it again."""
    return {
        "labels": options.labels,
        "model": options.model,
        "family": adapter.family,
        "weights": fingerprint(adapter.model),
        "regime": adapter.regime,
        "layer": layer,
        "dtype": options.dtype,
        "device": adapter.device.type,
        "data": data.describe(),
        "images": list(ids),
        "prompt": options.prompt,
        "generation": generation,
        "words": "objects with a mask" if options.labels else options.words,
        "seed": options.seed,
        "used": {"images": found.images, "words": found.words},
        "changed": {name: [found.before[name], found.after[name]] for name in found.changed},
        "routing": list(found.routing),
        "gated": list(found.gated),
        "quantiles": list(QUANTILES),
        "statistics": found.statistics,
        "scores": None if found.own is None else asdict(found.own),
        "cross_validated": None if found.held is None else asdict(found.held),
        "steps": [asdict(step) for step in found.steps],
        "versions": versions(),
    }


def _compared(gain: Gain, routing: tuple[dict[str, float], dict[str, float]]) -> dict[str, Any]:
    return {"scores": asdict(gain), "routing": list(routing)}


@contextmanager
def _threads(count: int) -> Iterator[None]:
    """So many threads of torch, as before afterwards; 0: leave them."""
    before = torch.get_num_threads()
    if count:
        torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
