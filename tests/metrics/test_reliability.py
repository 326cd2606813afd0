"""The features against loops, the regression against its optimum, blobs against noise."""

import json
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from scipy import optimize
from skimage.filters import threshold_otsu
from skimage.measure import label

from captum_dcam.metrics import (
    MAP_FEATURES,
    Reliability,
    auroc,
    expected_calibration_error,
    gini_index,
    map_features,
    normalized_entropy,
)


def made_maps(kind, count, seed, side=16):
    """Blobs on faint noise (localise), and noise or a wide ramp (do not)."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:side, :side]
    maps = []
    for i in range(count):
        noise = rng.random((side, side))
        if kind == "blob":
            cy, cx, width = *rng.uniform(3, side - 3, 2), rng.uniform(1.2, 3)
            values = np.exp(-((y - cy) ** 2 + (x - cx) ** 2) / (2 * width**2)) + 0.15 * noise
        elif i % 2:
            values = noise ** rng.uniform(0.5, 4)
        else:
            values = 2 + np.sin(x / side * rng.uniform(0, 3)) + 0.3 * noise
        maps.append(values * 10 ** rng.uniform(-3, 3))
    return torch.from_numpy(np.stack(maps))


def data(count=60, seed=0):
    maps = torch.cat((made_maps("blob", count, seed), made_maps("clutter", count, seed + 1)))
    return maps, torch.arange(2 * count) < count


@pytest.mark.parametrize("kind", ["blob", "clutter"])
def test_features_against_loops(kind):
    maps = made_maps(kind, 6, 3, side=9)
    got = map_features(maps)
    for row, one in zip(got, maps.numpy(), strict=True):
        found = dict(zip(MAP_FEATURES, row.tolist(), strict=True))
        tensor = torch.from_numpy(one)
        assert found["entropy"] == pytest.approx(float(normalized_entropy(tensor)))
        assert found["gini"] == pytest.approx(float(gini_index(tensor)))
        assert found["peak"] == pytest.approx(math.log(one.max() / one.mean()) / math.log(81))
        pairs = [(one[p], one[p[0], p[1] + 1]) for p in np.ndindex(9, 8)]
        pairs += [(one[p], one[p[0] + 1, p[1]]) for p in np.ndindex(8, 9)]
        mean = one.mean()
        moran = sum((a - mean) * (b - mean) for a, b in pairs) / len(pairs) / one.var()
        assert found["autocorrelation"] == pytest.approx(moran)
        region = one > threshold_otsu(one)
        high, low = one[region], one[~region]
        within = (high.size * high.var() + low.size * low.var()) / 81
        assert found["separability"] == pytest.approx(1 - within / one.var())
        parts = label(region, connectivity=2)
        heaviest = max(one[parts == i].sum() for i in range(1, parts.max() + 1))
        assert found["connected"] == pytest.approx(heaviest / one.sum())


@st.composite
def any_maps(draw):
    shape = draw(hnp.array_shapes(min_dims=2, max_dims=4, min_side=1, max_side=6))
    dtype, largest = draw(
        st.sampled_from([(np.float16, 6e4), (np.float32, 3e38), (np.float64, 1.7e308)])
    )
    scale = draw(st.sampled_from([0.0, 1e-3, 1.0, largest]))
    levels = draw(hnp.arrays(np.float64, shape, elements=st.sampled_from([0, 0.1, 0.5, 0.9, 1])))
    return torch.from_numpy((levels * scale).astype(dtype))


@settings(max_examples=40)
@given(any_maps())
def test_features_are_finite_and_blind_to_scale_and_flips(maps):
    got = map_features(maps)
    assert got.shape == (*maps.shape[:-2], 6) and torch.isfinite(got).all()
    assert (got.abs() <= 1 + 1e-6).all()
    wide = maps.double()
    close = {"rtol": 1e-6, "atol": 1e-9}
    torch.testing.assert_close(map_features(wide / 4), map_features(wide), **close)
    torch.testing.assert_close(map_features(wide.flip(-1)), map_features(wide), **close)
    flat = wide.reshape(-1, *wide.shape[-2:])
    alone = torch.stack([map_features(one) for one in flat]).reshape(got.shape)
    torch.testing.assert_close(map_features(wide), alone, **close)


def test_flat_maps():
    expected = torch.tensor([1.0, 0, 0, 0, 0, 0])
    for flat in (torch.zeros(4, 4), torch.full((4, 4), 3e38), torch.ones(1, 1)):
        assert torch.equal(map_features(flat), expected)


def test_parts_of_neighbouring_maps_do_not_touch():
    maps = torch.zeros(3, 5, 5)
    maps[:, 1, 1] = 1
    maps[1, 1, 3] = 1
    got = map_features(maps)[:, MAP_FEATURES.index("connected")]
    assert got.tolist() == pytest.approx([1, 0.5, 1])


@pytest.mark.parametrize("l2", [0.1, 1.0, 10.0])
def test_fit_is_the_optimum_and_deterministic(l2):
    maps, labels = data()
    features = map_features(maps)
    fitted = Reliability.fit(features, labels, l2)
    assert fitted == Reliability.fit(features, labels, l2)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    again = Reliability.fit(features[order], labels[order], l2)
    assert again.weights == pytest.approx(fitted.weights, abs=1e-4)
    rows = ((features - features.mean(0)) / features.std(0, correction=0)).numpy()

    def loss(point):
        p = 1 / (1 + np.exp(-(rows @ point[:6] + point[6])))
        chosen = np.where(labels.numpy(), p, 1 - p)
        return -np.log(chosen).sum() + l2 / 2 * (point[:6] ** 2).sum()

    found = np.array([*fitted.weights, fitted.bias])
    other = optimize.minimize(loss, found + 0.05, method="BFGS").x
    assert found == pytest.approx(other, abs=2e-3)
    assert loss(found) <= loss(other) + 1e-8


def test_blobs_score_above_clutter_on_fresh_maps():
    maps, labels = data(seed=0)
    fitted = Reliability.fit(map_features(maps), labels, fitted_on="made maps")
    fresh, truth = data(seed=100)
    scores = fitted.score(fresh)
    assert auroc(scores, truth) > 0.97
    assert expected_calibration_error(scores, truth) < 0.1
    assert float(fitted.score(torch.zeros(16, 16))) < 0.3
    torch.testing.assert_close(fitted.score(fresh * 1e5), scores)


def test_json_round_trip():
    maps, labels = data(20)
    fitted = Reliability.fit(map_features(maps), labels, fitted_on="made maps")
    text = fitted.to_json()
    assert Reliability.from_json(text) == fitted
    record = json.loads(text)
    for change in ({"format": "captum_dcam.reliability/0"}, {"features": ["entropy"]}):
        with pytest.raises(ValueError, match="fit it again"):
            Reliability.from_json(json.dumps({**record, **change}))
    with pytest.raises(ValueError, match="weights is"):
        Reliability.from_json(json.dumps({**record, "weights": [1.0]}))


@pytest.mark.parametrize("seed", range(3))
def test_auroc_and_calibration_against_loops(seed):
    rng = np.random.default_rng(seed)
    scores = np.round(rng.random(40), 1)
    labels = rng.random(40) < scores
    pairs = [(a > b) + (a == b) / 2 for a in scores[labels] for b in scores[~labels]]
    given_scores, truth = torch.from_numpy(scores), torch.from_numpy(labels)
    assert auroc(given_scores, truth) == pytest.approx(sum(pairs) / len(pairs))
    error = 0.0
    for b in range(5):
        inside = (scores * 5 >= b) & (scores * 5 < b + 1) | ((b == 4) & (scores == 1))
        if inside.any():
            error += inside.mean() * abs(labels[inside].mean() - scores[inside].mean())
    assert expected_calibration_error(given_scores, truth, 5) == pytest.approx(error)


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda f, t: Reliability.fit(f[:, :3], t), "map_features"),
        (lambda f, t: Reliability.fit(f, t[:3]), r"torch\.bool"),
        (lambda f, t: Reliability.fit(f / 0, t), "one finite number"),
        (lambda f, t: Reliability.fit(f, t | True), "both kinds"),
        (lambda f, t: Reliability.fit(f, t, l2=0), "l2 is 0"),
        (lambda f, t: Reliability.fit(f, t).probability(f[:, :2]), "expected"),
        (lambda f, t: auroc(f, t), "one finite number"),
        (lambda f, t: expected_calibration_error(f[:, 0] + 9, t), "expected 0 to 1"),
        (lambda f, t: expected_calibration_error(f[:, 0], t[1:]), "as many labels"),
        (lambda f, t: map_features(f - 9), "relu"),
    ],
)
def test_errors_teach(call, says):
    maps, labels = data(5)
    with pytest.raises(ValueError, match=says):
        call(map_features(maps), labels)
