r"""Is a word grounded in the picture? A probability from what the steps of a generation say of it.

Fitted to one model, on texts whose words are known to be true or invented. Without a fit there is
no such probability: the scores of words alone have another scale in every model.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from captum_dcam.errors import InputError
from captum_dcam.metrics.logistic import Logistic

#: what it reads of a word, in the order of :attr:`captum_dcam.results.scores.WordScores.features`
SCORE_FEATURES = ("log_odds", "margin", "entropy", "mean_entropy", "flips")


@dataclass(frozen=True)
class Calibrator(Logistic):
    r"""Logistic regression on :data:`SCORE_FEATURES`: the probability that a word is grounded.

    Args:
        weights, bias, mean, std, fitted_on, features: as in
            :class:`~captum_dcam.metrics.logistic.Logistic`; ``fitted_on`` names it to the reader.
        below (float): a word less probable than this is marked as probably not grounded; in (0, 1).
            Default: 0.5
        tags (tuple of str): part-of-speech tags of the words that it was fitted on; others have no
            such probability. Default: nouns and adjectives
        model (str): fingerprint of the weights that it was fitted to, see
            :func:`captum_dcam.model.weights.fingerprint`; other weights are not judged.
            Default: empty, for any
    """

    features: tuple[str, ...] = SCORE_FEATURES
    below: float = 0.5
    tags: tuple[str, ...] = ("JJ", "NN", "NNS")
    model: str = ""

    format: ClassVar[str] = "captum_dcam.calibrator/1"
    made_by: ClassVar[str] = "word_scores(…).features"

    def __post_init__(self) -> None:
        super().__post_init__()
        if type(self.below) is not float or not 0 < self.below < 1:
            raise InputError(f"below is {self.below!r}: expected a probability between 0 and 1")
        if not self.tags or not all(isinstance(tag, str) for tag in self.tags):
            raise InputError(f"tags are {self.tags!r}: expected tags of words, such as 'NN'")
        if not isinstance(self.model, str):
            raise InputError(f"model is {self.model!r}: expected a fingerprint of weights")

    @classmethod
    def check_features(cls, names: Sequence[str]) -> None:
        if tuple(names) != SCORE_FEATURES:
            raise InputError(
                f"features are {tuple(names)}: expected {SCORE_FEATURES}; fit it again with this "
                "version"
            )
