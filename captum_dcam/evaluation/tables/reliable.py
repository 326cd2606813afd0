r"""Does a map say that it localises nothing? Fitted on some images, tried on others."""

from __future__ import annotations

import torch
from torch import Tensor

from captum_dcam.evaluation.floors import FLOORS
from captum_dcam.evaluation.frame import Frame
from captum_dcam.evaluation.table import Cell, Figure
from captum_dcam.evaluation.tables.engine import (
    TableRow,
    TableSpec,
    listed,
    register_cells,
    register_notes,
    register_rows,
)
from captum_dcam.metrics import Reliability, auroc, expected_calibration_error

#: words with an object in the image, and words that no pixel shows
KINDS = ("object", "function")
#: every fifth image is for fitting, the others are for trying
FIT_EVERY = 5


def word_features(frame: Frame, variant: str) -> tuple[Tensor, Tensor, Tensor]:
    """Features (M, 6), labels (M,) bool, images (M,) of object and function words."""
    found = frame.values(variant, "features", KINDS)
    labels = torch.tensor([kind == KINDS[0] for kind in frame.kinds(found)], dtype=torch.bool)
    return found.scores, labels, found.images


@register_cells("flag")
def flag(row: TableRow) -> list[Cell]:
    """AUROC of the fitted score and of plain entropy, calibration error, and what a flag finds."""
    features, labels, images = word_features(row.frame, row.variant)
    fit = images % FIT_EVERY == 0
    if any(len(part.unique()) < 2 for part in (labels[fit], labels[~fit])):
        return [None] * 5
    score = Reliability.fit(features[fit], labels[fit], fitted_on=row.variant)
    tried, truth = score.probability(features[~fit]), labels[~fit]
    flagged = (tried < 0.5).double()
    return [
        Figure(auroc(tried, truth)),
        Figure(auroc(-features[~fit, 0], truth)),
        Figure(expected_calibration_error(tried, truth)),
        Figure(100 * float(flagged[~truth].mean())),
        Figure(100 * float(flagged[truth].mean())),
    ]


@register_rows("without_floors")
def without_floors(spec: TableSpec, frames: list[Frame]) -> list[TableRow]:
    """Every variant that looks at the model."""
    return [row for row in listed(spec, frames) if row.variant not in FLOORS]


@register_notes("flag_words")
def flag_words(spec: TableSpec, frames: list[Frame], rows: list[TableRow]) -> list[str]:
    """How many words there are, and what is fitted on which."""
    objects = word_features(frames[0], rows[0].variant)[1]
    return [
        f"{int(objects.sum())} object words, {int((~objects).sum())} function words. Fitted on "
        f"every {FIT_EVERY}th image, tried on the others. Flagged: probability of localising an "
        "object below 0.5."
    ]
