"""The objects, their records, the registry, sequences."""

import json
from dataclasses import FrozenInstanceError, dataclass

import pytest
import torch
from refine.shared import CONTEXT, context_of, random_maps

from captum_dcam import refine as R
from captum_dcam.refine.base import REFINEMENTS

NAMES = (
    "adaptive_median",
    "affinity",
    "akd",
    "cba",
    "dacg",
    "gaussian",
    "median",
    "min_max",
    "rank_gaussian",
    "sicd",
)
MAPS = R.min_max(torch.from_numpy(random_maps(60, 5, 10, 10)))


def test_the_registry_holds_them_all():
    assert R.registered_refinements() == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_records_are_json_and_build_an_equal_object(name):
    made = R.refinement(name)
    assert isinstance(made, R.Refinement)
    record = made.describe()
    assert record["name"] == name
    again = R.refinement(**json.loads(json.dumps(record)))
    assert again == made and hash(again) == hash(made)
    assert torch.equal(again(MAPS, context_of(MAPS)), made(MAPS, context_of(MAPS)))


@pytest.mark.parametrize("name", NAMES)
def test_objects_are_frozen(name):
    with pytest.raises((FrozenInstanceError, AttributeError, TypeError)):
        R.refinement(name).kernel_size = 5


def test_objects_hand_every_setting_on():
    repeated = torch.rand(10, 10, generator=torch.Generator().manual_seed(0))
    features = context_of(MAPS).features
    context = R.RefineContext(16, (384, 500), repeated, features)
    pairs = [
        (R.MinMax(), R.min_max(MAPS)),
        (
            R.Affinity(power=3, square=1.5, center=False),
            R.affinity_propagation([MAPS], [features], power=3, square=1.5, center=False)[0],
        ),
        (R.RankGaussian(5), R.rank_gaussian_filter(MAPS, 5)),
        (R.Median(5), R.median_filter(MAPS, 5)),
        (R.Gaussian(5, 0.7), R.gaussian_filter(MAPS, 5, 0.7)),
        (
            R.AKD(k_base=6, k_min=1, k_max=7),
            R.adaptive_kernel_denoising(
                MAPS, steps=16, image_size=(384, 500), k_base=6, k_min=1, k_max=7
            ),
        ),
    ]
    for module, function, settings in (
        (
            R.DACG,
            R.distribution_aware_confidence_gating,
            {
                "high_std": 0.1, "high_mean": 0.3, "low_mean": 0.2, "percentiles": [10, 20, 30, 40],
                "nonzero_only": False, "kernel_size": 5, "sigma": 1.0,
            },
        ),
        (
            R.CBA,
            R.contextual_background_attenuation,
            {"weights": [0.1, 0.2, 0.3, 0.4], "gamma": 0.2},
        ),
    ):  # fmt: skip
        pairs.append((module(**settings), function(MAPS, **settings)))
        assert module(**settings).describe() == {"name": module.name, **settings}
    settings = {
        "omega_rep": 1.0, "omega_out": 2.0, "lambda_max": 0.7, "outlier_form": "excess",
        "outlier_sigmas": 1.0, "gate": False, "gate_std": 0.1, "gate_skewness": 0.5,
        "revert_below": 0.5,
    }  # fmt: skip
    expected = R.single_instance_causal_debiasing(MAPS, repeated, **settings)
    pairs.append((R.SICD(**settings), expected))
    assert R.SICD(**settings).describe() == {"name": "sicd", **settings}
    for module, expected in pairs:
        assert torch.equal(module(MAPS, context), expected)
        assert not torch.equal(expected, MAPS) or module == R.MinMax()


def test_each_sicd_setting_matters():
    repeated = torch.rand(10, 10, generator=torch.Generator().manual_seed(0))
    default = R.SICD(gate=False, omega_rep=1.0, omega_out=1.0)
    context = R.RefineContext(repeated_maps=repeated)
    for changed in (
        {"omega_rep": 0.5}, {"omega_out": 0.5}, {"lambda_max": 0.1}, {"outlier_form": "excess"},
        {"outlier_sigmas": 1.0}, {"revert_below": 1.0}, {"gate": True, "gate_std": 9.0},
    ):  # fmt: skip
        settings = {**default.describe(), **changed}
        assert not torch.equal(R.refinement(**settings)(MAPS, context), default(MAPS, context))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (
            "akdd",
            r"^unknown refinement 'akdd'; did you mean 'akd'\? Known: adaptive_median, affinity",
        ),
        ("AKD", r"did you mean 'akd'"),
        ("rank_gausian", r"did you mean 'rank_gaussian'"),
        ("zzzz", r"^unknown refinement 'zzzz'. Known: adaptive_median, affinity, .*, sicd$"),
    ],
)
def test_unknown_names(name, message):
    with pytest.raises(ValueError, match=message):
        R.refinement(name)


def test_unknown_settings():
    with pytest.raises(TypeError, match=r"'akd' has no setting 'k'; it has k_base, k_min, k_max"):
        R.refinement("akd", k=3)
    with pytest.raises(TypeError, match=r"'min_max' has no setting 'x'; it has none"):
        R.refinement("min_max", x=3)


@pytest.fixture
def removed():
    yield
    REFINEMENTS.remove("double")


def test_own_refinements_join_and_names_are_not_taken_twice(removed):
    def define():
        @R.register_refinement("double")
        @dataclass(frozen=True)
        class Double(R.NamedRefinement):
            by: float = 2.0

            def __call__(self, maps, context=None):
                return maps * self.by

        return Double

    define()
    again = define()  # the same cell run again
    assert R.refinement("double", by=3.0) == again(3.0)
    assert R.Compose([R.refinement("double")]).describe() == {
        "name": "compose",
        "stages": [{"name": "double", "by": 2.0}],
    }
    with pytest.raises(
        ValueError, match=r"'double' belongs to .*Double already, so .*Triple was not"
    ):

        @R.register_refinement("double")
        class Triple(R.NamedRefinement):
            def __call__(self, maps, context=None):
                return maps * 3

    assert R.refinement("double") == again()


def test_compose_applies_in_order_and_nests():
    inner = R.Compose([R.CBA(), R.Median(5)])
    outer = R.Compose([R.MinMax(), inner])
    expected = R.median_filter(R.contextual_background_attenuation(R.min_max(MAPS)), 5)
    assert torch.equal(outer(MAPS), expected)
    assert len(outer) == 2 and list(outer)[1] is inner
    assert outer == R.Compose([R.MinMax(), R.Compose([R.CBA(), R.Median(5)])])
    assert outer != inner and hash(outer) != hash(inner)
    assert repr(outer).startswith("Compose([MinMax(), Compose([CBA(")
    assert isinstance(outer, R.Refinement)
    assert json.loads(json.dumps(outer.describe()))["stages"][1]["name"] == "compose"


def test_empty_compose_is_the_identity():
    assert torch.equal(R.Compose([])(MAPS), MAPS)


@pytest.mark.parametrize(
    ("stages", "message"),
    [
        ([R.MinMax(), R.min_max], r"stages\[1\] is <function min_max.*expected a refinement"),
        ([R.DACG], r"stages\[0\] is <class.*DACG\(\), not DACG"),
        (["dacg"], r"stages\[0\] is 'dacg'.*refinement\(\"dacg\"\)"),
        (R.DACG(), r"`stages` is one DACG, expected a sequence"),
    ],
)
def test_compose_refuses_what_is_no_refinement(stages, message):
    with pytest.raises(TypeError, match=message):
        R.Compose(stages)


def test_the_papers_sequence():
    record = R.paper_refinements().describe()
    assert [stage["name"] for stage in record["stages"]] == [
        "min_max", "akd", "dacg", "cba", "min_max", "sicd",
    ]  # fmt: skip
    maps = torch.from_numpy(random_maps(61, 4, 12, 12)) * 37
    step_by_step = R.min_max(maps)
    step_by_step = R.adaptive_kernel_denoising(step_by_step, steps=40, image_size=(600, 800))
    step_by_step = R.distribution_aware_confidence_gating(step_by_step)
    step_by_step = R.min_max(R.contextual_background_attenuation(step_by_step))
    step_by_step = R.single_instance_causal_debiasing(step_by_step)
    assert torch.equal(R.paper_refinements()(maps, CONTEXT), step_by_step)
