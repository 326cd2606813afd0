r"""Refinements and the block, fitted to a model: with masks or without.

    >>> from captum_dcam.presets import preset
    >>> stages = tuple(preset("default").refinements())
    >>> values_of(stages)
    {'affinity.power': 6.0, 'affinity.square': 2.0, 'affinity.center': True}
    >>> with_values(stages, {"affinity.power": 4.0})
    (Affinity(power=4.0, square=2.0, center=True),)

``fit_stages(collect(adapter, data, ids, preset("default")), stages)`` finds the values with the
highest F3, and of :func:`collect_answers` those with the highest insertion;
``compare((others, found.start), (others, found.fitted))`` says what they gain on other images.

- maps of words, computed once: :func:`collect` with masks, :func:`collect_answers` without;
  :class:`Collection`
- the search: :func:`fit_stages`, :func:`fit_blocks`, :func:`coordinate_descent`, :func:`cut`,
  :data:`PARAMETERS`
- on other images: :func:`compare`, :class:`Gain`
- how well a map localises, told by masks: :func:`fit_reliability`
- whether a word is grounded, told by results of the suite ``inventions``: :func:`fit_calibrator`

:mod:`captum_dcam.presets` writes what was fitted into a file that every ``preset=`` accepts.
"""

from captum_dcam.calibration.calibrator import fit_calibrator
from captum_dcam.calibration.fit import (
    Calibration,
    Gain,
    compare,
    coordinate_descent,
    cut,
    fit_blocks,
    fit_stages,
)
from captum_dcam.calibration.insertion import WORDS, Answered, collect_answers
from captum_dcam.calibration.maps import Batch, Chain, Collection, Masked, collect
from captum_dcam.calibration.parameters import PARAMETERS, SHARES, values_of, with_values
from captum_dcam.calibration.reliability import fit_reliability
from captum_dcam.errors import CalibrationError

__all__ = [
    "PARAMETERS",
    "SHARES",
    "WORDS",
    "Answered",
    "Batch",
    "Calibration",
    "CalibrationError",
    "Chain",
    "Collection",
    "Gain",
    "Masked",
    "collect",
    "collect_answers",
    "compare",
    "coordinate_descent",
    "cut",
    "fit_blocks",
    "fit_calibrator",
    "fit_reliability",
    "fit_stages",
    "values_of",
    "with_values",
]
