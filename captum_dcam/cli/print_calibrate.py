r"""What ``captum-dcam calibrate`` prints: thresholds, routing and scores before and after."""

from __future__ import annotations

import json
from collections.abc import Mapping

import typer
from rich.console import Console
from rich.text import Text

from captum_dcam.calibration import PARAMETERS, Gain
from captum_dcam.cli.calibrate import Calibrated
from captum_dcam.cli.printing import output_console, print_facts, table_of
from captum_dcam.refine import DACG_BRANCHES


def print_calibration(done: Calibrated) -> None:
    """The thresholds that changed, routing ratios, scores, and what they are worth."""
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


def print_json(done: Calibrated) -> None:
    """One JSON document on standard output."""
    found = {"preset": str(done.file), **done.record}
    typer.echo(json.dumps(found, indent=1, ensure_ascii=False))
