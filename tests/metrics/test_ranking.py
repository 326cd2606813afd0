"""Ranking against scikit-learn and loops, its intervals against resamples made one by one."""

import json

import numpy as np
import pytest
import torch
from sklearn import metrics as sk

from captum_dcam.metrics import SCORE_FEATURES, Calibrator, auroc, ranking
from captum_dcam.metrics.bootstrap import resampled_weights


def drawn(seed=0):
    return torch.Generator().manual_seed(seed)


def data(count=120, seed=0):
    """Scores with many ties, of words of 30 images."""
    g = np.random.default_rng(seed)
    images = torch.from_numpy(g.integers(0, 30, count))
    scores = torch.from_numpy(np.round(g.normal(size=count), 1))
    labels = torch.from_numpy(g.random(count) < 1 / (1 + np.exp(-scores.numpy())))
    return scores, labels, images


def test_ranking_is_scikit_learns():
    scores, labels, images = data()
    found = ranking(scores, labels, images, drawn(), n=50)
    assert float(found.auroc.mean) == pytest.approx(auroc(scores, labels))
    expected = sk.average_precision_score(~labels.numpy(), -scores.numpy())
    assert float(found.average_precision.mean) == pytest.approx(expected)
    risk = [
        (scores == level).double().mean() * (~labels[scores >= level]).double().mean()
        for level in scores.unique()
    ]
    assert float(found.risk.mean) == pytest.approx(float(sum(risk)))
    for one in found:
        assert float(one.low) < float(one.mean) < float(one.high)


def test_intervals_are_those_of_resampled_images():
    """Every resample is made by hand, with its words as often as their image was drawn."""
    scores, labels, images = data()
    found = ranking(scores, labels, images, drawn(3), n=20)
    values = []
    for weights in resampled_weights(images, len(scores), drawn(3), 20):
        for own in images.unique():  # whole images
            assert len(weights[images == own].unique()) == 1
        how = {"sample_weight": weights.numpy()}
        values.append(
            [
                sk.roc_auc_score(labels.numpy(), scores.numpy(), **how),
                sk.average_precision_score(~labels.numpy(), -scores.numpy(), **how),
            ]
        )
    low, high = np.quantile(values, [0.025, 0.975], axis=0)
    for one, a, b in zip(found[:2], low, high, strict=True):
        assert float(one.low) == pytest.approx(a) and float(one.high) == pytest.approx(b)


def test_within_strata_only_their_own_pairs_count():
    scores, labels, images = data(60)
    strata = torch.arange(60) % 4
    pairs = [
        (float(a > b) + float(a == b) / 2)
        for a, own, s in zip(scores, labels, strata, strict=True)
        for b, other, t in zip(scores, labels, strata, strict=True)
        if own and not other and s == t
    ]
    found = ranking(scores, labels, images, drawn(), strata=strata, n=5)
    assert float(found.auroc.mean) == pytest.approx(sum(pairs) / len(pairs))
    alone = ranking(scores, labels, images, drawn(), strata=torch.arange(60), n=5)
    assert bool(alone.auroc.mean.isnan())


def test_a_confounded_score_is_seen_within_strata():
    """Simpson: the score is the stratum, and tells nothing inside of it."""
    strata = torch.arange(200) // 100
    labels = (torch.arange(200) % 10 < 2) | ((strata == 1) & (torch.arange(200) % 10 < 8))
    found = [
        float(ranking(strata.double(), labels, torch.arange(200), drawn(), strata=s, n=5).auroc[0])
        for s in (None, strata)
    ]
    assert found[0] > 0.7 and found[1] == 0.5


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda s, t, i: (s / 0, t, i), "one finite number"),
        (lambda s, t, i: (s, t | True, i), "both kinds"),
        (lambda s, t, i: (s, t, i.double()), "one image's number"),
        (lambda s, t, i: (s, t[1:], i), "expected torch.bool"),
    ],
)
def test_errors_teach(change, says):
    with pytest.raises(ValueError, match=says):
        ranking(*change(*data(20)), drawn())
    scores, labels, images = data(20)
    with pytest.raises(ValueError, match="one number for each of the 20 words"):
        ranking(scores, labels, images, drawn(), strata=images[1:])


def test_a_calibrator_is_fitted_applied_and_stored():
    scores, labels, _ = data()
    features = torch.stack([scores, *torch.randn(4, 120, generator=drawn()).double()], dim=1)
    fit = Calibrator.fit(features, labels, fitted_on="made", tags=("NN",), model="abc", below=0.3)
    assert fit.features == SCORE_FEATURES and fit.weights[0] > 0.5
    assert Calibrator.from_json(fit.to_json()) == fit
    assert auroc(fit.probability(features), labels) >= auroc(scores, labels)
    record = json.loads(fit.to_json())
    for change, says in (
        ({"format": "captum_dcam.reliability/1"}, "fit it again"),
        ({"features": ["log_odds"]}, "fit it again"),
        ({"below": 1.5}, "below is 1.5"),
        ({"tags": []}, "expected tags"),
        ({"model": 3}, "expected a fingerprint"),
    ):
        with pytest.raises(ValueError, match=says):
            Calibrator.from_record({**record, **change})
