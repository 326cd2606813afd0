"""agreement(): ranks by scipy, overlap and distance counted by hand, and what changes nothing."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from scipy import stats

from captum_dcam.errors import InputError, WrongTypeError
from captum_dcam.metrics import agreement, peak_distance, top_overlap

SIDES = st.tuples(st.integers(1, 6), st.integers(1, 6))
VALUES = st.integers(-5, 5).map(float)  # many ties


@st.composite
def pairs(draw):
    shape = draw(SIDES)
    return tuple(torch.from_numpy(draw(hnp.arrays(float, shape, elements=VALUES))) for _ in "ab")


def by_hand(one, other, share):
    """The three figures in plain Python."""
    high, wide = one.shape
    count = max(1, round(share * high * wide))
    cells = [(r, c) for r in range(high) for c in range(wide)]
    ordered = [sorted(cells, key=lambda at, m=m: -float(m[at])) for m in (one, other)]
    first, second = (set(order[:count]) for order in ordered)
    (y0, x0), (y1, x1) = ordered[0][0], ordered[1][0]
    apart = math.hypot(y0 - y1, x0 - x1) / math.hypot(high, wide)
    return len(first & second) / len(first | second), apart


@given(pairs(), st.sampled_from([0.05, 0.1, 0.3, 1.0]))
def test_agreement_is_what_counting_gives(maps, share):
    found = agreement(*maps, share)
    overlap, apart = by_hand(*maps, share)
    assert float(found.overlap) == pytest.approx(overlap)
    assert float(found.distance) == pytest.approx(apart)
    flat = [float(m.std(correction=0)) == 0 for m in maps]
    if not any(flat):
        wanted = stats.spearmanr(*(m.flatten() for m in maps)).statistic
        assert float(found.rank) == pytest.approx(wanted, abs=1e-12)
    else:
        assert float(found.rank) == float(all(flat))


@given(pairs(), st.sampled_from([0.5, 3.0, 1e6]))
def test_agreement_is_symmetric_and_knows_no_scale(maps, scale):
    one, other = maps
    wanted = agreement(one, other)
    for found in (agreement(other, one), agreement(one * scale, other)):
        for what in ("rank", "overlap", "distance"):
            assert torch.allclose(getattr(found, what), getattr(wanted, what), atol=1e-12)
    same = agreement(one, one)
    assert (float(same.rank), float(same.overlap), float(same.distance)) == (1.0, 1.0, 0.0)


def test_leading_axes_are_kept_and_batched():
    g = torch.Generator().manual_seed(0)
    one, other = torch.rand(2, 3, 2, 5, 4, generator=g)
    found = agreement(one, other)
    for n in np.ndindex(3, 2):
        single = agreement(one[n], other[n])
        assert float(found.rank[n]) == pytest.approx(float(single.rank))
        assert found.overlap[n] == single.overlap and found.distance[n] == single.distance


@pytest.mark.parametrize(
    ("maps", "share", "error", "text"),
    [
        ((torch.zeros(2, 2), torch.zeros(2, 3)), 0.1, InputError, r"\(2, 2\) and \(2, 3\)"),
        ((torch.zeros(4), torch.zeros(4)), 0.1, InputError, "H and W of at least 1"),
        ((torch.zeros(0, 2), torch.zeros(0, 2)), 0.1, InputError, "H and W of at least 1"),
        ((torch.full((2, 2), torch.nan), torch.zeros(2, 2)), 0.1, InputError, "not finite"),
        ((torch.zeros(2, 2), torch.zeros(2, 2)), 0.0, InputError, "0 < share <= 1"),
        ((torch.zeros(2, 2), torch.zeros(2, 2)), 1.5, InputError, "0 < share <= 1"),
        ((torch.zeros(2, 2), torch.zeros(2, 2)), "all", WrongTypeError, "share is 'all'"),
    ],
)
def test_bad_maps_are_named(maps, share, error, text):
    with pytest.raises(error, match=text):
        agreement(*maps, share)
    if share == 0.1:
        with pytest.raises(error, match=text):
            peak_distance(*maps)
    else:
        with pytest.raises(error, match=text):
            top_overlap(*maps, share)
