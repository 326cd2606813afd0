r"""``captum-dcam calibrate``: its options, what it does, and what it prints."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.text import Text

from captum_dcam.cli.options import (
    DECODE,
    HOW,
    WHAT,
    Data,
    command,
    device_option,
    option,
    output_option,
    preset_option,
)
from captum_dcam.cli.parsing import generator, load_chosen, setting_pairs
from captum_dcam.cli.printing import output_console, print_facts, progress, run_and_print, table_of
from captum_dcam.errors import CalibrationError

if TYPE_CHECKING:
    from captum_dcam.calibration import Calibration, Collection, Gain
    from captum_dcam.model.adapter import Adapter

#: which words are explained without labels: nouns by the tagger, or every word
WORDS = ("nouns", "all")
LATER = "A fit without labels is not in this version: another one will come."


class Options(Data):
    """The options of ``captum-dcam calibrate``."""

    images: Path | None = option(
        None, WHAT, f"A folder of images without masks, instead of a data set. {LATER}"
    )
    labels: bool = option(
        False,
        HOW,
        f"Search for the highest F3 with the masks; else fit without them. {LATER}",
        "--labels/--no-labels",
    )
    words: str = option(
        "nouns",
        WHAT,
        f"Without labels: 'nouns' or 'all' words. {LATER}",
        names="words",
        strict=True,
    )
    check_start: int | None = option(
        None, WHAT, "First of the other images, on which the gain is measured.", shown="none", min=0
    )
    check_limit: int | None = option(None, WHAT, "Number of these images.", shown="all", min=1)
    preset: str = preset_option("To start from")
    seed: int = option(0, DECODE, "Of sampling, cross-validation and intervals.")
    device: str = device_option()
    output: Path = output_option("preset.json", "The preset file.")


@command
def calibrate(options: Options) -> None:
    """Fit the refinements' thresholds to a model, and save them as a preset.

    Example: captum-dcam calibrate --labels --data count=1100 --limit 40 --check-start 1000
    --check-limit 100; then captum-dcam explain photo.jpg --preset preset.json
    """
    run_and_print(options, run, document, print_calibration)


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


def run(options: Options) -> Calibrated:
    """Fit, check and write; everything that can be checked is checked before any work."""
    from captum_dcam.calibration import collect, compare, fit_labelled, values_of
    from captum_dcam.evaluation.harness import Live, open_data, threads
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
    settings = setting_pairs("--data", options.data)
    _check_labels(options)
    data = open_data({**settings, "name": options.dataset}, options.root)
    ids, check_ids = _chosen(data.ids, options)
    with threads(options.threads):
        adapter = load_chosen(options, device)
        layer = adapter.check_layer(options.layer)

        def collected(which: Sequence[Any], label: str) -> Collection:
            own = {"preset": base, "data": data, "layer": layer, "generation": generation}
            given = options.shared(collect, progress=Live(label), **own)
            return collect(adapter, ids=which, **given)

        maps = collected(ids, "calibrate")
        with progress() as say:
            found = fit_labelled(maps, stages, seed=options.seed, say=say)
        checked = None
        if check_ids:
            others = collected(check_ids, "check")
            checked = compare(others, found.start, found.fitted, options.seed)
    record = _record(options, adapter, layer, generation, data, ids, found)
    if checked is not None:
        gain, routing = checked
        scores = {"scores": asdict(gain), "routing": list(routing)}
        record["check"] = {"images": list(check_ids), **scores}
    write_preset(options.output, options.preset, base, found.fitted, record)
    return Calibrated(options.output, found, checked, record)


def _check_labels(options: Options) -> None:
    """Refuse what asks for a fit without labels, and seeds that no evaluation takes."""
    if options.seed < 0:
        raise CalibrationError(f"--seed is {options.seed}: expected a whole number, at least 0")
    if options.images is not None and options.labels:
        raise CalibrationError(
            "--images are images without masks: --labels needs a data set (--dataset folder reads "
            "your own images and masks)"
        )
    if not options.labels:
        given = "no --labels" if options.images is None else f"--images {options.images}"
        raise CalibrationError(
            f"{given} asks for a fit without labels, which is not in this version: the fit to map "
            "shapes of earlier versions gained nothing, and another fit will take its place. Give "
            "images with masks and --labels (--dataset folder reads your own), or use "
            "--preset default as it is"
        )


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
    if options.check_start is None and options.check_limit is None:
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
        "labels": True,
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
        "words": "objects with a mask",
        "seed": options.seed,
        "used": {"images": found.images, "words": found.words},
        "changed": {name: [found.before[name], found.after[name]] for name in found.changed},
        "routing": list(found.routing),
        "gated": list(found.gated),
        "quantiles": list(QUANTILES),
        "statistics": found.statistics,
        "scores": asdict(found.own),
        "cross_validated": asdict(found.held),
        "steps": [asdict(step) for step in found.steps],
        "versions": versions(),
    }


# -- what is printed -------------------------------------------------------------------------------


def print_calibration(done: Calibrated) -> None:
    """The thresholds that changed, routing ratios, scores, and what they are worth."""
    from captum_dcam.calibration import PARAMETERS

    console, found = output_console(120), done.calibration
    print_facts(
        console,
        {
            "Fitted": "from masks: the highest mean F3",
            "On": f"{found.words} words of {found.images} images",
            "Model": f"{done.record['model']}, block {done.record['layer']}, "
            f"weights {done.record['weights']}",
        },
    )
    drawn = table_of("Threshold", "Before", "After", "", right=("Before", "After"))
    for name in found.changed:
        values = (found.before[name], found.after[name])
        shown = ("off" if value is None else f"{value:g}" for value in values)
        ends = "end of its grid" if PARAMETERS[name].ends(values[1]) else ""
        drawn.add_row(Text(name), *shown, ends)
    if found.changed:
        console.print(drawn)
    kept = len(found.before) - len(found.changed)
    console.print(Text(f"{kept} others stay as they were, without gain.", style="dim"))
    _print_routing(console, "DACG routing", found.routing)
    first, last = found.gated
    if first is not None and last is not None:
        console.print(f"SICD's gate: {first:.1%} of the maps before, {last:.1%} after.")
    gains = {"fitted on (flatters)": found.own, "cross-validated": found.held}
    if done.checked is not None:
        gains["other images"] = done.checked[0]
    _print_scores(console, gains)
    if done.checked is not None:
        _print_routing(console, "Routing, other images", done.checked[1])
    print_facts(console, {"Preset": f"{done.file}  (captum-dcam explain --preset {done.file})"})


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
