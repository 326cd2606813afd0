"""Eq. 14-17 against loops over pixels, and their properties on arbitrary maps."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from skimage.filters import threshold_otsu

from captum_dcam.metrics import (
    binarize_otsu,
    concentration,
    f3_score,
    foreground_background_contrast,
    localization,
    obj_iou,
)

EPS = 1e-8
FIELDS = ("obj_iou", "contrast", "concentration", "f3")


def by_hand(values: np.ndarray, classes: np.ndarray) -> tuple[float, float, float, float]:
    """Eq. 14-17 pixel by pixel; values (H, W) with maximum 1, classes (C, H, W)."""
    threshold, best = threshold_otsu(values), 0.0
    inside, outside = [], []
    for mask in classes:
        both = either = 0
        for value, member in zip(values.flat, mask.flat, strict=True):
            both += bool(value > threshold and member)
            either += bool(value > threshold or member)
        best = max(best, both / either)
    for value, *members in zip(values.flat, *(mask.flat for mask in classes), strict=True):
        (inside if any(members) else outside).append(float(value))
    contrast = (sum(inside) / len(inside)) / (sum(outside) / len(outside) + EPS)
    share = sum(inside) / (sum(inside) + sum(outside) + EPS)
    terms = (best, min(contrast / 20, 1), share)
    f3 = 0.0 if min(terms) == 0 else 3 / sum(1 / term for term in terms)
    return best, contrast, share, f3


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("classes", [1, 3])
def test_equals_the_equations(seed, classes):
    rng = np.random.default_rng(seed)
    values = rng.random((5, 13, 17)) ** 3
    values /= values.max((1, 2), keepdims=True)
    masks = rng.random((5, classes, 13, 17)) > 0.8
    scores = localization(torch.from_numpy(values), torch.from_numpy(masks))
    for i in range(5):
        for name, expected in zip(FIELDS, by_hand(values[i], masks[i]), strict=True):
            assert float(getattr(scores, name)[i]) == pytest.approx(expected, rel=1e-9), name


def test_worked_example():
    values = torch.tensor([[1.0, 0.5], [0.0, 0.0]])
    mask = torch.tensor([[True, True], [False, True]])
    scores = localization(values, mask)
    assert float(scores.obj_iou) == pytest.approx(2 / 3)
    assert float(scores.contrast) == pytest.approx(0.5 / EPS)
    assert float(scores.concentration) == pytest.approx(1.0)
    assert float(scores.f3) == pytest.approx(3 / (1.5 + 1 + 1))


@st.composite
def maps_and_masks(draw):
    shape = draw(hnp.array_shapes(min_dims=2, max_dims=4, min_side=1, max_side=6))
    dtype, largest = draw(
        st.sampled_from([(np.float16, 6e4), (np.float32, 3e38), (np.float64, 1.7e308)])
    )
    scale = draw(st.sampled_from([0.0, 1e-3, 1.0, largest]))
    levels = draw(hnp.arrays(np.float64, shape, elements=st.sampled_from([0, 0.1, 0.5, 0.9, 1])))
    values = (levels * scale).astype(dtype)
    class_axis = draw(st.booleans())
    classes = (*shape[:-2], draw(st.integers(1, 3)), *shape[-2:]) if class_axis else shape
    masks = draw(hnp.arrays(np.bool_, classes, fill=st.nothing()))
    return torch.from_numpy(values), torch.from_numpy(masks)


@settings(max_examples=40)
@given(maps_and_masks())
def test_finite_in_range_and_the_same_alone(pair):
    maps, masks = pair
    scores = localization(maps, masks)
    leading = maps.shape[:-2]
    flat = maps.reshape(-1, *maps.shape[-2:])
    each = masks.reshape(len(flat), *masks.shape[len(leading) :])
    alone = [localization(one, mask) for one, mask in zip(flat, each, strict=True)]
    for name in FIELDS:
        score = getattr(scores, name)
        assert score.shape == leading and torch.isfinite(score).all() and (score >= 0).all()
        assert name == "contrast" or (score <= 1).all()
        singles = torch.stack([getattr(one, name) for one in alone]).reshape(leading)
        torch.testing.assert_close(score, singles, rtol=1e-6, atol=0)
    assert torch.equal(scores.obj_iou, obj_iou(maps, masks))
    assert torch.equal(scores.contrast, foreground_background_contrast(maps, masks))
    assert torch.equal(scores.concentration, concentration(maps, masks))


@pytest.mark.parametrize("scale", [1e-30, 1e-3, 7.0, 1e30])
def test_scale_does_not_matter(scale):
    generator = torch.Generator().manual_seed(0)
    maps = torch.rand(3, 8, 8, generator=generator)
    masks = torch.rand(3, 8, 8, generator=generator) > 0.6
    plain, scaled = localization(maps, masks), localization(maps * scale, masks)
    for name in FIELDS:
        torch.testing.assert_close(getattr(scaled, name), getattr(plain, name), rtol=1e-5, atol=0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_dtypes_are_summed_exactly(dtype):
    """100,000 pixels of 1/8 overflow half precision and round in bfloat16; here they do neither."""
    maps = torch.full((400, 250), 0.125, dtype=dtype)
    mask = torch.zeros(400, 250, dtype=torch.bool)
    mask[:100] = True
    scores = localization(maps, mask)
    assert float(scores.concentration) == pytest.approx(0.25, rel=1e-6)
    assert float(scores.contrast) == pytest.approx(1, rel=1e-6)
    assert scores.f3.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)


def test_perfect_map_scores_one():
    mask = torch.zeros(6, 6, dtype=torch.bool)
    mask[2:4, 1:5] = True
    scores = localization(mask.float(), mask)
    assert [float(getattr(scores, name)) for name in FIELDS if name != "contrast"] == [1.0] * 3
    assert float(scores.contrast) == pytest.approx(1 / EPS)


def all_of(maps: torch.Tensor, mask: torch.Tensor) -> list[float]:
    return [round(float(getattr(localization(maps, mask), name)), 5) for name in FIELDS]


def test_degenerate_masks_and_maps():
    bumpy = torch.tensor([[0.2, 0.4], [0.6, 1.0]])
    none, every = torch.zeros(2, 2, dtype=torch.bool), torch.ones(2, 2, dtype=torch.bool)
    some = torch.tensor([[True, False], [False, False]])
    assert all_of(bumpy, none) == [0, 0, 0, 0]
    assert all_of(torch.zeros(2, 2), every) == [0, 0, 0, 0]
    assert all_of(torch.zeros(2, 2), some) == [0, 0, 0, 0]
    region = float(binarize_otsu(bumpy).float().mean())  # IoU with everything
    assert all_of(bumpy, every)[:3] == [region, 1, 1]
    assert all_of(torch.ones(2, 2), every) == [0, 1, 1, 0]  # nothing lies above a constant
    assert all_of(torch.ones(2, 2), some)[1:] == [1, 0.25, 0]
    assert all_of(torch.ones(1, 1), torch.ones(1, 1, dtype=torch.bool)) == [0, 1, 1, 0]


def test_best_class_and_union():
    maps = torch.tensor([[1.0, 1.0, 0.0, 0.0]])
    classes = torch.tensor([[[True, True, False, False]], [[False, False, True, False]]])
    padded = torch.cat([classes, torch.zeros(1, 1, 4, dtype=torch.bool)])
    assert float(obj_iou(maps, classes)) == 1
    assert float(obj_iou(maps, padded)) == 1
    assert float(obj_iou(maps, classes[1])) == 0
    union = classes.any(0)
    assert torch.equal(concentration(maps, classes), concentration(maps, union))
    ratio = foreground_background_contrast(maps, classes)
    assert torch.equal(ratio, foreground_background_contrast(maps, union))


def test_eps_is_relative_to_the_maximum():
    maps, mask = torch.tensor([[10.0, 5.0]]), torch.tensor([[True, False]])
    ratio = foreground_background_contrast(maps, mask, eps=0.5)
    assert float(ratio) == pytest.approx(1 / (0.5 + 0.5))
    assert float(concentration(maps, mask, eps=0.5)) == pytest.approx(1 / (1.5 + 0.5))
    for eps in (0, -1, 2, math.nan):
        with pytest.raises(ValueError, match="eps is"):
            localization(maps, mask, eps=eps)


def test_f3_broadcasts_caps_and_vanishes():
    f3 = f3_score(torch.tensor([0.5, 0.0, 1.0]), torch.tensor([[20.0], [1e9]]), 1.0)
    assert f3.shape == (2, 3) and f3.dtype == torch.float32
    torch.testing.assert_close(f3, torch.tensor([[0.75, 0.0, 1.0]]).expand(2, 3))
    assert float(f3_score(0.3, 0.0, 0.3)) == 0
    assert float(f3_score(1e-320, 1.0, 1e-320)) == 0
    assert f3_score(0.3, 1.0, 0.3).dtype == torch.float64


@pytest.mark.parametrize(
    ("scores", "says"),
    [
        ((30.1, 2.58, 0.5), r"obj_iou.*30\.1.*divide per cent by 100"),
        ((0.3, -1.0, 0.5), r"contrast.*-1\.0.*ratio"),
        ((0.3, math.inf, 0.5), "contrast.*inf"),
        ((0.3, 1.0, torch.tensor([0.5, math.nan])), r"concentration of shape \(2,\) holds nan"),
    ],
)
def test_f3_errors_teach(scores, says):
    with pytest.raises(ValueError, match=says):
        f3_score(*scores)


@pytest.mark.parametrize(
    ("masks", "says"),
    [
        (torch.ones(2, 4, 4), r"torch\.float32: expected torch\.bool"),
        (torch.ones(2, 8, 6, dtype=torch.bool), r"interpolate.*size=\(8, 6\)"),
        (torch.ones(4, dtype=torch.bool), "interpolate"),
        (torch.ones(4, 4, dtype=torch.bool), r"masks\.expand"),
        (
            torch.ones(3, 4, 4, dtype=torch.bool),
            r"\(2, 4, 4\), one mask per map, or \(2, C",
        ),
        (torch.ones(3, 5, 4, 4, dtype=torch.bool), r"one mask per map"),
        (torch.ones(2, 0, 4, 4, dtype=torch.bool), "at least one class"),
    ],
)
@pytest.mark.parametrize(
    "metric", [obj_iou, foreground_background_contrast, concentration, localization]
)
def test_mask_errors_teach(metric, masks, says):
    with pytest.raises(ValueError, match=says):
        metric(torch.ones(2, 4, 4), masks)


def test_the_call_that_the_error_suggests_works():
    maps = torch.rand(2, 3, 4, 4)
    size = (8, 6)
    resized = torch.nn.functional.interpolate(
        maps.reshape(-1, 1, *maps.shape[-2:]), size=size, mode="bilinear"
    ).reshape(*maps.shape[:-2], *size)
    assert localization(resized, torch.rand(2, 3, *size) > 0.5).f3.shape == (2, 3)


@pytest.mark.parametrize(
    "metric", [obj_iou, foreground_background_contrast, concentration, localization]
)
def test_map_errors_teach(metric):
    with pytest.raises(ValueError, match=r"negative values down to -1.*relu"):
        metric(torch.tensor([[-1.0, 1.0]]), torch.tensor([[True, False]]))
    with pytest.raises(TypeError, match="as_tensor"):
        metric(torch.ones(1, 2), np.ones((1, 2), dtype=bool))
