r"""Every method on the same forward: ours, Captum's, pytorch-grad-cam's and the papers' rivals."""

from captum_dcam.methods.base import (
    METHODS,
    Attribution,
    Facts,
    Method,
    PerToken,
    Problem,
    method,
    method_names,
    register_method,
)
from captum_dcam.methods.meter import Budget, Cost, metered
from captum_dcam.model.forward import single
from captum_dcam.registry import import_modules

__all__ = [
    "METHODS",
    "Attribution",
    "Budget",
    "Cost",
    "Facts",
    "Method",
    "PerToken",
    "Problem",
    "metered",
    "method",
    "method_names",
    "register_method",
    "single",
]

import_modules(__name__, __path__)
