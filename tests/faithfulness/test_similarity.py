"""Rank correlation against scipy, SSIM against scikit-image."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from scipy import stats
from skimage.metrics import structural_similarity as skimage_ssim

from captum_dcam.faithfulness import structural_similarity
from captum_dcam.metrics import rank_correlation


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("digits", [0, 1, 8])
def test_rank_correlation_equals_scipy(seed, digits):
    rng = np.random.default_rng(seed)
    first, second = np.round(rng.normal(size=(2, 3, 30)), digits)  # few digits: ties
    got = rank_correlation(torch.from_numpy(first), torch.from_numpy(second))
    for score, a, b in zip(got, first, second, strict=True):
        assert float(score) == pytest.approx(stats.spearmanr(a, b).statistic)


@pytest.mark.parametrize("shape", [(24, 24), (9, 14), (5, 6), (3, 3)])
def test_ssim_equals_scikit_image(shape):
    rng = np.random.default_rng(0)
    first = rng.normal(size=shape)
    second = first + 0.5 * rng.normal(size=shape)
    unit = [(m - m.min()) / np.ptp(m) for m in (first, second)]
    window = min(7, min(shape) - 1 + min(shape) % 2)
    expected = skimage_ssim(*unit, data_range=1, win_size=window)
    got = structural_similarity(torch.from_numpy(first), torch.from_numpy(second))
    assert float(got) == pytest.approx(expected)


def test_every_map_is_stretched_by_itself():
    """Maps of one batch have ranges of their own."""
    g = torch.Generator().manual_seed(0)
    scale, shift = torch.tensor([1.0, 50, 0.01]), torch.tensor([0.0, -300, 7])
    first, second = (
        torch.rand(3, 9, 9, generator=g) * scale[:, None, None] + shift[:, None, None]
        for _ in range(2)
    )
    alone = torch.stack([structural_similarity(*pair) for pair in zip(first, second, strict=True)])
    torch.testing.assert_close(structural_similarity(first, second), alone)


@st.composite
def pairs(draw):
    shape = draw(hnp.array_shapes(min_dims=2, max_dims=4, min_side=1, max_side=6))
    elements = st.sampled_from([-1.0, -0.2, 0.0, 0.3, 1.0])
    scale = draw(st.sampled_from([0.0, 1e-3, 1.0, 3e38]))
    return tuple(
        torch.from_numpy(draw(hnp.arrays(np.float64, shape, elements=elements)) * scale).float()
        for _ in range(2)
    )


@settings(max_examples=40)
@given(pairs())
def test_properties(pair):
    first, second = pair
    for score in (
        structural_similarity,
        lambda a, b: rank_correlation(a.flatten(-2), b.flatten(-2)),
    ):
        got = score(first, second)
        assert got.shape == first.shape[:-2] and (got.abs() <= 1 + 1e-9).all()
        torch.testing.assert_close(got, score(second, first))
        torch.testing.assert_close(score(first, first), torch.ones_like(got))
        torch.testing.assert_close(score(first / 4, second), got)
    flat = first.flatten(-2)
    order = torch.randperm(flat.shape[-1])
    got = rank_correlation(flat, second.flatten(-2))
    torch.testing.assert_close(
        rank_correlation(flat[..., order], second.flatten(-2)[..., order]), got
    )


def test_degenerate_and_errors():
    some, flat = torch.tensor([1.0, 2.0, 3.0]), torch.ones(3)
    assert float(rank_correlation(some, flat)) == 0 == float(rank_correlation(flat, some))
    assert float(rank_correlation(flat, flat * 5)) == 1
    assert float(rank_correlation(some, -some)) == -1
    with pytest.raises(ValueError, match="expected the same"):
        rank_correlation(some, some[:2])
    with pytest.raises(ValueError, match="expected the same"):
        structural_similarity(some, some)
    with pytest.raises(ValueError, match="odd"):
        structural_similarity(torch.ones(4, 4), torch.ones(4, 4), 2)


def test_ranks_of_what_is_no_number_are_none():
    rows = torch.arange(6.0).reshape(2, 3)
    holed = rows.clone()
    holed[0, 1] = torch.nan
    found = rank_correlation(rows, holed)
    assert bool(found[0].isnan()) and found[1] == 1
