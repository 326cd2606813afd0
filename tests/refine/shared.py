"""Maps of many kinds, and every refinement in one dictionary."""

from dataclasses import replace

import numpy as np
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from captum_dcam import refine as R

CONTEXT = R.RefineContext(steps=40, image_size=(600, 800))


def context_of(maps):
    """A request's context with features on the maps' grid that mirrors and transposes leave as they
    are, so that a map and its mirror image have the same kernel."""
    shape = tuple(getattr(maps, "shape", ()))[-2:]
    height, width = shape if len(shape) == 2 and 0 not in shape else (1, 1)
    rows, columns = (2 * torch.arange(n, dtype=torch.float64) - n + 1 for n in (height, width))
    y, x = rows.abs()[:, None].expand(height, width), columns.abs().expand(height, width)
    features = torch.stack([(x + y).cos(), (x * y).sin(), (x + y) / 20, ((x - y) / 3).cos()])
    return replace(CONTEXT, features=features)


DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)

# Functions on maps alone; AKD gets a request that can reach every window from 3 to 11.
FUNCTIONS = {
    "min_max": R.min_max,
    "rank_gaussian": R.rank_gaussian_filter,
    "rank_gaussian_5": lambda maps: R.rank_gaussian_filter(maps, 5),
    "median": R.median_filter,
    "gaussian": R.gaussian_filter,
    "akd": lambda maps: R.adaptive_kernel_denoising(maps, steps=40, image_size=(600, 800)),
    "dacg": R.distribution_aware_confidence_gating,
    "cba": R.contextual_background_attenuation,
    "sicd": R.single_instance_causal_debiasing,
    "sicd_ungated": lambda maps: R.single_instance_causal_debiasing(
        maps, torch.full((1, 1), 0.3, device=getattr(maps, "device", None)), gate=False
    ),
    "sicd_excess": lambda maps: R.single_instance_causal_debiasing(
        maps, outlier_form="excess", omega_out=1.0, gate=False, revert_below=0.9
    ),
    "affinity": lambda maps: R.Affinity()(maps, context_of(maps)),
    "affinity_uncentred": lambda maps: R.Affinity(6, 2.5, False)(maps, context_of(maps)),
    "paper": lambda maps: R.paper_refinements()(maps, CONTEXT),
}

few = settings(max_examples=10)


def shapes():
    return hnp.array_shapes(min_dims=2, max_dims=4, min_side=1, max_side=7)


def arrays(top=1.0):
    """Non-negative fp64 arrays (..., H, W), many of them with zeros and ties."""
    values = st.one_of(st.just(0.0), st.just(top), st.floats(0, top), st.floats(0, top / 1e3))
    return hnp.arrays(np.float64, shapes(), elements=values)


def random_maps(seed, *shape):
    """Peaked maps as CAMs are: a blob on noise, a part of it cut to zero."""
    g = np.random.default_rng(seed)
    height, width = shape[-2:]
    lead = shape[:-2]
    row = g.uniform(0, height, (*lead, 1, 1))
    column = g.uniform(0, width, (*lead, 1, 1))
    y, x = np.mgrid[:height, :width]
    spread = g.uniform(1, 8, (*lead, 1, 1))
    blob = np.exp(-((y - row) ** 2 + (x - column) ** 2) / (2 * spread**2))
    noise = g.uniform(0, 1, shape) ** g.uniform(0.3, 6, (*lead, 1, 1))
    mixed = blob + g.uniform(0, 1.5, (*lead, 1, 1)) * noise - g.uniform(0, 0.2, (*lead, 1, 1))
    return np.maximum(mixed, 0)


def each(maps, function):
    """Apply a loop version to every map of a batch (N, H, W)."""
    return np.stack([function(image) for image in maps])


def close(result, expected, rtol=1e-9, atol=1e-11):
    np.testing.assert_allclose(np.asarray(result), expected, rtol=rtol, atol=atol)
