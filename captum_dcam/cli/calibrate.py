r"""``captum-dcam calibrate``: its options, what it does, and what it prints."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from rich.console import Console
from rich.text import Text

from captum_dcam.cli.options import (
    DECODE,
    DEVICE,
    HOW,
    NAMES,
    WHAT,
    Data,
    command,
    option,
    output_option,
    preset_option,
)
from captum_dcam.cli.parsing import generator, load_chosen, setting_pairs
from captum_dcam.cli.printing import (
    others_on_stderr,
    output_console,
    print_facts,
    print_json,
    progress,
    table_of,
)
from captum_dcam.errors import CalibrationError, MissingFileError

if TYPE_CHECKING:
    from captum_dcam.calibration import Calibration, Collection, Gain
    from captum_dcam.model.adapter import Adapter

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff")


@dataclass(frozen=True)
class Options(Data):
    """The options of ``captum-dcam calibrate``."""

    images: Annotated[
        Path | None, option(WHAT, "A folder of pictures without masks, instead of a data set.")
    ] = None
    labels: Annotated[
        bool,
        option(
            HOW,
            "Search for the highest F3 with the masks; else fit to the maps alone.",
            "--labels/--no-labels",
        ),
    ] = False
    words: Annotated[
        str, option(WHAT, "Without labels: 'nouns' or 'all' words.", names="words"), NAMES["words"]
    ] = "nouns"
    check_start: Annotated[
        int | None,
        option(
            WHAT,
            "First of other images, with masks, on which the gain is measured.",
            default="none",
            min=0,
        ),
    ] = None
    check_limit: Annotated[int | None, option(WHAT, "So many of these.", default="all", min=1)] = (
        None
    )
    preset: Annotated[str, preset_option("To start from")] = "default"
    seed: Annotated[int, option(DECODE, "Of sampling, cross-validation and intervals.")] = 0
    device: Annotated[str, DEVICE] = "cpu"
    output: Annotated[Path, output_option("The preset file.")] = Path("preset.json")

    @property
    def checks(self) -> bool:
        """Whether the gain on other images is asked for."""
        return self.check_start is not None or self.check_limit is not None


@command
def calibrate(options: Options) -> None:
    """Fit the refinements' thresholds to a model, and save them as a preset.

    Example: captum-dcam calibrate --labels --data count=1100 --limit 40 --check-start 1000
    --check-limit 100; then captum-dcam explain photo.jpg --preset preset.json
    """
    with others_on_stderr():
        done = run(options)
    if options.json:
        print_json(document(done))
    else:
        print_calibration(done)


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
        from captum_dcam.model.prompts import open_picture

        return open_picture(self.path)


def run(options: Options) -> Calibrated:
    """Fit, check and write; everything that can be checked is checked before any work."""
    from captum_dcam.calibration import collect, compare, fit_labelled, fit_unlabelled, values_of
    from captum_dcam.evaluation.harness import threads
    from captum_dcam.evaluation.progress import Live
    from captum_dcam.model.hub import check_device
    from captum_dcam.presets import check_writable, preset, write_preset

    base = preset(options.preset)
    generator(options.seed)  # refuses what no generator takes
    stages = tuple(base.refinements())
    values_of(stages)  # refuses what has nothing to fit
    device = check_device(options.device)
    check_writable(options.output)
    generation = setting_pairs("--generation", options.generation)
    setting_pairs("--load", options.load)
    data = _opened(options)
    ids, check_ids = _chosen(data.ids, options)
    with threads(options.threads):
        adapter = load_chosen(options, device)
        layer = adapter.check_layer(options.layer)

        def gathered(which: Sequence[Any], labelled: bool, label: str) -> Collection:
            own = {"layer": layer, "generation": generation, "labelled": labelled}
            given = options.shared(collect, preset=base, data=data, progress=Live(label), **own)
            return collect(adapter, ids=which, **given)

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
        gain, routing = checked
        scores = {"scores": asdict(gain), "routing": list(routing)}
        record["check"] = {"images": list(check_ids), **scores}
    write_preset(options.output, options.preset, base, found.fitted, record)
    return Calibrated(options.output, found, checked, record)


def _opened(options: Options) -> Any:
    """The data set, or a folder of pictures."""
    from captum_dcam.data import dataset
    from captum_dcam.files import reading

    if options.images is None:
        settings = setting_pairs("--data", options.data)
        with reading(options.root or options.dataset):
            return dataset(options.dataset, options.root, **settings)
    if options.labels or options.checks:
        raise CalibrationError(
            "--images are pictures without masks: --labels and --check-start need a data set "
            "(--dataset folder reads your own pictures and masks)"
        )
    if options.root is not None or options.data:
        raise CalibrationError("--images brings its own files: leave out --root and --data")
    if options.prompt is None:
        raise CalibrationError("--images have no prompt: give one with --prompt")
    with reading(options.images):
        return Pictures(options.images)


def _chosen(known: Sequence[Any], options: Options) -> tuple[list[Any], list[Any]]:
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
    options: Options,
    adapter: Adapter,
    layer: int,
    generation: dict[str, Any],
    data: Any,
    ids: Sequence[Any],
    found: Calibration,
) -> dict[str, Any]:
    """What the file says of the fit: enough to make it again."""
    from captum_dcam.calibration.fit import QUANTILES
    from captum_dcam.evaluation.harness import fingerprint
    from captum_dcam.model.trajectory import STORED_CACHES
    from captum_dcam.results.explanation import versions

    return {
        "labels": options.labels,
        "model": options.model,
        "family": adapter.family,
        "weights": fingerprint(adapter.model),
        "regime": STORED_CACHES[adapter.cache],
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


# -- what is printed -------------------------------------------------------------------------------


def print_calibration(done: Calibrated) -> None:
    """The thresholds that changed, routing ratios, scores, and what they are worth."""
    from captum_dcam.calibration import PARAMETERS

    console, found = output_console(120), done.calibration
    how = "masks: the highest mean F3" if found.labelled else "maps alone: the paper's routing"
    print_facts(
        console,
        {
            "Fitted": f"from {how}",
            "On": f"{found.words} words of {found.images} images",
            "Model": f"{done.record['model']}, block {done.record['layer']}, "
            f"weights {done.record['weights']}",
        },
    )
    drawn = table_of("Threshold", "Before", "After", "", right=("Before", "After"))
    for name in found.changed:
        after = found.after[name]
        ends = found.labelled and PARAMETERS[name].ends(after)
        drawn.add_row(
            Text(name), _value(found.before[name]), _value(after), "end of its grid" if ends else ""
        )
    if found.changed:
        console.print(drawn)
    kept = len(found.before) - len(found.changed)
    why = "without gain" if found.labelled else "which unlabelled maps say nothing about"
    console.print(Text(f"{kept} others stay as they were, {why}.", style="dim"))
    _print_routing(console, "DACG routing", found.routing)
    first, last = found.gated
    if first is not None and last is not None:
        console.print(f"SICD's gate: {first:.1%} of the maps before, {last:.1%} after.")
    scored = [
        ("fitted on (flatters)", found.own),
        ("cross-validated", found.held),
        ("other images", done.checked[0] if done.checked is not None else None),
    ]
    _print_scores(console, {name: gain for name, gain in scored if gain is not None})
    if done.checked is not None:
        _print_routing(console, "Routing, other images", done.checked[1])
    print_facts(console, {"Preset": f"{done.file}  (captum-dcam explain --preset {done.file})"})


def _value(value: float | None) -> str:
    return "off" if value is None else f"{value:g}"


def _print_routing(
    console: Console, title: str, routing: tuple[Mapping[str, float], Mapping[str, float]]
) -> None:
    from captum_dcam.refine import DACG_BRANCHES

    if not routing[0]:
        return
    drawn = table_of(title, *DACG_BRANCHES, right=DACG_BRANCHES)
    for name, shares in zip(("before", "after"), routing, strict=True):
        drawn.add_row(name, *(f"{shares.get(b, 0.0):.1%}" for b in DACG_BRANCHES))
    console.print(drawn)


def _print_scores(console: Console, gains: Mapping[str, Gain]) -> None:
    """Before and after on each set of words, and whether the gain is beyond chance."""
    if not gains:
        return
    heads = ("Images", "Words", "Obj-IoU", "Contrast", "Conc.", "F3", "Gain in F3 (95 %)")
    drawn = table_of("Scores", "", *heads, right=heads)
    for name, gain in gains.items():
        for label, scores in (("before", gain.before), ("after", gain.after)):
            sizes = (str(gain.images), str(gain.words)) if label == "before" else ("", "")
            figures = [f"{scores[k]:.{2 if k == 'contrast' else 4}f}" for k in scores]
            shift = f"{gain.gain:+.4f} ({gain.low:+.4f} to {gain.high:+.4f})"
            shown = name if label == "before" else ""
            drawn.add_row(shown, label, *sizes, *figures, "" if label == "before" else shift)
    console.print(drawn)
    for name, gain in gains.items():
        if name != "fitted on (flatters)" and gain.low <= 0 <= gain.high:
            console.print(Text(f"No gain beyond chance: {name}.", style="yellow"))
        elif gain.high < 0:
            console.print(Text(f"A loss: {name}.", style="red"))
    console.print(Text("Contrast is capped at 20, as in F3; means over words.", style="dim"))


def document(done: Calibrated) -> dict[str, Any]:
    """What was fitted as plain data."""
    return {"preset": str(done.file), **done.record}
