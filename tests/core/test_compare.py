"""compare(): rows, failures, budgets, masks, post-transforms, seeds."""

import pytest
import tiny
import torch
from methods import made

from captum_dcam.comparing import compare, compare_generation
from captum_dcam.errors import MethodError, TargetError, UnknownNameError
from captum_dcam.methods import Budget, method
from captum_dcam.metrics import localization
from captum_dcam.refine import SICD, MinMax, RankGaussian, min_max

OURS = ("diffusion_cam", "diffusion_cam_base")


def run(cache="prefix", methods=OURS, words=((0, 9), (3, 12)), **settings):
    forward = tiny.bound(cache)
    return compare_generation(forward, words, methods, **settings)


@pytest.mark.parametrize("cache", tiny.CACHES)
def test_rows_hold_what_the_methods_alone_give(cache):
    forward = tiny.bound(cache)
    found = compare_generation(forward, list(tiny.pairs(forward, 0)), OURS)
    assert [r.name for r in found.rows] == list(OURS)
    for row in found.rows:
        assert row.status == "done" and row.maps[0].shape == (1, 8, 8)
        assert bool((row.maps[0] >= 0).all()) and torch.equal(row.maps[0], row.raw[0].relu())
        assert row.cost.forwards and row.cost.backwards


def test_compare_generates_and_names_what_it_does():
    said = []
    found = compare(
        tiny.adapter("none"),
        tiny.picture(),
        tiny.PROMPT,
        [0],
        OURS,
        gen_length=4,
        progress=said.append,
    )
    assert said == ["generation", *OURS]
    assert found.settings["family"] == "mini" and found.settings["regime"] == "full"
    assert len(found.commit_steps) == 1 and len(found.tokens) == 4 + 4


def test_a_failing_method_says_why_and_the_rest_goes_on():
    with made.registered("made"):
        found = run(methods=["diffusion_cam", method("made", fails="no such thing"), "made"])
    assert [r.status for r in found.rows] == ["done", "failed", "done"]
    assert found.rows[1].note == "ValueError: no such thing"
    assert found.rows[2].name == "made#2"
    assert not bool(found.rows[1].maps[0].any()) and found.rows[1].complete == (False, False)


def test_errors_can_be_raised():
    with made.registered("made"), pytest.raises(ValueError, match="no such thing"):
        run(methods=[method("made", fails="no such thing")], errors="raise")
    with pytest.raises(ValueError, match="expected 'report' or 'raise'"):
        run(errors="ignore")


def test_budget_marks_partial_rows():
    with made.registered("made"):
        found = run(methods=["made", "diffusion_cam"], budget={"made": Budget(passes=1)})
    assert [r.status for r in found.rows] == ["partial", "done"]
    assert found.rows[0].complete == (True, False) and "exhausted" in found.rows[0].note


def test_a_spent_budget_without_any_map_is_partial_too():
    with made.registered("made"):
        found = run(methods=["made"], budget=Budget(seconds=1e-9))
    assert found.rows[0].status == "partial" and not any(found.rows[0].complete)


@pytest.mark.parametrize("kind", ["mapping", "sequence", "function"])
def test_masks_give_the_scores_of_the_metric(kind):
    mask = torch.zeros(60, 80, dtype=torch.bool)
    mask[20:40, 10:30] = True
    forward = tiny.bound("prefix")
    targets = [tiny.pair(forward, 0), tiny.pair(forward, 3)]
    first = compare_generation(forward, targets, OURS).targets[0]
    masks = {
        "mapping": {first.text: mask.numpy()},
        "sequence": [mask, None],
        "function": lambda t: mask if t.positions == first.positions else None,
    }[kind]
    found = compare_generation(forward, targets, OURS, masks=masks)
    for row in found.rows:
        if kind != "mapping":
            assert row.scores[1] is None
        expected = localization(found.pixel_maps(row.name)[0], mask)
        assert float(row.scores[0].f3) == float(expected.f3)
    record = found.records()[0]
    assert record["f3"] == pytest.approx(found.rows[0].mean("f3"), abs=1) and record["seconds"] > 0


def test_a_mask_of_another_size_is_refused():
    with pytest.raises(ValueError, match=r"\(3, 3\): expected \(60, 80\)"):
        run(masks=[torch.ones(3, 3), None])
    with pytest.raises(ValueError, match="1 masks for 2 words"):
        run(masks=[None])


def test_post_transforms_apply_to_every_method():
    plain, filtered = run(), run(refinements=[RankGaussian(3), MinMax()])
    for before, after in zip(plain.rows, filtered.rows, strict=True):
        expected = MinMax()(RankGaussian(3)(before.maps[0]))
        assert torch.equal(after.maps[0], expected) and torch.equal(after.raw[0], before.raw[0])
    assert [r["name"] for r in filtered.settings["refinements"]["stages"]] == [
        "rank_gaussian",
        "min_max",
    ]


def test_sicd_gets_the_methods_own_maps_of_repeated_words(monkeypatch):
    forward = tiny.bound("prefix")
    repeated = made.targets(forward, (2, 5))
    monkeypatch.setattr("captum_dcam.maps.repeated_function_words", lambda _words: repeated)
    seen = []

    class Spy(SICD):
        def __call__(self, maps, context=None):
            seen.append(context.repeated_maps)
            return super().__call__(maps, context)

    found = compare_generation(
        forward, [tiny.pair(forward, 0)], ["diffusion_cam_base"], refinements=[MinMax(), Spy()]
    )
    own = compare_generation(forward, list(repeated), ["diffusion_cam_base"]).rows[0].maps[0]
    assert torch.equal(seen[0], min_max(own.mean(0)))
    assert found.rows[0].maps[0].shape == (1, 8, 8)


def test_a_method_draws_the_same_whatever_runs_beside_it():
    with made.registered("made"):
        alone = run(methods=["made"], seed=3)
        beside = run(methods=["diffusion_cam", "made"], seed=3)
    assert torch.equal(alone.row("made").maps[0], beside.row("made").maps[0])


def test_bad_input_is_refused_before_any_work():
    class Nothing:
        def prepare(self, *_):
            raise AssertionError("work was begun")

    with pytest.raises(UnknownNameError, match="did you mean 'diffusion_cam"):
        compare(Nothing(), tiny.picture(), "", None, ["difusion_cam"])
    with pytest.raises(TypeError, match="expected a name or a Method"):
        compare(Nothing(), tiny.picture(), "", None, [3])
    with pytest.raises(ValueError, match="no methods"):
        compare(Nothing(), tiny.picture(), "", None, [])
    with pytest.raises(TargetError, match="token index 99"):
        run(words=[99])
    with pytest.raises(UnknownNameError, match="no method 'tam' here"):
        run().row("tam")
    assert issubclass(MethodError, ValueError)
