r"""Refinements: post-transforms of attribution maps (..., H, W), whatever method made them.

The paper's four modules (AKD, DACG, CBA, SICD), min-max normalisation, plain filters, and affinity
propagation along the model's own states, each as a pure function and as a small frozen object that
composes, is found by name and writes itself down. All run on any device, in fp16, bf16, fp32 and
fp64, on whole batches, without gradients and without randomness; they never change their input.

    >>> from captum_dcam.refine import RefineContext
    >>> refine = paper_refinements()
    >>> maps = torch.rand(2, 24, 24, generator=torch.Generator().manual_seed(0))
    >>> refine(maps, RefineContext(steps=32, image_size=(480, 640))).shape
    torch.Size([2, 24, 24])
    >>> [stage["name"] for stage in refine.describe()["stages"]]
    ['min_max', 'akd', 'dacg', 'cba', 'min_max', 'sicd']
"""

from captum_dcam.refine.affinity import Affinity, affinity_propagation
from captum_dcam.refine.akd import AKD, adaptive_kernel_denoising, adaptive_kernel_size
from captum_dcam.refine.base import (
    NamedRefinement,
    RefineContext,
    Refinement,
    needs_of,
    over_grids,
    refinement,
    register_refinement,
    registered_refinements,
)
from captum_dcam.refine.cba import CBA, CBA_WEIGHTS, contextual_background_attenuation
from captum_dcam.refine.compose import Compose, paper_refinements
from captum_dcam.refine.dacg import (
    DACG,
    DACG_BRANCHES,
    DACG_PERCENTILES,
    dacg_branch,
    distribution_aware_confidence_gating,
)
from captum_dcam.refine.filters import (
    AdaptiveMedian,
    Gaussian,
    Median,
    RankGaussian,
    adaptive_median_filter,
    gaussian_filter,
    median_filter,
    rank_gaussian_filter,
)
from captum_dcam.refine.normalise import MinMax, min_max
from captum_dcam.refine.sicd import SICD, sicd_gate, single_instance_causal_debiasing
from captum_dcam.registry import import_modules

__all__ = [
    "AKD",
    "CBA",
    "CBA_WEIGHTS",
    "DACG",
    "DACG_BRANCHES",
    "DACG_PERCENTILES",
    "SICD",
    "AdaptiveMedian",
    "Affinity",
    "Compose",
    "Gaussian",
    "Median",
    "MinMax",
    "NamedRefinement",
    "RankGaussian",
    "RefineContext",
    "Refinement",
    "adaptive_kernel_denoising",
    "adaptive_kernel_size",
    "adaptive_median_filter",
    "affinity_propagation",
    "contextual_background_attenuation",
    "dacg_branch",
    "distribution_aware_confidence_gating",
    "gaussian_filter",
    "median_filter",
    "min_max",
    "needs_of",
    "over_grids",
    "paper_refinements",
    "rank_gaussian_filter",
    "refinement",
    "register_refinement",
    "registered_refinements",
    "sicd_gate",
    "single_instance_causal_debiasing",
]

import_modules(__name__, __path__)
