"""Thresholds with labels: the search, its optimum, its cross-validation."""

import dataclasses

import numpy as np
import pytest
import torch
from calibration.made_maps import PAPER, collection, f3

from captum_dcam.calibration import (
    PARAMETERS,
    Chain,
    coordinate_descent,
    cut,
    fit_stages,
    values_of,
    with_values,
)
from captum_dcam.errors import CalibrationError
from captum_dcam.refine import AKD, CBA, DACG, SICD, Gaussian, MinMax


def test_coordinate_descent_finds_the_known_optimum():
    best = {"a": 3.0, "b": 0.5, "c": None}

    def objective(values):
        loss = (values["a"] - 3) ** 2 + (values["b"] - 0.5) ** 2 + (values["c"] is not None)
        return -loss - 0.1 * abs(values["a"] - 3) * abs(values["b"] - 0.5)

    tried = {"a": (0, 1.0, 3.0, 5.0), "b": (0.0, 0.5, 1.0), "c": (None, 1.0)}
    found = coordinate_descent({"a": 0.0, "b": 0.0, "c": 1.0}, lambda n, _: tried[n], objective)
    assert found.values == best and found.objective == 0 and found.sweeps == 2
    assert [s.name for s in found.steps] == ["a", "b", "c"]
    still = coordinate_descent(best, lambda n, _: tried[n], objective)
    assert still.values == best and still.steps == () and still.sweeps == 1


def test_a_gain_below_the_least_is_none():
    tried = {"a": (0.0, 1.0)}
    low = coordinate_descent({"a": 0.0}, lambda n, _: tried[n], lambda v: 9e-5 * v["a"])
    high = coordinate_descent({"a": 0.0}, lambda n, _: tried[n], lambda v: 2e-4 * v["a"])
    assert low.values == {"a": 0.0} and high.values == {"a": 1.0}


def test_a_background_that_only_lowers_f3_is_taken_away():
    found = collection(40, dull=0.3)
    fitted = fit_stages(found, (MinMax(), CBA(weights=(0.0, 0.0, 0.8, 0.0))))
    assert fitted.after["cba.gamma"] == 0.0 and fitted.own.gain > 0.01
    assert fitted.held.low > 0, "the gain holds on images that were not seen"
    assert fitted.own.before["f3"] == pytest.approx(f3(found, fitted.start), abs=1e-6)
    assert fitted.own.after["f3"] == pytest.approx(f3(found, fitted.fitted), abs=1e-6)
    assert fitted.own.gain == pytest.approx(fitted.own.after["f3"] - fitted.own.before["f3"])


def test_no_single_change_betters_what_was_found():
    found = collection(24, seed=2)
    start = (MinMax(), AKD(), CBA(gamma=0.25))
    fitted = fit_stages(found, start, folds=2)
    best = f3(found, fitted.fitted)
    assert best >= f3(found, start)
    for name, parameter in PARAMETERS.items():
        for value in parameter.tried if name in fitted.after else ():
            other = f3(found, with_values(start, {**fitted.after, name: value}))
            assert other < best + 1e-4 + 1e-6, (name, value)


def test_the_same_images_give_the_same_fit():
    def fields(fitted):
        return [fitted.after, fitted.own, fitted.held, fitted.steps, fitted.statistics]

    one, two = (fit_stages(collection(24), (MinMax(), CBA()), folds=3) for _ in range(2))
    assert fields(one) == fields(two)
    other = fit_stages(collection(24), (MinMax(), CBA()), folds=3, seed=1)
    assert one.after == other.after and one.held != other.held  # other parts, the same search


def test_held_out_words_are_scored_by_searches_without_their_image(monkeypatch):
    """With labels that differ by image, a search that saw an image would follow it."""
    from captum_dcam.calibration import fit

    seen = []
    real = fit.coordinate_descent

    def watched(start, candidates, objective, say):
        found = real(start, candidates, objective, say=say)
        seen.append((found, objective))
        return found

    monkeypatch.setattr(fit, "coordinate_descent", watched)
    found = collection(24)
    fitted = fit_stages(found, (MinMax(), CBA()), folds=3)
    parts = fit._parts(found, 0, 3)
    assert torch.stack(parts).sum(0).eq(1).all()  # every word in one part
    for part in parts:
        images = found.images[part]
        assert torch.isin(found.images, images).eq(part).all()  # with all words of its image
    total = 0.0
    for (search, objective), part in zip(seen[1:], parts, strict=True):
        scores = Chain(found).scores(with_values((MinMax(), CBA()), search.values))[:, 3]
        assert search.objective == objective(search.values) == float(scores[~part].mean())
        total += float(scores[part].sum())
    assert fitted.held.after["f3"] == pytest.approx(total / 24)


def test_tiny_splits_are_refused():
    with pytest.raises(CalibrationError, match="9 images with a scored word and 27 words"):
        fit_stages(collection(27, per=3), PAPER)
    with pytest.raises(CalibrationError, match=r"12 images .* and 12 words: expected at least 10"):
        fit_stages(collection(12, per=1), PAPER)
    with pytest.raises(CalibrationError, match="folds is 13: expected 2 to 12"):
        fit_stages(collection(24), PAPER, folds=13)


def test_nothing_to_fit():
    with pytest.raises(CalibrationError, match=r"no refinement with a setting .*gaussian"):
        fit_stages(collection(), (Gaussian(),))
    with pytest.raises(CalibrationError, match="2 stages are 'dacg'"):
        values_of((DACG(), DACG()))


@pytest.mark.parametrize("dull", [0.0, 0.2])
def test_what_is_written_of_the_maps_recomputed_with_numpy(narrow, dull):
    """Quantiles of statistics, DACG's routing and SICD's gate; the paper's Eq. 7."""
    found, stages = collection(24, dull=dull), (MinMax(), DACG(high_std=0.2), SICD(gate_std=0.1))
    fitted = fit_stages(found, stages, folds=2)
    values = found.batches[0].maps[0]
    for place, stage in enumerate(stages):
        if place:
            flat = values.double().numpy().reshape(24, -1)
            mean, std = flat.mean(1), flat.std(1)
            skewness = ((flat - mean[:, None]) ** 3).mean(1) / std**3
            written = fitted.statistics[stage.name]
            for name, own in (("mean", mean), ("std", std), ("skewness", skewness)):
                expected = np.quantile(own, (0.05, 0.25, 0.5, 0.75, 0.95))
                assert written[name] == pytest.approx(expected.tolist())
        if isinstance(stage, DACG):
            rest = np.where(mean > 0.35, 1, np.where(mean < 0.25, 2, 3))
            counts = np.bincount(np.where(std > 0.2, 0, rest), minlength=4)
            assert list(fitted.routing[0].values()) == (counts / 24).tolist()
        if isinstance(stage, SICD):
            touched = (std > stage.gate_std) | (skewness > stage.gate_skewness)
            assert fitted.gated[0] == touched.mean()
        values = stage(values, found.batches[0].contexts[0])


def test_values_go_into_stages_and_come_out():
    values = values_of(PAPER)
    four = [name for name in PARAMETERS if not name.startswith("affinity")]
    assert list(values) == four and values["cba.weights.max"] == 0.015
    assert with_values(PAPER, values) == PAPER
    changed = {**values, "dacg.percentiles.low_mean": 50.0, "cba.weights.mean": 0.4}
    stages = with_values(PAPER, changed)
    assert stages[2] == DACG(percentiles=(90.0, 75.0, 50.0, 85.0))
    assert stages[3] == CBA(weights=(0.15, 0.15, 0.4, 0.015)) and stages[1] == AKD()
    off = with_values(PAPER, {**values, "akd.k_base": None})
    assert off == (PAPER[0], *PAPER[2:])


def test_a_chain_computes_nothing_twice_and_nothing_wrong():
    found, calls = collection(24), []

    @dataclasses.dataclass(frozen=True)
    class Counted(CBA):
        def __call__(self, values, context=None):
            calls.append(self.gamma)
            return super().__call__(values, context)

    chain = Chain(found)
    for gamma in (0.5, 0.0, 0.5):
        for std in (0.22, 0.1):
            stages = (MinMax(), Counted(gamma=gamma), MinMax(), SICD(gate_std=std))
            assert float(chain.scores(stages)[:, 3].mean()) == pytest.approx(f3(found, stages))
    own = len(calls) - 6  # f3 runs every stage every time
    assert chain.evaluations == 4 and own == 2


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
