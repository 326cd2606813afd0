"""Floors and ceiling: exact areas, seeds, symmetry."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from captum_dcam.metrics import center_blob_map, localization, oracle_map, random_map

SIDES = st.integers(1, 9)


def area_by_hand(mask: np.ndarray, h: int, w: int) -> np.ndarray:
    """Average over each cell on a grid fine enough for cells and pixels to be whole numbers."""
    fine = mask.repeat(h, 0).repeat(w, 1).astype(float)
    return fine.reshape(h, mask.shape[0], w, mask.shape[1]).mean((1, 3))


@settings(max_examples=80)
@given(SIDES, SIDES, SIDES, SIDES, st.integers(0, 99))
def test_oracle_is_the_exact_area_share(height, width, h, w, seed):
    mask = np.random.default_rng(seed).random((2, height, width)) > 0.5
    ours = oracle_map(torch.from_numpy(mask), (h, w))
    assert ours.shape == (2, h, w) and ours.dtype == torch.float32
    expected = np.stack([area_by_hand(one, h, w) for one in mask])
    np.testing.assert_allclose(ours.numpy(), expected, atol=1e-6)


def test_oracle_at_mask_resolution_is_the_mask():
    mask = torch.rand(3, 7, 5, generator=torch.Generator().manual_seed(0)) > 0.5
    assert torch.equal(oracle_map(mask, (7, 5)), mask.float())


def test_oracle_beats_both_floors():
    mask = torch.zeros(96, 96, dtype=torch.bool)
    mask[10:40, 50:90] = True
    generator = torch.Generator().manual_seed(0)
    maps = torch.stack(
        [oracle_map(mask, (12, 12)), random_map((12, 12), generator), center_blob_map((12, 12))]
    )
    full = torch.nn.functional.interpolate(maps[:, None], (96, 96), mode="bilinear")[:, 0]
    oracle, noise, blob = localization(full, mask.expand(3, 96, 96)).f3.tolist()
    assert oracle > 0.8 > 0.3 > max(noise, blob)


def test_random_follows_its_generator():
    first, again = (random_map((2, 3, 4), torch.Generator().manual_seed(7)) for _ in range(2))
    assert torch.equal(first, again) and first.shape == (2, 3, 4)
    assert (first >= 0).all() and (first < 1).all()


@pytest.mark.parametrize("grid", [(1, 1), (1, 6), (24, 24), (22, 28)])
@pytest.mark.parametrize("sigma", [0.01, 0.25, 10])
def test_blob_is_centred_positive_and_symmetric(grid, sigma):
    blob = center_blob_map(grid, sigma)
    assert blob.shape == grid and blob.dtype == torch.float32
    assert (blob > 0).all() and (blob <= 1).all()
    torch.testing.assert_close(blob, blob.flip(0))
    torch.testing.assert_close(blob, blob.flip(1))
    middle = blob[(grid[0] - 1) // 2, (grid[1] - 1) // 2]
    assert float(middle) == pytest.approx(float(blob.max()))


def test_errors_teach():
    mask = torch.ones(4, 4, dtype=torch.bool)
    for call, says in [
        (lambda: oracle_map(mask.float(), (2, 2)), r"float32: expected a tensor of torch\.bool"),
        (lambda: oracle_map(mask[0], (2, 2)), r"shape \(4,\)"),
        (lambda: oracle_map(mask, (0, 2)), r"grid is \(0, 2\)"),
        (lambda: center_blob_map((2, 2, 2)), "two integers"),
        (lambda: center_blob_map((2, 2), sigma=0), "sigma is 0"),
        (lambda: random_map((3,), torch.Generator()), r"\(\.\.\., h, w\)"),
        (lambda: random_map((3, 0), torch.Generator()), "at least 1"),
    ]:
        with pytest.raises(ValueError, match=says):
            call()
