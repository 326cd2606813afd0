r"""Side by side: methods on one model (:func:`compare`), one answer in several models
(:func:`compare_models`)."""

from captum_dcam.comparing.methods import (
    QUICK,
    MasksLike,
    MethodLike,
    MethodRun,
    chosen_methods,
    compare,
    compare_generation,
    generator_of,
    run_method,
)
from captum_dcam.comparing.models import compare_models

__all__ = [
    "QUICK",
    "MasksLike",
    "MethodLike",
    "MethodRun",
    "chosen_methods",
    "compare",
    "compare_generation",
    "compare_models",
    "generator_of",
    "run_method",
]
