r"""Whether a word is grounded, fitted to a model: from results of the suite ``inventions``."""

from __future__ import annotations

from pathlib import Path

from captum_dcam.errors import CalibrationError
from captum_dcam.evaluation.spans import Spans, read_spans
from captum_dcam.evaluation.tables import Results
from captum_dcam.evaluation.tables.inventions import measured, parts_of
from captum_dcam.metrics import Calibrator, Ranking, expected_calibration_error

#: fewer phrases of a kind than these fit nothing
LEAST = 10


def fit_calibrator(
    folder: str | Path, *, below: float = 0.5
) -> tuple[Calibrator, dict[str, object]]:
    r"""Fit a calibrator on half of the images, and try it on the others.

    Args:
        folder (path): what ``captum-dcam evaluate --suite inventions`` wrote.
        below (float, optional): words less probable than this are marked. Default: 0.5

    Returns:
        tuple: the calibrator, and what it does on the images that it was not fitted on: ``images``,
        ``true``, ``invented`` (phrases), ``auroc`` (with its interval), ``calibration_error``, and
        the shares of true and of invented phrases that it marks.

    Raises:
        StoreError: no results there.
        CalibrationError: fewer than :data:`LEAST` true or invented phrases in a half.
        MissingPackageError: without scikit-learn.
    """
    frames = parts_of(Results(Path(folder)))
    spans = read_spans(frames)
    fit, held = spans.fitting, ~spans.fitting
    for half, name in ((fit, "to fit on"), (held, "to try on")):
        true = int(spans.true[half].sum())
        if min(true, int(half.sum()) - true) < LEAST:
            raise CalibrationError(
                f"{folder} has {true} true and {int(half.sum()) - true} invented phrases {name}: "
                f"expected at least {LEAST} of each; measure more images"
            )
    facts = frames[0].header["facts"]
    model, data = frames[0].header["plan"]["model"], _data(frames)
    true = int(spans.true[fit].sum())
    told = (
        f"{model}, fitted on {true} true and {int(fit.sum()) - true} invented phrases of {data}, "
        f"half of {len(spans.images.unique())} images"
    )
    found = Calibrator.fit(
        spans.features[fit],
        spans.true[fit],
        fitted_on=told,
        below=below,
        tags=tuple(sorted(spans.tags)),
        model=facts["weights"],
    )
    return found, _tried(found, spans)


def _data(frames: list) -> str:
    """What the phrases are of."""
    names = dict.fromkeys(str(f.header["plan"]["dataset"]["name"]) for f in frames)
    damages = dict.fromkeys(str(f.header["plan"]["dataset"].get("damage", "")) for f in frames)
    more = ", ".join(filter(None, damages))
    return ", ".join(names) + (f" ({more})" if more else "")


def _tried(found: Calibrator, spans: Spans) -> dict[str, object]:
    """What it does on the other images."""
    held = ~spans.fitting
    probability, true = found.probability(spans.features), spans.true[held]
    order = measured(spans, probability, held)
    assert isinstance(order, Ranking)  # there are enough of each kind
    marked = (probability[held] < found.below).double()
    return {
        "images": len(spans.images[held].unique()),
        "true": int(true.sum()),
        "invented": int((~true).sum()),
        "auroc": [float(value) for value in order.auroc],
        "calibration_error": expected_calibration_error(probability[held], true),
        "true_marked": float(marked[true].mean()),
        "invented_marked": float(marked[~true].mean()),
    }
