"""Otsu's threshold against scikit-image and against the definition, written out."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from skimage.filters import threshold_otsu

from captum_dcam.metrics import OTSU_BINS, binarize_otsu, gini_index, otsu_threshold
from captum_dcam.refine import min_max, rank_gaussian_filter

FLOATS = st.floats(0, 1e6, width=32, allow_subnormal=False)
SHAPES = hnp.array_shapes(min_dims=2, max_dims=4, min_side=1, max_side=7)


def between_class_variance(values: np.ndarray, threshold: float) -> float:
    """The quantity Otsu maximises, from its definition, on the histogram's bin centres."""
    counts, edges = np.histogram(values, bins=OTSU_BINS)
    centres = (edges[:-1] + edges[1:]) / 2
    low = centres <= threshold + 1e-9 * (edges[-1] - edges[0])
    n1, n2 = counts[low].sum(), counts[~low].sum()
    if n1 == 0 or n2 == 0:
        return 0.0
    m1 = np.average(centres[low], weights=counts[low])
    m2 = np.average(centres[~low], weights=counts[~low])
    return float(n1 * n2 * (m1 - m2) ** 2)


def maps_of_many_kinds(seed: int) -> torch.Tensor:
    rng = np.random.default_rng(seed)
    kinds = [
        rng.random((31, 45)),
        rng.random((31, 45)) ** 8,
        rng.gamma(0.3, size=(31, 45)),
        np.where(rng.random((31, 45)) > 0.9, 5.0, 1.0) + 0.1 * rng.random((31, 45)),
        np.maximum(rng.normal(size=(31, 45)), 0),
        np.outer(np.hanning(31), np.hanning(45)),
        rng.integers(0, 4, (31, 45)).astype(float),
    ]
    return torch.from_numpy(np.stack(kinds))


@pytest.mark.parametrize("seed", range(5))
def test_equals_skimage_to_one_bin(seed):
    maps = maps_of_many_kinds(seed)
    ours = otsu_threshold(maps)
    for values, threshold in zip(maps.numpy(), ours.tolist(), strict=True):
        one_bin = np.ptp(values) / OTSU_BINS
        assert abs(threshold - threshold_otsu(values)) <= one_bin * (1 + 1e-9)


@settings(max_examples=60)
@given(hnp.arrays(np.float64, st.tuples(st.integers(1, 9), st.integers(1, 9)), elements=FLOATS))
def test_is_as_good_as_skimage_on_anything(values):
    if np.ptp(values) <= 1e-6 * values.max():
        return  # numpy cannot bin a range of a few ulps
    ours, theirs = float(otsu_threshold(torch.from_numpy(values))), float(threshold_otsu(values))
    if abs(ours - theirs) > np.ptp(values) / OTSU_BINS * (1 + 1e-9):
        # An exact tie (a symmetric map): both splits are the best one.
        best = between_class_variance(values, theirs)
        assert between_class_variance(values, ours) == pytest.approx(best, rel=1e-6)


@settings(max_examples=60)
@given(hnp.arrays(np.float32, SHAPES, elements=FLOATS))
def test_batch_equals_single(array):
    maps = torch.from_numpy(array)
    flat = maps.reshape(-1, *maps.shape[-2:])
    singles = torch.stack([otsu_threshold(one) for one in flat])
    regions = torch.stack([binarize_otsu(one) for one in flat])
    assert torch.equal(otsu_threshold(maps), singles.reshape(maps.shape[:-2]))
    assert torch.equal(binarize_otsu(maps), regions.reshape(maps.shape))


@settings(max_examples=60)
@given(hnp.arrays(np.float32, SHAPES, elements=FLOATS))
def test_a_region_is_never_empty_or_full_unless_constant(array):
    maps = torch.from_numpy(array)
    region = binarize_otsu(maps).flatten(-2)
    varied = maps.amax((-2, -1)) > maps.amin((-2, -1))
    assert torch.equal(region.any(-1), varied)
    assert not region.all(-1).any()


@pytest.mark.parametrize("value", [0.0, 1e-40, 0.3, 1e38])
@pytest.mark.parametrize("shape", [(1, 1), (4, 3), (2, 1, 5)])
def test_constant_map_is_its_own_threshold_with_an_empty_region(value, shape):
    maps = torch.full(shape, value)
    assert torch.equal(otsu_threshold(maps), maps[..., 0, 0])
    assert not binarize_otsu(maps).any()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_dtypes(dtype):
    maps = torch.tensor([[0.0, 0.125], [0.75, 1.0]], dtype=dtype)
    threshold = otsu_threshold(maps)
    assert threshold.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert binarize_otsu(maps).tolist() == [[False, False], [True, True]]


@pytest.mark.parametrize("scale", [1e-300, 1e-30, 1.0, 1e300])
def test_scale_does_not_matter(scale):
    maps = maps_of_many_kinds(0)
    assert torch.equal(binarize_otsu(maps / maps.max() * scale), binarize_otsu(maps / maps.max()))


def test_a_range_of_one_ulp_still_splits():
    low = np.float32(1.0)
    maps = torch.from_numpy(np.array([[low, np.nextafter(low, np.float32(2))]]))
    assert binarize_otsu(maps).tolist() == [[False, True]]


def test_no_maps_give_no_thresholds():
    assert otsu_threshold(torch.zeros(0, 3, 3)).shape == (0,)


def test_leaves_no_graph():
    assert not otsu_threshold(torch.rand(3, 3, requires_grad=True)).requires_grad


@pytest.mark.parametrize(
    ("maps", "says"),
    [
        (torch.tensor([[-0.25, 1.0]]), r"negative values down to -0.25.*relu"),
        (torch.tensor([[float("nan"), 1.0]]), "holds 1 NaN or infinite values"),
        (torch.tensor([[float("inf"), 1.0]]), "NaN or infinite"),
        (torch.ones(4), r"shape \(4,\).*view\(H, W\)"),
        (torch.ones(2, 0, 3), r"expected H >= 1 and W >= 1"),
    ],
)
def test_errors_teach(maps, says):
    with pytest.raises(ValueError, match=f"^otsu_threshold: `maps` .*{says}"):
        otsu_threshold(maps)
    with pytest.raises(ValueError, match=f"^binarize_otsu: `maps` .*{says}"):
        binarize_otsu(maps)


def test_integer_maps_are_a_type_error_as_in_refinements():
    maps = torch.ones(2, 2, dtype=torch.int64)
    for function in (otsu_threshold, binarize_otsu, gini_index, min_max, rank_gaussian_filter):
        with pytest.raises(TypeError, match=r"`maps` has dtype torch\.int64.*maps\.float\(\)"):
            function(maps)


def test_an_array_is_a_type_error():
    with pytest.raises(TypeError, match="ndarray"):
        otsu_threshold(np.ones((2, 2)))
