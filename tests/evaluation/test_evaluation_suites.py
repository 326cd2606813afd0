"""What suites measure: for any depth of model, on any data, without two plans in one folder."""

import pytest
from evaluation import made_results

from captum_dcam.errors import UnknownNameError
from captum_dcam.evaluation import Plan
from captum_dcam.evaluation.suites import (
    FINAL_STATE,
    MODULES,
    SUITES,
    SWEEPS,
    Setting,
    is_long,
    suite,
)
from captum_dcam.methods import METHODS, method_names
from captum_dcam.refine import paper_refinements


class Deep:
    blocks, deepest_block, recommended_block = range(32), 30, 10
    caches = ("none",)


@pytest.mark.parametrize("name", SUITES)
def test_parts_have_folders_of_their_own_and_plans_of_the_setting(name):
    setting = made_results.setting(seed=3, start=5)
    parts = suite(name, setting)
    assert len({p.name for p in parts}) == len(parts)
    for part in parts:
        assert part.plan.seed == 3 and part.plan.start == 5 and part.plan.limit <= 8
        assert Plan.from_record(part.plan.record()) == part.plan


def test_the_paper_layers_are_found_in_deep_models_and_all_in_shallow_ones():
    deep = Setting(Deep(), "m", {"name": "coco"})
    assert deep.layers == (10, 20, 25, 29)
    assert made_results.setting().layers == (0, 1, 2, 3, 4)
    names = [v.name for v in suite("objects", deep)[0].plan.variants]
    assert "paper/full@29" in names and "paper/full@10" not in names  # 10 is the recommended one
    assert [p.name for p in suite("feasibility", deep)] == ["feasibility-full"]


def test_modules_share_one_run_and_stand_in_the_paper_order():
    plan = suite("objects", made_results.setting())[0].plan
    shared = [[v.name for v in own] for _, own in plan.runs()]
    own = next(names for names in shared if "paper/base" in names)
    assert {f"paper/{m}" for m in MODULES} < set(own)
    assert sum(n.startswith("paper/dacg:") for n in own) == 4 * len(SWEEPS) + 3
    full = next(v for v in plan.variants if v.name == "paper/full")
    assert [r["name"] for r in full.refinements] == [
        s.describe()["name"] for s in paper_refinements()
    ]


def test_every_method_is_tested_for_faithfulness_and_sanity_once():
    for name in ("faithfulness", "sanity"):
        parts = {p.name: p for p in suite(name, made_results.setting())}
        quick = {v.method for v in parts[name].plan.variants}
        long = {v.method for v in parts[f"{name}-long"].plan.variants}
        methods = {m for m in quick | long if m in METHODS}
        assert methods == set(method_names()) - {"tam_over", "eagle", "igos_pp"}
        assert not any(is_long(m) for m in quick if m in METHODS)
        assert (quick & long) - {"oracle", "random", "center_blob", "diffusion_cam"} == set()
    assert set(METHODS) > FINAL_STATE


def test_expensive_parts_take_fewer_images():
    setting = made_results.setting(limit=500)
    limits = {p.name: p.plan.limit for p in suite("all", setting)}
    assert limits["objects"] == limits["plausibility"] == 500
    assert limits["faithfulness-long"] < limits["faithfulness"] < 500


def test_unknown_suite():
    with pytest.raises(UnknownNameError, match="did you mean 'papers'"):
        suite("paper", made_results.setting())
