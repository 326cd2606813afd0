"""Plans: one canonical form, complete settings, errors before any work."""

import json

import pytest

from captum_dcam.errors import DcamError, UnknownNameError
from captum_dcam.evaluation import Plan, Variant
from captum_dcam.evaluation.store import differences
from captum_dcam.files import canonical
from captum_dcam.methods import method
from captum_dcam.refine import AKD, Compose, MinMax, paper_refinements


def test_ways_of_writing_a_plan_are_equal():
    short = Plan(("tam", "oracle"), dataset="scenes", metrics=("localization",))
    long = Plan(
        (Variant("tam", "tam", {"eci": True}), {"name": "oracle"}),
        dataset={"name": "scenes"},
        metrics=({"name": "localization"},),
    )
    assert short == long and short.digest == long.digest and hash(short) == hash(long)
    assert Plan.from_record(json.loads(short.json())) == short
    assert short.variants[0].settings["eci"] is True  # defaults are written out
    assert short.digest != Plan(("tam", "oracle"), seed=1).digest


def test_settings_that_are_tuples_survive_json():
    one = Variant("msea", settings={"scales": (0.5, 1.0)})
    assert one.settings["scales"] == [0.5, 1.0]
    assert one.build().scales == (0.5, 1.0)
    assert Variant(**json.loads(canonical(one.record()))) == one


def test_refinements_may_be_names_records_objects_and_sequences():
    written = Variant("a", "tam", refinements=("min_max", {"name": "akd"}))
    built = Variant("a", "tam", refinements=[Compose([MinMax(), AKD()])])
    assert written == built and written.stages() == [MinMax(), AKD()]
    assert Variant("b", "tam", refinements=paper_refinements()).stages() == list(
        paper_refinements()
    )


def test_methods_with_settings_become_variants():
    plan = Plan((method("tam"), method("tam", eci=False, filter=5), method("attention")))
    assert [v.name for v in plan.variants] == ["tam", "tam:eci=false,filter=5", "attention"]
    assert plan.variants[1].build() == method("tam", eci=False, filter=5)


def test_variants_that_share_a_run_are_grouped():
    plan = Plan(
        (
            Variant("a", "tam"),
            Variant("b", "tam", refinements=("min_max",)),
            Variant("c", "tam", {"eci": False}),
            Variant("d", "tam", layer=1),
            Variant("e", "tam", score="final"),
            "oracle",
        )
    )
    assert [[v.name for v in own] for _, own in plan.runs()] == [["a", "b"], ["c"], ["d"], ["e"]]


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"variants": ()}, ValueError, "no variants"),
        ({"variants": ("tem",)}, UnknownNameError, "did you mean 'tam'"),
        ({"variants": ("tam", "tam")}, ValueError, "'tam' is in the plan twice"),
        ({"variants": ({"name": "tam", "layr": 1},)}, UnknownNameError, "did you mean"),
        ({"variants": ({"name": "tam", "settings": {"k": 1}},)}, TypeError, "no setting 'k'"),
        (
            {"variants": ({"name": "random", "settings": {"k": 1}},)},
            TypeError,
            "floor 'random' has no setting 'k'; it has none",
        ),
        ({"variants": ({"name": "tam", "score": "comit"},)}, ValueError, "'commit'"),
        ({"variants": ({"name": "tam", "layer": "1"},)}, ValueError, "expected an integer"),
        ({"variants": ({"name": "tam", "passes": 0},)}, ValueError, "at least 1"),
        (
            {"variants": ({"name": "tam", "refinements": ["akt"]},)},
            ValueError,
            "did you mean 'akd'",
        ),
        ({"metrics": ("localisation",)}, UnknownNameError, "did you mean 'localization'"),
        ({"metrics": ({"name": "pointing", "far": 1},)}, TypeError, "it has tolerance"),
        ({"metrics": ("pointing", "pointing")}, ValueError, "'pointing' is in the plan twice"),
        ({"words": ("nouns",)}, UnknownNameError, "did you mean 'noun'"),
        ({"words": ()}, ValueError, "no kinds of words"),
        ({"dtype": "float8"}, UnknownNameError, "float"),
        ({"cache": "cached"}, UnknownNameError, "prefix"),
        ({"start": -1}, ValueError, "start is -1"),
        ({"limit": 0}, ValueError, "limit is 0"),
        ({"dataset": {"split": "val"}}, ValueError, "a record with 'name'"),
        ({"answer": "captions"}, UnknownNameError, "did you mean 'caption'"),
    ],
)
def test_bad_plans_are_refused(changes, error, message):
    with pytest.raises(error, match=message):
        Plan(**{"variants": ("tam",), **changes})


def test_a_record_with_unknown_or_missing_keys_is_refused():
    with pytest.raises(UnknownNameError, match="did you mean 'seed'"):
        Plan.from_record({"variants": ["tam"], "sed": 1})
    with pytest.raises(ValueError, match="no 'variants'"):
        Plan.from_record({"seed": 1})


def test_one_metric_may_come_twice_with_labels():
    plan = Plan(
        ("tam",), metrics=("pointing", {"name": "pointing", "tolerance": 3, "label": "near"})
    )
    assert [m["label"] for m in plan.metrics] == ["", "near"]


def test_differences_name_what_differs():
    one = Plan(("tam", "random"), seed=0).record()
    two = Plan(("random", Variant("tam", settings={"filter": 5}), "oracle"), seed=1).record()
    assert list(differences(one, one, "plan")) == []
    assert list(differences(one, two, "plan")) == [
        "plan.seed is 0 there and 1 here",
        "plan.variants.oracle is here only",
        "plan.variants.tam.settings.filter is 3 there and 5 here",
    ]


@pytest.mark.parametrize(
    "metric",
    [
        {"name": "faithfulness", "baseline": "blurr"},
        {"name": "faithfulness", "fractions": (0.5, 0.1)},
        {"name": "faithfulness", "kinds": ("verb",)},
        {"name": "infidelity", "samples": 0},
        {"name": "arcc", "baseline": "black"},
        {"name": "sensitivity", "radius": -1.0},
        {"name": "pointing", "tolerance": -1.0},
    ],
    ids=str,
)
def test_values_of_metric_settings_are_checked_before_any_work(metric):
    with pytest.raises((ValueError, UnknownNameError), match=r"expected|did you mean|Known"):
        Plan(("oracle",), metrics=(metric,))


@pytest.mark.parametrize(
    "changes", [{"limit": 2.5}, {"start": 1.5}, {"threads": 1.5}, {"seed": 0.5}, {"start": "1"}]
)
def test_counts_are_whole_numbers(changes):
    with pytest.raises(ValueError, match="expected an integer"):
        Plan(("oracle",), **changes)
    with pytest.raises(ValueError, match="expected an integer"):
        Variant("tam", passes=2.5)


def test_a_variant_needs_a_name_or_a_method():
    with pytest.raises(ValueError, match="neither a name nor a method"):
        Plan.from_record({"variants": [{"layer": 1}]})
    assert Plan.from_record({"variants": [{"method": "tam"}]}).variants[0].name == "tam"


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"variants": 5}, "the plan's variants is 5, a int: expected a list"),
        ({"variants": [5]}, "a variant is 5, a int: expected a method's name"),
        ({"variants": [{"name": "tam", "settings": 3}]}, "'tam': settings is 3, a int: expected a"),
        ({"variants": [{"name": "tam", "refinements": 3}]}, "'tam': refinements is 3"),
        ({"variants": [{"name": "tam", "refinements": [3]}]}, "a refinement is 3, a int"),
        (
            {"variants": [{"name": "tam", "settings": {"filter": "x"}}]},
            "filter is 'x'",
        ),
        ({"dataset": 3}, "the plan's dataset is 3, a int: expected a name"),
        ({"metrics": 4}, "the plan's metrics is 4"),
        ({"metrics": [4]}, "metric 4 is a int: expected a name, or a record"),
        ({"words": 4}, "the plan's words is 4"),
        ({"generation": 4}, "the plan's generation is 4, a int: expected a record"),
        ({"answer": 4}, "the plan's answer is 4"),
        ({"load": [1]}, "the plan's load is "),
        ({"model": 4}, "the plan's model is 4"),
        ({"prompt": 4}, "the plan's prompt is 4"),
    ],
)
def test_a_plan_of_another_shape_says_what_is_expected(changes, message):
    with pytest.raises(DcamError) as caught:
        Plan.from_record({"variants": ["tam"], **changes})
    assert message in str(caught.value)
