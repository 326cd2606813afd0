r"""Thresholds of the refinements, fitted to a model.

    maps = collect(adapter, data, data.ids[:40], preset("default"), labelled=True)
    found = fit_labelled(maps, tuple(preset("default").refinements()))
    other = collect(adapter, data, data.ids[40:], preset("default"), labelled=True)
    gain, routing = compare(other, found.start, found.fitted)

- maps of many images, computed once: :func:`collect`, :class:`Collection`
- from maps alone: :func:`fit_unlabelled`, :func:`fit_routing`, :func:`cut`
- from maps with masks: :func:`fit_labelled`, :func:`coordinate_descent`, :data:`PARAMETERS`
- on other images: :func:`compare`, :class:`Gain`

:mod:`captum_dcam.presets` writes what was fitted into a file that every ``preset=`` accepts.
"""

from captum_dcam.calibration.chain import Chain
from captum_dcam.calibration.fit import (
    Calibration,
    Gain,
    compare,
    fit_labelled,
    fit_unlabelled,
)
from captum_dcam.calibration.maps import Collection, collect
from captum_dcam.calibration.parameters import PARAMETERS, SHARES, values_of, with_values
from captum_dcam.calibration.routing import cut, fit_routing, paper_routing
from captum_dcam.calibration.search import coordinate_descent
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
    "fit_routing",
    "fit_unlabelled",
    "paper_routing",
    "values_of",
    "with_values",
]
