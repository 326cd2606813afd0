r"""Does a map say that it localises nothing? Fitted on some images, tried on others."""

from __future__ import annotations

import torch
from torch import Tensor

from captum_dcam.evaluation.frame import Frame
from captum_dcam.evaluation.table import Cell, Column, Figure, Table
from captum_dcam.evaluation.tables.registry import Results, register_table, settings_note
from captum_dcam.metrics import Reliability, auroc, expected_calibration_error

#: words with an object in the picture, and words that no pixel shows
KINDS = ("object", "function")
#: every fifth image is for fitting, the others are for trying
FIT_EVERY = 5


def word_features(frame: Frame, variant: str) -> tuple[Tensor, Tensor, Tensor]:
    """Features (M, 6), labels (M,) bool, images (M,) of object and function words."""
    found = frame.values(variant, "features", KINDS)
    labels = torch.tensor([kind == KINDS[0] for kind in frame.kinds(found)], dtype=torch.bool)
    return found.scores, labels, found.images


def _tried(frame: Frame, variant: str) -> list[Cell]:
    """AUROC of the fitted score and of plain entropy, calibration error, and what a flag finds."""
    features, labels, images = word_features(frame, variant)
    fit = images % FIT_EVERY == 0
    for part in (labels[fit], labels[~fit]):
        if not len(part) or bool(part.all()) or not bool(part.any()):
            return [None] * 5
    score = Reliability.fit(features[fit], labels[fit], fitted_on=variant)
    tried, truth = score.probability(features[~fit]), labels[~fit]
    flagged = tried < 0.5
    return [
        Figure(auroc(tried, truth)),
        Figure(auroc(-features[~fit, 0], truth)),
        Figure(expected_calibration_error(tried, truth)),
        Figure(100 * float(flagged[~truth].double().mean())),
        Figure(100 * float(flagged[truth].double().mean())),
    ]


@register_table("reliability")
def reliability(results: Results) -> Table:
    """The flag of every method: from the map's shape alone, without masks or the model."""
    frame = results.part("plausibility")
    names = [v for v in frame.variants if v not in ("oracle", "random", "center_blob")]
    rows = tuple((name, tuple(_tried(frame, name))) for name in names)
    counts = word_features(frame, names[0])[1]
    columns = (
        Column("AUROC", 3, "up"),
        Column("AUROC, entropy alone", 3, "up"),
        Column("calibration error", 3, "down"),
        Column("function words flagged %", better="up"),
        Column("object words flagged %", better="down"),
    )
    notes = (
        f"{int(counts.sum())} object words, {int((~counts).sum())} function words. Fitted on every "
        f"{FIT_EVERY}th image, tried on the others. Flagged: probability of localising an object "
        "below 0.5.",
        settings_note(frame),
    )
    return Table(
        "reliability",
        "Which maps localise nothing, by their shape",
        columns,
        rows,
        notes,
        "maps of",
    )
