r"""Thresholds of the refinements, fitted to a model.

    >>> from captum_dcam.presets import preset
    >>> stages = tuple(preset("default").refinements())
    >>> values_of(stages)["cba.gamma"]
    0.5
    >>> with_values(stages, {"cba.gamma": 0.25})[3]
    CBA(weights=(0.15, 0.15, 0.2, 0.015), gamma=0.25)

``fit_labelled(collect(adapter, data, ids, preset("default")), stages)`` finds the values with the
highest F3; ``compare(collect(adapter, data, other_ids, …), found.start, found.fitted)`` says what
they gain on other images.

- maps of words with masks, computed once: :func:`collect`, :class:`Collection`
- the search: :func:`fit_labelled`, :func:`coordinate_descent`, :func:`cut`, :data:`PARAMETERS`
- on other images: :func:`compare`, :class:`Gain`

:mod:`captum_dcam.presets` writes what was fitted into a file that every ``preset=`` accepts.
"""

from captum_dcam.calibration.fit import (
    Calibration,
    Gain,
    compare,
    coordinate_descent,
    cut,
    fit_labelled,
)
from captum_dcam.calibration.maps import Chain, Collection, collect
from captum_dcam.calibration.parameters import PARAMETERS, SHARES, values_of, with_values
from captum_dcam.errors import CalibrationError

__all__ = [
    "PARAMETERS",
    "SHARES",
    "Calibration",
    "CalibrationError",
    "Chain",
    "Collection",
    "Gain",
    "collect",
    "compare",
    "coordinate_descent",
    "cut",
    "fit_labelled",
    "values_of",
    "with_values",
]
