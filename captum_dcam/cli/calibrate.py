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
from captum_dcam.packages import importable

if TYPE_CHECKING:
    from captum_dcam.calibration import Calibration, Collection, Gain
    from captum_dcam.cli.printing import Say
    from captum_dcam.data import Dataset
    from captum_dcam.metrics import Reliability
    from captum_dcam.model.adapter import Adapter
    from captum_dcam.model.progress import Progress
    from captum_dcam.presets import Preset

#: columns of scores: what each is called, and its digits
SCORES = {
    "obj_iou": ("Obj-IoU", 4),
    "contrast": ("Contrast", 2),
    "concentration": ("Conc.", 4),
    "f3": ("F3", 4),
    "insertion": ("Insertion", 4),
}


class Options(Data):
    """The options of ``captum-dcam calibrate``."""

    images: Path | None = option(
        None, WHAT, "A folder of images without masks, instead of a data set."
    )
    inventions: Path | None = option(
        None,
        WHAT,
        "Results of evaluate --suite inventions: fit nothing but which words are probably not "
        "grounded, on half of their images, and report on the others.",
        "--inventions",
        metavar="FOLDER",
    )
    labels: bool = option(
        False,
        HOW,
        "Search for the highest F3 with the masks; else for the highest insertion, without them.",
        "--labels/--no-labels",
    )
    words: str = option(
        "nouns",
        WHAT,
        "Without labels: 'nouns' or 'all' words.",
        names="words",
        strict=True,
    )
    check_start: int | None = option(
        None, WHAT, "First of the other images, on which the gain is measured.", shown="none", min=0
    )
    check_limit: int | None = option(None, WHAT, "Number of these images.", shown="all", min=1)
    preset: str = preset_option("To start from")
    layers: str | None = option(
        None,
        HOW,
        "Blocks to try beside --layer: numbers with commas, or 'all'.",
        shown="none",
    )
    seed: int = option(0, DECODE, "Of sampling, cross-validation and intervals.")
    device: str | None = device_option()
    output: Path = output_option("preset.json", "The preset file.")


@command
def calibrate(options: Options) -> None:
    """Fit the refinements and the block to a model, and save them as a preset.

    Examples: captum-dcam calibrate --labels --data count=1100 --limit 40 --check-start 1000
    --check-limit 100; captum-dcam calibrate --images photos -p "what is in the image ?" --layers
    all; then captum-dcam explain photo.jpg --preset preset.json. Which words are not grounded:
    captum-dcam evaluate --suite inventions -o results; captum-dcam calibrate --inventions results
    """
    if options.inventions is not None:
        from captum_dcam.cli.grounding import document as plain
        from captum_dcam.cli.grounding import fit, show

        run_and_print(options, fit, plain, show)
        return
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
        reliability (Reliability or None): fitted with masks: how well maps localise.
    """

    file: Path
    calibration: Calibration
    checked: tuple[Gain, tuple[dict[str, float], dict[str, float]]] | None
    record: dict[str, Any]
    reliability: Reliability | None


def run(options: Options) -> Calibrated:
    """Fit, check and write; everything that can be checked is checked before any work."""
    from captum_dcam.calibration import compare, fit_blocks, fit_reliability, values_of
    from captum_dcam.evaluation.harness import threads
    from captum_dcam.model.hub import check_device
    from captum_dcam.presets import check_writable, preset, write_preset

    base = preset(options.preset)
    generator(options.seed)  # refuses what no generator takes
    if options.seed < 0:  # and what no evaluation does
        raise CalibrationError(f"--seed is {options.seed}: expected a whole number, at least 0")
    stages = tuple(base.refinements())
    values_of(stages, labels=options.labels)  # refuses what has nothing to fit
    device = check_device(options.device)
    check_writable(options.output)
    generation = setting_pairs("--generation", options.generation)
    setting_pairs("--load", options.load)
    given = _layers(options)
    data = _opened(options)
    ids, check_ids = _chosen(data.ids, options)
    with threads(options.threads), progress(options.quiet) as say:
        adapter = load_chosen(options, device)
        start = adapter.check_layer(options.layer if options.layer is not None else base.layer)
        others = range(adapter.deepest_block + 1) if given is None else given
        layers = dict.fromkeys((start, *map(adapter.check_layer, others)))

        def collected(which: Sequence[Any], layer: int, label: str) -> Collection:
            return _collected(options, adapter, base, data, which, layer, generation, label, say)

        blocks = (collected(ids, n, "calibrate") for n in layers)
        found = fit_blocks(blocks, stages, seed=options.seed, say=say)
        checked = None
        if check_ids:
            before = after = collected(check_ids, start, "check")
            if found.layer != start:
                after = collected(check_ids, found.layer, "check")
            checked = compare((before, found.start), (after, found.fitted), options.seed)
        reliability = base.reliability
        if options.labels and importable("sklearn"):
            own = {"preset": base, "data": data, "layer": found.layer, "generation": generation}
            told = _told("reliability", say)
            reliability = fit_reliability(
                adapter, ids=ids, **options.shared(fit_reliability, progress=told, **own)
            )
    record = _record(options, adapter, generation, data, ids, found)
    if checked is not None:
        gain, routing = checked
        scores = {"scores": asdict(gain), "routing": list(routing)}
        record["check"] = {"images": list(check_ids), **scores}
    asked = options.layer is not None or len(layers) > 1 or base.layer is not None
    layer = found.layer if asked else None
    kept = reliability, base.calibrator
    write_preset(options.output, options.preset, base, found.fitted, record, layer, *kept)
    return Calibrated(options.output, found, checked, record, reliability)


def _collected(
    options: Options,
    adapter: Adapter,
    base: Preset,
    data: Any,
    ids: Sequence[Any],
    layer: int,
    generation: dict[str, Any],
    label: str,
    say: Say,
) -> Collection:
    """The words of some images at a block; ``say`` is told of every image."""
    from captum_dcam.calibration import collect, collect_answers

    call = collect if options.labels else collect_answers
    given = {"preset": base, "data": data, "layer": layer, "generation": generation}
    return call(
        adapter,
        ids=ids,
        **options.shared(call, progress=_told(f"{label}, block {layer}", say), **given),
    )


def _told(label: str, say: Say) -> Progress:
    """Tells of every image."""
    from captum_dcam.model.progress import Progress

    class Told(Progress):
        def say(self, text: str) -> None:
            say(f"{label}, image {text}")

    return Told()


def _layers(options: Options) -> list[int] | None:
    """The blocks that ``--layers`` names; None for ``all``."""
    if options.layers is None:
        return []
    if options.layers == "all":
        return None
    try:
        return [int(one) for one in options.layers.split(",")]
    except ValueError:
        raise CalibrationError(
            f"--layers {options.layers!r}: expected numbers of blocks with commas, as in 0,1,2, or "
            "'all'"
        ) from None


def _opened(options: Options) -> Dataset[Any]:
    """The data set, or a folder of images."""
    from captum_dcam.data import ImageFolder
    from captum_dcam.evaluation.harness import open_data

    settings = setting_pairs("--data", options.data)
    if options.images is None:
        return open_data({**settings, "name": options.dataset}, options.root)
    if options.labels:
        raise CalibrationError(
            "--images are images without masks: --labels needs a data set (--dataset folder reads "
            "your own images and masks)"
        )
    if options.root is not None or options.data:
        raise CalibrationError("--images brings its own files: leave out --root and --data")
    if options.prompt is None:
        raise CalibrationError(
            "--images have no prompt: give one with --prompt, such as 'describe the image .'"
        )
    return ImageFolder(options.images)


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
    generation: dict[str, Any],
    data: Any,
    ids: Sequence[Any],
    found: Calibration,
) -> dict[str, Any]:
    """What the file says of the fit: enough to make it again."""
    from captum_dcam.calibration.fit import QUANTILES
    from captum_dcam.model.trajectory import STORED_CACHES
    from captum_dcam.model.weights import fingerprint
    from captum_dcam.results.explanation import versions

    return {
        "labels": options.labels,
        "objective": found.kind.objective,
        "model": options.model,
        "family": adapter.family,
        "weights": fingerprint(adapter.model),
        "regime": STORED_CACHES[adapter.cache],
        "layer": found.layer,
        "blocks": [[layer, objective] for layer, objective in found.blocks.items()],
        "dtype": str(adapter.dtype).removeprefix("torch."),
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
        "scores": asdict(found.own),
        "cross_validated": asdict(found.held),
        "steps": [asdict(step) for step in found.steps],
        "evaluations": found.evaluations,
        "passes": found.passes,
        "versions": versions(),
    }


# -- what is printed -------------------------------------------------------------------------------


def print_calibration(done: Calibrated) -> None:
    """What changed, blocks, routing ratios, scores, and what they are worth."""
    console, found = output_console(120), done.calibration
    name = SCORES[found.kind.objective][0]
    facts = {
        "Fitted": f"from masks: the highest mean {name}"
        if found.kind.labelled
        else "without masks: the highest mean area under the insertion curve",
        "On": f"{found.words} words of {found.images} images",
        "Model": f"{done.record['model']}, block {found.layer}, weights {done.record['weights']}",
    }
    if len(found.blocks) > 1:
        facts["Blocks"] = ", ".join(f"{n}: {best:.4f}" for n, best in found.blocks.items())
    if found.passes:
        facts["Passes"] = f"{found.passes} forward passes for {found.evaluations} settings"
    print_facts(console, facts)
    _print_changes(console, found)
    _print_routing(console, "DACG routing", found.routing)
    first, last = found.gated
    if first is not None and last is not None:
        console.print(f"SICD's gate: {first:.1%} of the maps before, {last:.1%} after.")
    gains = {"fitted on (flatters)": found.own, "cross-validated": found.held}
    if done.checked is not None:
        gains["other images"] = done.checked[0]
    _print_scores(console, gains, name)
    if done.checked is not None:
        _print_routing(console, "Routing, other images", done.checked[1])
    if done.reliability is not None:
        print_facts(console, {"Localises": done.reliability.fitted_on})
    elif found.kind.labelled:
        console.print(
            "How well a map localises was not fitted: it needs the extra eval, and ten words for "
            "objects and ten function words.",
            style="dim",
        )
    print_facts(console, {"Preset": f"{done.file}  (captum-dcam explain --preset {done.file})"})


def _print_changes(console: Console, found: Calibration) -> None:
    """Block and settings that are not what they were."""
    from captum_dcam.calibration import PARAMETERS

    drawn = table_of("Setting", "Before", "After", "", right=("Before", "After"))
    start = next(iter(found.blocks))
    if found.layer != start:
        drawn.add_row("block", str(start), str(found.layer), "")
    for name in found.changed:
        values = (found.before[name], found.after[name])
        ends = (
            "end of its grid"
            if PARAMETERS[name].ends(values[1], labels=found.kind.labelled)
            else ""
        )
        drawn.add_row(Text(name), *map(_value, values), ends)
    if drawn.row_count:
        console.print(drawn)
    kept = len(found.before) - len(found.changed)
    console.print(Text(f"{kept} others stay as they were, without gain.", style="dim"))


def _value(value: float | None) -> str:
    """A setting as it is shown."""
    if isinstance(value, bool):
        return "yes" if value else "no"
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


def _print_scores(console: Console, gains: Mapping[str, Gain], objective: str) -> None:
    """Before and after on each set of words, and whether the gain is beyond chance."""
    columns = list(next(iter(gains.values())).before)
    names = [SCORES[column][0] for column in columns]
    heads = ("Images", "Words", *names, f"Gain in {objective} (95 %)")
    drawn = table_of("Scores", "", *heads, right=heads)
    for name, gain in gains.items():
        for label, scores in (("before", gain.before), ("after", gain.after)):
            sizes = (str(gain.images), str(gain.words)) if label == "before" else ("", "")
            figures = [f"{scores[k]:.{SCORES[k][1]}f}" for k in columns]
            shift = f"{gain.gain:+.4f} ({gain.low:+.4f} to {gain.high:+.4f})"
            shown = name if label == "before" else ""
            drawn.add_row(shown, label, *sizes, *figures, "" if label == "before" else shift)
    console.print(drawn)
    for name, gain in gains.items():
        if name != "fitted on (flatters)" and gain.low <= 0 <= gain.high:
            console.print(Text(f"No gain beyond chance: {name}.", style="yellow"))
        elif gain.high < 0:
            console.print(Text(f"A loss: {name}.", style="red"))
    capped = "Contrast is capped at 20, as in F3; means over words."
    plain = "Mean area under the curve of the word's probability; means over words."
    console.print(Text(capped if "contrast" in columns else plain, style="dim"))


def document(done: Calibrated) -> dict[str, Any]:
    """What was fitted as plain data."""
    return {"preset": str(done.file), **done.record}
