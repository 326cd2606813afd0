r"""``captum-dcam calibrate --inventions``: which words are probably not grounded."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from captum_dcam.cli.options import flag
from captum_dcam.cli.printing import output_console, print_facts
from captum_dcam.errors import CalibrationError

if TYPE_CHECKING:
    from pathlib import Path

    from captum_dcam.metrics import Calibrator

#: what fits something else, and is refused beside it
OTHERS = ("images", "labels", "root", "data", "layer", "layers", "check_start", "check_limit")


@dataclass(frozen=True)
class Grounded:
    r"""A calibrator that was fitted and written.

    Args:
        file (Path): the preset file.
        calibrator (Calibrator): fitted on half of the images.
        tried (dict): what it does on the others.
    """

    file: Path
    calibrator: Calibrator
    tried: dict[str, Any]


def fit(options: Any) -> Grounded:
    """Fit the calibrator alone, and write it beside all that the preset has; ``options`` are those
    of ``captum-dcam calibrate``."""
    from captum_dcam.calibration import fit_calibrator
    from captum_dcam.presets import check_writable, preset, write_preset

    for name in OTHERS:
        if getattr(options, name):
            raise CalibrationError(
                f"{flag(options, name)} beside --inventions, which reads results that are there "
                "and fits nothing else: leave it out, or fit one after the other (--preset takes "
                "the first's file)"
            )
    base = preset(options.preset)
    check_writable(options.output)
    found, tried = fit_calibrator(options.inventions)
    record = {"inventions": tried, "calibrator": found.fitted_on}
    kept = base.layer, base.reliability
    write_preset(
        options.output, options.preset, base, tuple(base.refinements()), record, *kept, found
    )
    return Grounded(options.output, found, tried)


def show(done: Grounded) -> None:
    """What was fitted, and what it does on the other images."""
    tried = done.tried
    auroc, low, high = tried["auroc"]
    print_facts(
        output_console(120),
        {
            "Fitted": done.calibrator.fitted_on,
            "Tried on": f" {tried['true']} true and {tried['invented']} invented phrases of "
            f"{tried['images']} other images",
            "AUROC": f"{auroc:.3f} ({low:.3f} to {high:.3f})",
            "Error": f"{tried['calibration_error']:.3f} (expected calibration error)",
            "Marks": f"{tried['invented_marked']:.1%} of the invented phrases and "
            f"{tried['true_marked']:.1%} of the true ones, below {done.calibrator.below:g}",
            "Preset": f"{done.file}  (captum-dcam explain --preset {done.file})",
        },
    )


def document(done: Grounded) -> dict[str, Any]:
    """What was fitted as plain data."""
    return {"preset": str(done.file), "calibrator": done.calibrator.record(), **done.tried}
