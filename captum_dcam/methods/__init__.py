r"""Every method on the same forward: ours, Captum's, pytorch-grad-cam's and the papers' rivals."""

from captum_dcam.methods.base import (
    METHODS,
    Attribution,
    AttributionTask,
    Method,
    MethodFacts,
    PerToken,
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
    "AttributionTask",
    "Budget",
    "Cost",
    "Method",
    "MethodFacts",
    "PerToken",
    "metered",
    "method",
    "method_names",
    "register_method",
    "single",
]

import_modules(__name__, __path__)
