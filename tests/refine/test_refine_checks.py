"""Every refusal: its type, and a message with the value, the expectation and the next step."""

import numpy as np
import pytest
import torch
from refine.shared import CONTEXT, FUNCTIONS

from captum_dcam import refine as R

SIGNED = {"min_max", "median", "gaussian", "paper"}
PUBLIC = {
    **FUNCTIONS,
    "dacg_branch": R.dacg_branch,
    "sicd_gate": R.sicd_gate,
    "kernel_size": lambda maps: R.adaptive_kernel_size(maps, steps=1, image_size=(1, 1)),
}
every = pytest.mark.parametrize("name", PUBLIC)
MAPS = torch.rand(2, 4, 4, generator=torch.Generator().manual_seed(0))


@every
@pytest.mark.parametrize(
    ("maps", "error", "message"),
    [
        ([[0.0]], TypeError, r"`maps` is a list, expected a torch\.Tensor.*as_tensor"),
        (torch.ones(3, 3, dtype=torch.int64), TypeError, r"dtype torch\.int64 .*\.float\(\)"),
        (torch.ones(3, 3, dtype=torch.bool), TypeError, r"dtype torch\.bool"),
        (torch.ones(3, 3, dtype=torch.complex64), TypeError, r"dtype torch\.complex64"),
        (torch.ones(9), ValueError, r"shape \(9,\), expected \(\.\.\., H, W\).*view"),
        (torch.tensor(1.0), ValueError, r"shape \(\), expected"),
        (torch.ones(2, 0, 4), ValueError, r"shape \(2, 0, 4\).*no pixel"),
        (torch.ones(4, 0), ValueError, r"shape \(4, 0\).*no pixel"),
        (
            torch.tensor([[1.0, 2.0], [torch.nan, torch.inf]]),
            ValueError,
            r"2 NaN or infinite values, the first, nan, at index \(1, 0\); expected finite",
        ),
        (torch.tensor([[1.0, -torch.inf]]), ValueError, r"1 NaN or infinite.*-inf"),
    ],
)
def test_bad_maps(name, maps, error, message):
    with pytest.raises(error, match=message):
        PUBLIC[name](maps)


@every
def test_negative_maps(name):
    maps = MAPS - 0.5
    if name in SIGNED:
        assert PUBLIC[name](maps).isfinite().all()
        return
    with pytest.raises(
        ValueError, match=r"negative values down to -0\.\d+, expected non-neg.*relu"
    ):
        PUBLIC[name](maps)


WINDOWS = [
    lambda k: R.rank_gaussian_filter(MAPS, k),
    lambda k: R.median_filter(MAPS, k),
    lambda k: R.gaussian_filter(MAPS, k),
    lambda k: R.distribution_aware_confidence_gating(MAPS, kernel_size=k),
    lambda k: R.adaptive_kernel_size(MAPS, steps=1, image_size=(1, 1), k_min=k),
    lambda k: R.adaptive_kernel_denoising(MAPS, steps=1, image_size=(1, 1), k_max=k),
    R.RankGaussian,
    R.Median,
    R.Gaussian,
    lambda k: R.DACG(kernel_size=k),
    lambda k: R.AKD(k_min=k),
]


@pytest.mark.parametrize("call", WINDOWS)
@pytest.mark.parametrize(
    ("k", "error", "message"),
    [
        (4, ValueError, r"is 4, expected an odd integer >= 1.*use 3 or 5"),
        (0, ValueError, r"is 0, expected an odd integer >= 1"),
        (-3, ValueError, r"is -3, expected an odd integer >= 1"),
        (3.0, TypeError, r"is 3\.0 \(float\), expected an odd int"),
        (True, TypeError, r"is True \(bool\)"),
    ],
)
def test_bad_windows(call, k, error, message):
    with pytest.raises(error, match=message):
        call(k)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: R.gaussian_filter(MAPS, 3, 0.0), ValueError, r"`sigma` is 0\.0, .*at least 0\.01"),
        (lambda: R.Gaussian(sigma=float("nan")), ValueError, r"`sigma` is nan"),
        (lambda: R.Gaussian(sigma="1"), TypeError, r"`sigma` is '1' \(str\), expected a number"),
        (lambda: R.AKD(k_base=0), ValueError, r"`k_base` is 0, .*above 0"),
        (lambda: R.AKD(k_base=float("inf")), ValueError, r"`k_base` is inf"),
        (lambda: R.AKD(k_min=13), ValueError, r"`k_min` is 13 and `k_max` is 11"),
        (lambda: R.DACG(high_std=-0.1), ValueError, r"`high_std` is -0\.1, .*at least 0"),
        (lambda: R.DACG(sigma=0), ValueError, r"`sigma` is 0"),
        (lambda: R.DACG(percentiles=(90, 75)), ValueError, r"\(90, 75\), expected 4 numbers"),
        (lambda: R.DACG(percentiles="9999"), ValueError, r"'9999', expected 4 numbers"),
        (
            lambda: R.DACG(percentiles=(90, 75, 80, 101)),
            ValueError,
            r"`percentiles\[3\]` is 101, .*at most 100",
        ),
        (lambda: R.dacg_branch(MAPS, low_mean=-1), ValueError, r"dacg_branch: `low_mean` is -1"),
        (lambda: R.CBA(gamma=1.5), ValueError, r"`gamma` is 1\.5, .*at most 1"),
        (lambda: R.CBA(weights=(1, 1, 1)), ValueError, r"\(1, 1, 1\), expected 4 numbers"),
        (lambda: R.CBA(weights=(1, 1, -1, 1)), ValueError, r"`weights\[2\]` is -1"),
        (lambda: R.SICD(omega_rep=-1), ValueError, r"`omega_rep` is -1"),
        (lambda: R.SICD(lambda_max=None), TypeError, r"`lambda_max` is None"),
        (lambda: R.SICD(revert_below=1.1), ValueError, r"`revert_below` is 1\.1"),
        (lambda: R.SICD(outlier_form="max"), ValueError, r"'max', expected 'mask'.* or 'excess'"),
        (lambda: R.sicd_gate(MAPS, gate_std=-1), ValueError, r"sicd_gate: `gate_std` is -1"),
        (lambda: R.RefineContext(steps=0), ValueError, r"`steps` is 0, expected an int >= 1"),
        (
            lambda: R.CBA(gamma=torch.tensor(0.5)),
            TypeError,
            r"`gamma` is tensor.*plain int or float",
        ),
        (lambda: R.RefineContext(steps=2.5), TypeError, r"`steps` is 2\.5 \(float\)"),
        (lambda: R.RefineContext(image_size=512), ValueError, r"`image_size` is 512, expected \("),
        (lambda: R.RefineContext(image_size=(512, 0)), ValueError, r"`image_size width` is 0"),
        (lambda: R.RefineContext(repeated_maps=MAPS - 1), ValueError, r"`repeated_maps`.*negative"),
        (
            lambda: R.adaptive_kernel_denoising(MAPS, steps=-1, image_size=(1, 1)),
            ValueError,
            r"`steps` is -1",
        ),
        (
            lambda: R.adaptive_kernel_size(MAPS, steps=1, image_size=(1, 2, 3)),
            ValueError,
            r"`image_size` is \(1, 2, 3\), expected \(height, width\)",
        ),
    ],
)
def test_bad_settings(call, error, message):
    with pytest.raises(error, match=message):
        call()


@pytest.mark.parametrize(
    ("repeated", "error", "message"),
    [
        ([[1.0]], TypeError, r"`repeated_maps` is a list"),
        (torch.ones(4), ValueError, r"`repeated_maps` has shape \(4,\)"),
        (-torch.ones(4, 4), ValueError, r"`repeated_maps` .*negative"),
        (torch.ones(3, 4, 4), ValueError, r"\(3, 4, 4\), which does not broadcast .*\(2, 4, 4\)"),
        (torch.ones(1, 2, 4, 4), ValueError, r"does not broadcast"),  # would add a dimension
        (torch.ones(4, 4, device="meta"), ValueError, r"is on meta and `maps` on cpu"),
    ],
)
def test_bad_repeated_maps(repeated, error, message):
    with pytest.raises(error, match=message):
        R.single_instance_causal_debiasing(MAPS, repeated)


@pytest.mark.parametrize("context", [None, R.RefineContext(), R.RefineContext(steps=3)])
def test_akd_says_what_its_context_lacks(context):
    missing = "image_size" if context is not None and context.steps else "steps"
    for refine in (R.AKD(), R.paper_refinements()):
        with pytest.raises(ValueError, match=rf"AKD needs `{missing}` .*RefineContext\(steps=32"):
            refine(MAPS, context)


def test_numpys_integers_count():
    context = R.RefineContext(steps=np.int64(40), image_size=np.array([600, 800]).shape * 2)
    assert R.AKD()(MAPS, context).shape == MAPS.shape


def test_messages_name_the_function_that_was_called():
    for name, caller in (
        ("akd", "adaptive_kernel_size"),
        ("dacg", "distribution_aware_confidence_gating"),
        ("paper", "Compose"),
    ):
        with pytest.raises(TypeError, match=f"^{caller}: "):
            FUNCTIONS[name](None)
    assert CONTEXT.steps == 40
