"""Gini, entropy and Hoyer against loops, and the properties that Hurley and Rickard ask for."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from scipy import stats

from captum_dcam.metrics import gini_index, hoyer, normalized_entropy

MEASURES = (gini_index, normalized_entropy, hoyer)
DENSE = {gini_index: 0.0, normalized_entropy: 1.0, hoyer: 0.0}


@pytest.mark.parametrize("seed", range(4))
def test_against_loops(seed):
    values = np.random.default_rng(seed).random((5, 6, 7)) ** 4
    maps = torch.from_numpy(values)
    for i, one in enumerate(values.reshape(5, 42)):
        # Gini as half the mean absolute difference over the mean
        pairs = sum(abs(a - b) for a in one for b in one) / 42**2
        assert float(gini_index(maps)[i]) == pytest.approx(pairs / 2 / one.mean())
        entropy = stats.entropy(one) / math.log(42)
        assert float(normalized_entropy(maps)[i]) == pytest.approx(entropy)
        ratio = sum(one) / math.sqrt(sum(v * v for v in one))
        expected = (math.sqrt(42) - ratio) / (math.sqrt(42) - 1)
        assert float(hoyer(maps)[i]) == pytest.approx(expected)


@pytest.mark.parametrize("measure", MEASURES)
def test_ends(measure):
    dense = DENSE[measure]
    for flat in (torch.zeros(3, 4), torch.full((3, 4), 7.0), torch.ones(1, 1), torch.zeros(1, 1)):
        assert float(measure(flat)) == pytest.approx(dense, abs=1e-6)
    single = torch.zeros(4, 5)
    single[2, 3] = 5
    sparse = 1 - 1 / 20 if measure is gini_index else 1 - dense
    assert float(measure(single)) == pytest.approx(sparse)


@st.composite
def maps(draw):
    shape = draw(hnp.array_shapes(min_dims=2, max_dims=4, min_side=1, max_side=6))
    dtype, largest = draw(
        st.sampled_from([(np.float16, 6e4), (np.float32, 3e38), (np.float64, 1.7e308)])
    )
    scale = draw(st.sampled_from([0.0, 1e-3, 1.0, largest]))
    levels = draw(hnp.arrays(np.float64, shape, elements=st.floats(0, 1)))
    return torch.from_numpy((levels * scale).astype(dtype))


@settings(max_examples=80)
@given(maps())
@pytest.mark.parametrize("measure", MEASURES)
def test_properties(measure, values):
    got = measure(values)
    assert got.shape == values.shape[:-2] and ((got >= 0) & (got <= 1)).all()
    wide = values.double()
    got = measure(wide)
    close = {"rtol": 1e-6, "atol": 1e-7}
    torch.testing.assert_close(measure(wide / 2**10), got, **close)
    shuffled = wide.flatten(-2)[..., torch.randperm(wide.shape[-2:].numel())].reshape(wide.shape)
    torch.testing.assert_close(measure(shuffled), got, **close)


@pytest.mark.parametrize("measure", MEASURES)
def test_robin_hood_makes_denser(measure):
    values = torch.rand(4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    rich, poor = divmod(int(values.argmax()), 4), divmod(int(values.argmin()), 4)
    share = (values[rich] - values[poor]) / 4
    moved = values.clone()
    moved[rich] -= share
    moved[poor] += share
    sign = -1 if DENSE[measure] else 1
    assert sign * float(measure(values) - measure(moved)) > 0


def test_cloning_keeps_gini():
    values = torch.rand(3, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    assert float(gini_index(values.repeat(2, 1))) == pytest.approx(float(gini_index(values)))


@pytest.mark.parametrize("measure", MEASURES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_dtypes_and_errors(measure, dtype):
    got = measure(torch.rand(2, 40, 40, dtype=torch.float64).to(dtype))
    assert got.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    with pytest.raises(ValueError, match="relu"):
        measure(-torch.ones(2, 2, dtype=dtype))
