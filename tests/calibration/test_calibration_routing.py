"""Thresholds without labels: the rule, recomputed with numpy."""

import itertools

import numpy as np
import pytest
import torch
from calibration.made_maps import PAPER, collection

from captum_dcam.calibration import cut, fit_unlabelled, paper_routing, values_of
from captum_dcam.errors import CalibrationError
from captum_dcam.refine import AKD, CBA, DACG, SICD, Gaussian, MinMax


@pytest.mark.parametrize("below", [False, True])
@pytest.mark.parametrize("seed", range(4))
def test_cut_is_the_nearest_count_that_ties_allow(seed, below):
    g = np.random.default_rng(seed)
    values = g.integers(-3, 9, 25) / 7.0
    for count in (0, 1, 5.3, 12, 17.5, 24, 25):
        threshold = cut(torch.from_numpy(values), count, below=below)
        beyond = (values < threshold if below else values > threshold).sum()
        # every count that a threshold can give
        bounds = [values.min() - 1, values.max() + 1, *values]
        counts = {(values < b if below else values > b).sum() for b in bounds}
        assert abs(beyond - count) == min(abs(c - count) for c in counts)


def test_cut_is_between_the_quantiles_of_numpy():
    values = np.random.default_rng(3).random(101)
    for share in (0.1, 0.221, 0.5, 0.9):
        ordered = np.quantile(values, [1 - share - 0.01, 1 - share + 0.01])
        assert ordered[0] <= cut(torch.from_numpy(values), share * 101) <= ordered[1]
    assert len(str(cut(torch.from_numpy(values), 20))) <= 6  # as few digits as part two values


@pytest.mark.parametrize("stages", [PAPER, (MinMax(), DACG(), SICD())], ids=["paper", "no akd"])
def test_routing_is_the_papers_as_closely_as_the_sample_permits(stages):
    found = collection(80, masks=False)
    fitted = fit_unlabelled(found, stages)
    # recomputed: maps as they come to DACG, tested in the order of its branches
    batch = found.batches[0]
    values = batch.maps
    for stage in itertools.takewhile(lambda s: not isinstance(s, DACG), stages):
        values = stage(values, batch.context)
    flat = values.double().numpy().reshape(80, -1)
    mean, std = flat.mean(1), flat.std(1)
    high_std, high_mean, low_mean = (
        fitted.after[f"dacg.{n}"] for n in ("high_std", "high_mean", "low_mean")
    )
    branch = np.where(
        std > high_std, 0, np.where(mean > high_mean, 1, np.where(mean < low_mean, 2, 3))
    )
    counts = np.bincount(branch, minlength=4)
    assert counts.tolist() == [round(s * 80) for s in (0.221, 0.193, 0.534, 0.052)]
    assert fitted.routing[1] == dict(zip(paper_routing(), (counts / 80).tolist(), strict=True))
    for name in ("akd.k_base", "dacg.percentiles.high_var", "cba.gamma", "sicd.omega_rep"):
        assert fitted.after.get(name) == fitted.before.get(name)  # not identified without labels


def test_the_gates_bounds_are_quantiles_of_maps_as_they_come_to_sicd():
    found = collection(80, masks=False)
    fitted = fit_unlabelled(found, PAPER)
    values = found.batches[0].maps
    for stage in fitted.fitted[:-1]:
        values = stage(values, found.batches[0].context)
    flat = values.double().numpy().reshape(80, -1)
    away = flat - flat.mean(1, keepdims=True)
    skewness = (away**3).mean(1) / flat.std(1) ** 3
    sicd = fitted.fitted[-1]
    assert (flat.std(1) > sicd.gate_std).sum() == round(0.221 * 80)
    assert (skewness > sicd.gate_skewness).sum() == round(0.221 * 80)
    touched = (flat.std(1) > sicd.gate_std) | (skewness > sicd.gate_skewness)
    assert fitted.gated[1] == touched.mean()


def test_constant_maps_and_maps_of_nothing_are_fitted_too():
    found = collection(40, masks=False)
    batch = found.batches[0]
    batch.maps[:30] = 0.0
    fitted = fit_unlabelled(found, PAPER)
    assert sum(fitted.routing[1].values()) == pytest.approx(1)
    assert all(np.isfinite(v) and v >= 0 for v in fitted.after.values())
    batch.maps[:] = 1.0
    assert fit_unlabelled(found, PAPER).routing[1]["high_var"] == 0


def test_too_few_maps_and_nothing_to_fit():
    with pytest.raises(CalibrationError, match="10 maps from 5 images: expected at least 20"):
        fit_unlabelled(collection(10), PAPER)
    with pytest.raises(CalibrationError, match="neither DACG nor SICD"):
        fit_unlabelled(collection(), (MinMax(), AKD(), CBA()))
    with pytest.raises(CalibrationError, match=r"no refinement with a threshold .*gaussian"):
        fit_unlabelled(collection(), (Gaussian(),))
    with pytest.raises(CalibrationError, match="2 stages are 'dacg'"):
        values_of((DACG(), DACG()))
