"""Single-Instance Causal Debiasing: Diffusion-CAM Eq. 12 and 13."""

import numpy as np
import pytest
import torch
from refine import loops
from refine.shared import close, each, random_maps
from scipy.optimize import minimize_scalar

from captum_dcam.refine import min_max, sicd_gate
from captum_dcam.refine import single_instance_causal_debiasing as sicd


def normalised(seed, *shape):
    return min_max(torch.from_numpy(random_maps(seed, *shape)))


@pytest.mark.parametrize("shape", [(16, 16), (3, 8), (1, 6), (1, 1)])
@pytest.mark.parametrize("form", ["mask", "excess"])
@pytest.mark.parametrize("gate", [True, False])
@pytest.mark.parametrize("with_repeated", [True, False])
def test_sicd_is_the_loop(shape, form, gate, with_repeated):
    maps, repeated = normalised(31, 20, *shape), normalised(32, 20, *shape)
    weights = {"omega_rep": 2.5, "omega_out": 0.7}
    result = sicd(
        maps, repeated if with_repeated else None, outlier_form=form, gate=gate, **weights
    )
    expected = [
        loops.sicd(m, r if with_repeated else None, form=form, gate=gate, **weights)
        for m, r in zip(maps.numpy(), repeated.numpy(), strict=True)
    ]
    close(result, np.stack(expected))


def test_defaults_are_the_loop():
    maps, repeated = normalised(33, 30, 12, 12), normalised(34, 30, 12, 12)
    close(sicd(maps), each(maps.numpy(), loops.sicd))
    pairs = zip(maps.numpy(), repeated.numpy(), strict=True)
    close(sicd(maps, repeated), np.stack([loops.sicd(m, r) for m, r in pairs]))


@pytest.mark.parametrize("seed", range(4))
def test_lambda_minimises_eq_13(seed):
    # Another way to the same lambda: a bounded numerical search, as the reference does without.
    image, repeated = normalised(40 + seed, 2, 9, 9).numpy()
    disturbance = loops.interference(image, repeated, omega_rep=3.0)
    found = minimize_scalar(
        lambda share: ((image - share * disturbance) ** 2).sum(),
        bounds=(0, 0.5),
        method="bounded",
        options={"xatol": 1e-10},
    ).x
    result = sicd(torch.tensor(image), torch.tensor(repeated), omega_rep=3.0, gate=False)
    close(result, np.maximum(image - found * disturbance, 0), rtol=1e-6, atol=1e-6)


def test_lambda_is_its_limit_with_outliers_alone():
    # What the docstring says: the mask of the paper's preset always costs lambda_max * omega_out.
    maps = normalised(35, 50, 16, 16)
    fallen = maps - sicd(maps, gate=False)
    bound = maps.mean((1, 2), keepdim=True) + 2 * maps.std((1, 2), correction=0, keepdim=True)
    torch.testing.assert_close(fallen, (maps > bound).double() * 0.01, rtol=0, atol=1e-12)


def test_excess_keeps_the_order_of_pixels():
    maps = normalised(36, 10, 12, 12)
    result = sicd(maps, outlier_form="excess", omega_out=1.0, gate=False)
    assert torch.equal(result.flatten(1).argsort(stable=True), maps.flatten(1).argsort(stable=True))


@pytest.mark.parametrize("gate", [True, False])
def test_no_interference_no_change(gate):
    maps = torch.rand(3, 8, 8, generator=torch.Generator().manual_seed(0))  # flat: no outlier
    assert torch.equal(sicd(maps, gate=gate), maps)
    assert torch.equal(sicd(maps, torch.zeros(1, 1), gate=gate), maps)
    constant = torch.full((6, 6), 0.5)  # at mean + 2 std, not above
    assert torch.equal(sicd(constant, gate=gate), constant)
    peaked = torch.zeros(6, 6)
    peaked[2, 2] = 1
    assert torch.equal(sicd(peaked, omega_out=0.0, gate=gate), peaked)


def test_a_disjoint_interference_has_no_share():
    maps, repeated = torch.zeros(2, 4, 4), torch.zeros(2, 4, 4)
    maps[:, 0, 0], repeated[:, 3, 3] = 1, 1
    assert torch.equal(sicd(maps, repeated, omega_out=0.0, gate=False), maps)


def test_gate_by_hand():
    calm = torch.full((10, 10), 0.5, dtype=torch.float64)
    calm[::2] = 0.6
    wild = torch.zeros(10, 10, dtype=torch.float64)
    wild[::2] = 1.0  # std 0.5, skewness 0
    tailed = torch.zeros(10, 10, dtype=torch.float64)
    tailed[0, 0] = 1.0  # std 0.0995, skewness 9.8
    assert sicd_gate(torch.stack([calm, wild, tailed])).tolist() == [False, True, True]
    assert sicd_gate(torch.stack([calm, wild, tailed]), gate_skewness=20).tolist() == [
        False, True, False,
    ]  # fmt: skip
    assert not sicd_gate(1 - tailed)  # a tail of low values is no outlier


def test_the_gate_leaves_calm_maps_alone():
    calm = torch.full((8, 8), 0.5)
    calm[::2] = 0.6
    uniform = torch.ones(1, 1)
    assert torch.equal(sicd(calm, uniform), calm)
    assert (sicd(calm, uniform, gate=False) < calm).all()


def test_reversion_by_hand():
    # Range 1; the mask takes 0.5 * 0.4 off the peak: range 0.8.
    maps = torch.zeros(2, 5, 5)
    maps[0, 0, 0] = 1
    taken = sicd(maps, omega_out=0.4)
    assert float(taken[0, 0, 0]) == pytest.approx(0.8)
    assert torch.equal(sicd(maps, omega_out=0.4, revert_below=0.9), maps)
    assert torch.equal(sicd(maps, omega_out=0.4, revert_below=0.7), taken)


def test_reversion_is_the_loop():
    maps, repeated = normalised(37, 20, 9, 9), normalised(38, 20, 9, 9)
    result = sicd(maps, repeated, omega_rep=0.3, omega_out=0.2, revert_below=0.9)
    pairs = zip(maps.numpy(), repeated.numpy(), strict=True)
    expected = [loops.sicd(m, r, omega_rep=0.3, omega_out=0.2, revert_below=0.9) for m, r in pairs]
    close(result, np.stack(expected))
    unchanged = (result == maps).all(dim=2).all(dim=1)
    assert 0 < int(unchanged.sum()) < 20  # both sides of the bound are met


@pytest.mark.parametrize("shape", [(1, 1), (7, 6), (1, 6), (4, 1, 7, 6), (3, 1, 1), (4, 3, 7, 6)])
def test_repeated_maps_broadcast(shape):
    maps = normalised(39, 12, 7, 6).view(4, 3, 7, 6)
    repeated = torch.rand(shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    expected = sicd(maps, repeated.expand(4, 3, 7, 6))
    assert torch.equal(sicd(maps, repeated), expected)


def test_repeated_maps_of_another_dtype():
    maps = normalised(39, 3, 7, 6).half()
    assert sicd(maps, torch.rand(7, 6, dtype=torch.float64)).dtype == torch.float16


def test_huge_maps_over_tiny_interference():
    maps = torch.zeros(4, 4)
    maps[0, 0] = 3e38
    repeated = torch.zeros(4, 4)
    for place in ((1, 1), (0, 0)):  # no overlap, and a share that overflows
        repeated[place] = 1e-38
        assert torch.equal(sicd(maps, repeated, omega_out=0.0, gate=False), maps)


def test_interference_past_the_largest_float():
    maps = torch.tensor([[0.0, 1.0], [3e38, 0.5]])
    result = sicd(maps, torch.full((2, 2), 3e38), omega_rep=100.0, gate=False)
    assert torch.isfinite(result).all() and (result <= maps).all()
