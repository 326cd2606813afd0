"""compare(): every cell by the method itself, failures, budgets, masks, refinements, seeds."""

import functools
from dataclasses import dataclass, replace
from typing import ClassVar

import awkward
import pytest
import tiny
import torch
from core.test_comparison_files import same
from methods import made

from captum_dcam import explain_generation
from captum_dcam.comparing import QUICK, compare, compare_generation, generator_of, run_method
from captum_dcam.errors import InputError, MethodError, TargetError, UnknownNameError
from captum_dcam.methods import (
    Attribution,
    AttributionTask,
    Budget,
    Cost,
    Method,
    MethodFacts,
    metered,
    method,
    method_names,
)
from captum_dcam.metrics import localization
from captum_dcam.model.forward import DenoisingForward
from captum_dcam.model.weights import fingerprint
from captum_dcam.refine import AKD, SICD, Affinity, MinMax, RankGaussian, RefineContext, min_max

OURS = ("diffusion_cam", "diffusion_cam_base")
#: two with a score of their own, three that read the comparison's, one that draws, one with text
METHODS_ = (
    "diffusion_cam_base",
    method("diffusion_cam_base", score="task", product="positionwise", refined=False),
    "logit_lens",
    method("tam", order="position", filter=0),
    method("llava_cam", samples=2),
    method("llava_cam", samples=2, std=0.05),
)
NAMES = (
    "diffusion_cam_base",
    "diffusion_cam_base#2",
    "logit_lens",
    "tam",
    "llava_cam",
    "llava_cam#2",
)
#: of example 1: a word that occurs twice, one of two tokens, a pair with another token
WORDS = ["the", "moons", (9, 20)]


def run(cache="prefix", methods=OURS, words=((0, 9), (3, 12)), **settings):
    return compare_generation(bound(cache), words, methods, **settings)


bound = functools.cache(tiny.bound)


def task_of(found, name, cache="prefix", *, example=1, layer=awkward.LAYER, score, seed):
    """What the row ``name`` was asked, on the example alone: prepared and generated without the
    batch."""
    forward = awkward.alone("mini", cache, example, layer)
    return AttributionTask(forward, found.targets, score, generator_of(seed, name))


# -- every cell ------------------------------------------------------------------------------------


@pytest.mark.parametrize("cache", tiny.CACHES)
def test_every_cell_is_the_method_called_directly_on_the_example_alone(cache):
    forward = awkward.bound("mini", cache, layer=2)
    found = compare_generation(forward, WORDS, METHODS_, example=1, score="teacher", seed=5)
    assert found.words[:3] == ("the", "the", "moons") and found.targets[3].token_ids == (20,)
    assert tuple(r.name for r in found.rows) == NAMES
    for row, chosen in zip(found.rows, METHODS_, strict=True):
        chosen = method(chosen) if isinstance(chosen, str) else chosen
        task = task_of(found, row.name, cache, layer=2, score="teacher", seed=5)
        expected = chosen.attribute(task)
        assert [m.shape for m in row.raw] == [(4, 5, 6), (4, 3, 8)]
        for raw, shown, own in zip(row.raw, row.maps, expected.maps, strict=True):
            assert tiny.relative(raw, own) < 1e-3, row.name
            assert torch.equal(shown, raw.relu())
        assert (row.text is None) == (expected.text is None)
        if row.text is not None:
            assert torch.allclose(row.text, expected.text, atol=1e-4, equal_nan=True)
        assert row.settings == chosen.describe()
        assert (row.label, row.group) == (chosen.facts.label, chosen.facts.group)
        assert row.status == "done" and row.complete == (True,) * 4 and row.note == ""
    every = [torch.cat([m.flatten(1) for m in r.raw], 1) for r in found.rows]
    cells = [cell for row in every for cell in row]
    same_cell = [
        (i, j) for i in range(len(cells)) for j in range(i) if torch.allclose(cells[i], cells[j])
    ]
    # in the visible state both occurrences have one map in methods that read image tokens alone
    assert all(i // 4 == j // 4 and {i % 4, j % 4} == {0, 1} for i, j in same_cell)


def test_what_is_said_of_the_example_is_the_examples():
    forward = awkward.bound("mini", "none")
    found = compare_generation(forward, WORDS, ["logit_lens"], example=1, score="final", seed=3)
    alone = awkward.alone("mini", "none", 1)
    steps = alone.trajectory.commit_step[0].tolist()
    assert found.prompt == awkward.PROMPTS["mini"][1]
    assert found.answer == "of the moons of the five rings ."
    assert [t.positions for t in found.targets] == [(1,), (7,), (2, 3), (9,)]
    assert found.commit_steps == ((steps[1],), (steps[7],), (steps[2], steps[3]), (steps[9],))
    assert found.images == tuple(awkward.pictures("mini", 1))
    assert found.layout.shapes == ((5, 6), (3, 8))
    ids = (
        alone.adapter.prompt_tokens(alone.request)[1].tolist() + alone.trajectory.tokens[0].tolist()
    )
    assert found.tokens.ids.tolist() == ids and found.tokens.prompt == len(ids) - 12
    assert found.settings == {
        "family": "mini",
        "model": None,
        "revision": None,
        "weights": fingerprint(forward.adapter.model),
        "tagger": "phrases",
        "foil": None,
        "backward": "exact",
        "regime": "full",
        "steps": 12,
        "generation": {},
        "layer": awkward.LAYER,
        "score": "final",
        "refinements": {"name": "compose", "stages": []},
        "seed": 3,
        "dtype": "torch.float32",
    }
    assert found.masks is None and found.rows[0].scores is None
    assert compare_generation(forward, [0], ["logit_lens"]).prompt == awkward.PROMPTS["mini"][0]


def test_compare_hands_everything_on():
    """As by hand, with nothing at its default: block, score, words, methods, refinements, masks,
    budgets, seed of the decoding and of the methods, the family's settings."""
    adapter, picture = tiny.adapter("none"), tiny.picture(5)
    mask = torch.zeros(60, 80, dtype=torch.bool)
    mask[20:40, 10:30] = True
    chosen = ["diffusion_cam", method("llava_cam", samples=2), "saliency"]
    given = dict(
        score="teacher",
        refinements=[RankGaussian(3), MinMax()],
        masks=[mask, None],
        budget={"saliency": Budget(passes=1)},
        seed=4,
    )
    decoding = dict(gen_length=6, steps=3, block_length=6, temperature=1.5)
    forward = DenoisingForward(adapter, 2)
    generator = torch.Generator().manual_seed(4)
    request = adapter.prepare([[picture]], ["what is a circle ?"])
    forward.generate(request, generator=generator, **decoding)
    expected = compare_generation(forward, [5, 2], chosen, **given)
    found = compare(
        adapter, picture, "what is a circle ?", [5, 2], chosen, layer=2, **given, **decoding
    )
    assert [r.status for r in found.rows] == ["done", "done", "partial"]
    same(timeless(found), timeless(expected))
    assert found.settings["generation"]["temperature"] == 1.5 and found.settings["layer"] == 2
    sampled = compare(
        adapter, picture, "what is a circle ?", [5, 2], ["logit_lens"], layer=2, seed=5, **decoding
    )
    assert sampled.tokens.ids.tolist() != found.tokens.ids.tolist()


def timeless(comparison):
    """Without seconds and bytes, which no run repeats."""
    rows = [
        replace(r, cost=Cost(r.cost.forwards, r.cost.backwards), note=r.note)
        for r in comparison.rows
    ]
    return replace(comparison, rows=tuple(rows))


def test_compare_names_what_it_does():
    said = []
    found = compare(
        tiny.adapter("none"),
        (tiny.picture(), tiny.picture(1)),
        tiny.PROMPT,
        [0],
        OURS,
        gen_length=4,
        progress=said.append,
    )
    assert said == ["generation", *OURS]
    assert len(found.images) == 2 and found.layout.shapes == ((8, 8), (8, 8))
    assert found.settings["family"] == "mini" and found.settings["regime"] == "full"
    assert len(found.commit_steps) == 1 and len(found.tokens) == 4 + 4


def test_names_stand_for_sets_of_methods(monkeypatch):
    from captum_dcam.comparing import chosen_methods

    assert [m.name for m in chosen_methods(None)] == list(QUICK)
    assert [m.name for m in chosen_methods("all")] == list(method_names())
    assert [m.name for m in chosen_methods("tam")] == ["tam"]
    asked = [method("tam", eci=False), "attention", "tam"]
    assert chosen_methods(asked) == (asked[0], method("attention"), method("tam"))


def test_a_method_draws_the_same_whatever_runs_beside_it_and_other_numbers_by_seed_and_name():
    noisy = method("llava_cam", samples=1)
    alone = run(methods=[noisy], seed=3).rows[0].raw[0]
    beside = run(methods=["diffusion_cam", noisy, noisy], seed=3)
    assert torch.equal(beside.row("llava_cam").raw[0], alone)
    assert not torch.allclose(beside.row("llava_cam#2").raw[0], alone)
    assert not torch.allclose(run(methods=[noisy], seed=4).rows[0].raw[0], alone)


# -- what goes wrong -------------------------------------------------------------------------------


def test_a_failing_method_says_why_in_its_row_and_the_rest_goes_on():
    with made.registered("made"):
        found = run(methods=["diffusion_cam", method("made", fails="no such thing"), "made"])
    assert [r.status for r in found.rows] == ["done", "failed", "done"]
    assert [r.note for r in found.rows] == ["", "ValueError: no such thing", ""]
    assert [r.name for r in found.rows] == ["diffusion_cam", "made", "made#2"]
    assert not bool(found.rows[1].maps[0].any()) and found.rows[1].complete == (False, False)
    assert found.rows[0].maps[0].any() and found.rows[2].raw[0].any()


def test_what_a_method_refuses_beforehand_is_a_failure_too():
    found = run(methods=[method("logit_lens", block=9), "logit_lens"])
    assert [r.status for r in found.rows] == ["failed", "done"]
    assert "block 9 is not in the model" in found.rows[0].note and found.rows[0].cost == Cost()


def test_errors_can_be_raised():
    with made.registered("made"):
        failing = [method("made", fails="no such thing")]
        with pytest.raises(ValueError, match="no such thing"):
            run(methods=failing, errors="raise")
        with pytest.raises(ValueError, match="no such thing"):
            compare(
                tiny.adapter("none"),
                tiny.picture(),
                tiny.PROMPT,
                [0],
                failing,
                errors="raise",
                gen_length=2,
            )
    with pytest.raises(ValueError, match=r"expected one of .*'report', 'raise'"):
        run(errors="ignore")


@dataclass(frozen=True)
class Odd(Method):
    """Ones, but for one value of one grid."""

    value: float = float("nan")
    grid: int = 1
    word: int = 0

    name: ClassVar[str] = "odd"
    facts: ClassVar[MethodFacts] = MethodFacts("Odd", "gradient", "this test", "1")

    def attribute(self, task):
        task.forward(task.pixels, *task.arguments(0))
        maps = tuple(m + 1 for m in task.empty())
        maps[self.grid][self.word, -1, -1] = self.value
        return Attribution(maps, torch.ones(len(task.targets), dtype=torch.bool))


@pytest.mark.parametrize("value", (float("nan"), float("inf"), -float("inf")))
@pytest.mark.parametrize(("grid", "word"), ((0, 0), (1, 2)))
def test_maps_that_are_no_numbers_are_a_failure(value, grid, word):
    forward = awkward.bound()
    odd = Odd(value, grid, word)
    found = compare_generation(forward, [0, 1, 2], [odd, Odd(2.0)], refinements=[MinMax()])
    assert [r.status for r in found.rows] == ["failed", "done"]
    broken, whole = found.rows
    assert broken.note == "MethodError: its maps hold values that are not finite"
    assert broken.complete == (False,) * 3 and broken.cost.forwards == 1
    assert not any(bool(m.any()) for m in (*broken.maps, *broken.raw))
    assert whole.complete == (True,) * 3
    with pytest.raises(MethodError, match="not finite"):
        compare_generation(forward, [0, 1, 2], [odd], errors="raise")


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


# -- costs and budgets -----------------------------------------------------------------------------


@pytest.mark.parametrize("cache", tiny.CACHES)
def test_every_row_has_its_own_methods_cost(cache):
    """As if it ran alone: nothing that an earlier row has computed is used, nothing is added up."""
    chosen = ("diffusion_cam", "logit_lens", "diffusion_cam", method("llava_cam", samples=2))
    forward = awkward.bound("mini", cache)
    found = compare_generation(forward, WORDS, chosen, example=1)
    for row, one in zip(found.rows, chosen, strict=True):
        alone = awkward.alone("mini", cache, 1)
        fresh = alone.again(trajectory=replace(alone.trajectory, kept={}))
        with metered(fresh) as cost:
            (method(one) if isinstance(one, str) else one).attribute(
                AttributionTask(fresh, found.targets)
            )
        assert (row.cost.forwards, row.cost.backwards) == (cost.forwards, cost.backwards), row.name
        assert row.cost.seconds > 0
    assert found.rows[0].cost.backwards > 0 == found.rows[1].cost.backwards


def test_budgets_are_found_by_the_rows_name_then_by_the_methods():
    with made.registered("made", text=True):
        given = {"made": Budget(passes=1), "made#3": Budget(passes=2), "odd": Budget(passes=1)}
        found = run(
            methods=["made", "made", "made", "diffusion_cam"], words=[0, 1, 2], budget=given
        )
        assert [r.complete for r in found.rows] == [
            (True, False, False),
            (True, False, False),
            (True, True, False),
            (True, True, True),
        ]
        assert [r.cost.forwards for r in found.rows[:3]] == [1, 1, 2]
        for_all = run(methods=["made", "saliency"], words=[0, 1], budget=Budget(passes=1))
        assert [r.status for r in for_all.rows] == ["partial", "partial"]
        free = run(methods=["made", "diffusion_cam"], words=[0, 1], budget={"odd": Budget(1)})
    assert [r.status for r in free.rows] == ["done", "done"]
    assert found.rows[0].status == "partial" and "1 forward passes exhausted" in found.rows[0].note


def test_a_map_that_a_budget_cut_off_is_marked_and_has_no_score():
    mask = torch.zeros(60, 80, dtype=torch.bool)
    mask[20:40, 10:30] = True
    with made.registered("made"):
        found = run(
            methods=["made", "diffusion_cam"],
            words=[3, 5],
            budget={"made": Budget(passes=1)},
            masks=[mask, mask],
            refinements=[MinMax()],
        )
        (whole,) = run(methods=["made"], words=[3], masks=[mask], refinements=[MinMax()]).rows
    cut = found.rows[0]
    assert cut.status == "partial" and cut.complete == (True, False)
    assert cut.scores[0] is not None and cut.scores[1] is None
    assert cut.mean("f3") == whole.mean("f3")  # not lowered by a map of zeros
    assert [r["f3"] is None for r in found.records()] == [False, True, False, False]
    assert [r["complete"] for r in found.records()] == [True, False, True, True]


def test_an_estimate_is_kept_and_marked():
    forward = bound("prefix")
    task = AttributionTask(forward, made.targets(forward, (0, 3)), "commit", generator_of(0, "x"))
    cut = run_method(method("llava_cam", samples=4), task, Budget(passes=3))
    assert cut.status == "partial" and cut.complete == (False, False)
    assert cut.found.maps[0].any() and "estimates from" in cut.note
    noisy = method("llava_cam", samples=4)
    (row,) = compare_generation(
        awkward.bound(), None, [noisy], refinements=CHAIN, budget=Budget(passes=3)
    ).rows
    assert any(m.any() for m in row.maps)
    for i, maps in enumerate(row.raw):  # and what is subtracted from it is no estimate
        expected = maps.relu()
        for stage in CHAIN:
            expected = stage(expected, RefineContext(12, (60, 80)))
        assert torch.equal(row.maps[i], expected)


def test_a_spent_budget_without_any_map_is_partial_too():
    with made.registered("made"):
        found = run(methods=["made"], budget=Budget(seconds=1e-9))
    assert found.rows[0].status == "partial" and not any(found.rows[0].complete)
    assert "seconds exhausted" in found.rows[0].note


# -- masks -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["mapping", "sequence", "function"])
def test_masks_give_the_scores_of_the_metric(kind):
    """Each word by its own mask; a word that occurs twice has one in a mapping."""
    one, two = torch.zeros(2, 60, 80, dtype=torch.bool)
    one[20:40, 10:30], two[5:15, 40:75] = True, True
    forward = awkward.bound()
    names = ["a", "stars", "hearts"]
    expected = {"mapping": (one, one, None, two), "sequence": (None, one, two, None)}
    expected["function"] = (None, two, one, None)
    given = {
        "mapping": {"a": one.numpy(), "hearts": two, "red": two, "stars": torch.zeros(60, 80)},
        "sequence": expected["sequence"],
        "function": lambda t: {4: two, 5: one}.get(t.positions[0]),
    }[kind]
    found = compare_generation(forward, names, ("attention", "logit_lens"), masks=given)
    for mask, wanted in zip(found.masks, expected[kind], strict=True):
        assert (mask is None) == (wanted is None) and (mask is None or torch.equal(mask, wanted))
    for r, row in enumerate(found.rows):
        pixels = found.layout.grids[0].to_pixels(row.maps[0])
        assert torch.equal(found.pixel_maps(row.name), pixels)
        for n, mask in enumerate(expected[kind]):
            record = found.records()[4 * r + n]
            assert (record["method"], record["word"]) == (row.name, found.words[n])
            assert (row.scores[n] is None) == (mask is None) == (record["f3"] is None)
            if mask is not None:
                own = localization(pixels[n], mask)
                assert float(row.scores[n].f3) == float(own.f3) == record["f3"]
                assert record["obj_iou"] == float(own.obj_iou)
    means = [row.mean("f3") for row in found.rows]
    scores = [[r["f3"] for r in found.records()[4 * i : 4 * i + 4]] for i in range(2)]
    for mean, own in zip(means, scores, strict=True):
        known = [s for s in own if s is not None]
        assert mean == pytest.approx(sum(known) / len(known), rel=1e-6)
    assert means[0] != means[1]


def test_pixels_of_the_second_grid_are_the_second_grids():
    found = compare_generation(awkward.bound(), ["stars"], ["attention"])
    (row,) = found.rows
    expected = found.layout.grids[1].to_pixels(row.maps[1], "nearest")
    assert torch.equal(found.pixel_maps("attention", 1, "nearest"), expected)
    assert found.records()[0]["peak"] == max(float(m.max()) for m in row.raw)


def test_a_mask_of_another_size_is_refused():
    with pytest.raises(ValueError, match=r"\(3, 3\): expected \(60, 80\)"):
        run(masks=[torch.ones(3, 3), None])
    with pytest.raises(ValueError, match="1 masks for 2 words"):
        run(masks=[None])


# -- refinements -----------------------------------------------------------------------------------

CHAIN = (MinMax(), AKD(), SICD(omega_rep=1.0, lambda_max=1.0, gate=False))


@pytest.mark.parametrize(
    ("example", "words"), ((0, ["stars", "hearts"]), (0, None), (1, ["moons"]), (1, None)), ids=str
)
def test_every_method_is_refined_by_its_own_maps_of_repeated_words(example, words):
    """On every grid those of the grid, whether or not the repeated words are asked for."""
    repeated = [["a"], ["of", "the"]][example]
    forward, chosen = awkward.bound(), ("logit_lens", "attention")
    found = compare_generation(forward, words, chosen, example=example, refinements=CHAIN)
    bare = compare_generation(forward, words, chosen, example=example)
    own = compare_generation(forward, repeated, chosen, example=example)
    steps = forward.trajectory.steps
    without = []
    for row, plain, mine in zip(found.rows, bare.rows, own.rows, strict=True):
        assert row.cost.forwards == plain.cost.forwards  # one prefill serves all words
        assert torch.allclose(row.text, plain.text, atol=1e-5)
        for i, grid in enumerate(found.layout.grids):
            assert torch.equal(row.raw[i], plain.raw[i])
            subtracted = min_max(mine.raw[i].relu().mean(0))
            expected = plain.raw[i].relu()
            for stage in CHAIN:
                expected = stage(expected, RefineContext(steps, grid.image_size, subtracted))
            assert torch.allclose(row.maps[i], expected, atol=1e-5)
            bare_chain = plain.raw[i].relu()
            for stage in CHAIN:
                bare_chain = stage(bare_chain, RefineContext(steps, grid.image_size))
            without.append(torch.allclose(row.maps[i], bare_chain, atol=1e-3))
    assert not any(without)
    assert [s["name"] for s in found.settings["refinements"]["stages"]] == [
        "min_max",
        "akd",
        "sicd",
    ]


def test_a_repeated_word_that_no_pass_was_left_for_does_not_count():
    """ "a red circle and a …": the second "a" is cut off, and the row's own word is whole."""
    forward = awkward.bound()
    found = compare_generation(
        forward, ["red"], ["saliency"], refinements=CHAIN, budget=Budget(passes=2)
    )
    (first,) = compare_generation(forward, [0], ["saliency"]).rows
    (row,) = found.rows
    assert row.status == "done" and row.complete == (True,) and row.cost.forwards == 2
    for i, grid in enumerate(found.layout.grids):
        subtracted = min_max(first.raw[i][0])
        expected = row.raw[i].relu()
        for stage in CHAIN:
            expected = stage(expected, RefineContext(12, grid.image_size, subtracted))
        assert torch.allclose(row.maps[i], expected, atol=1e-5)


def test_a_preset_that_refines_is_not_refined_twice(cache):
    """So that one --refine makes the columns of a comparison equal."""
    forward = tiny.bound(cache)
    methods = ["diffusion_cam", method("diffusion_cam", refined=False), "diffusion_cam_base"]
    found = compare_generation(forward, [1, 2], methods, refinements=[Affinity()])
    shown = explain_generation(forward, [1, 2])
    for row in found.rows[:2]:
        assert tiny.relative(row.maps[0], shown.maps[0]) < 1e-5
    base = explain_generation(forward, [1, 2], preset="base", refinements=[Affinity()])
    assert tiny.relative(found.rows[2].maps[0], base.maps[0]) < 1e-5


def test_a_failed_row_is_not_refined():
    class Refuses(MinMax):
        def __call__(self, maps, context=None):
            if not bool(maps.any()):
                raise InputError("empty maps")
            return super().__call__(maps, context)

    with made.registered("made"):
        chosen = ["logit_lens", method("made", fails="no such thing")]
        found = run(methods=chosen, refinements=Refuses())
    assert [r.status for r in found.rows] == ["done", "failed"]


def test_a_failing_refinement_is_not_a_failing_method():
    class Refuses(MinMax):
        def __call__(self, maps, context=None):
            raise InputError("not these maps")

    with pytest.raises(InputError, match="not these maps"):
        run(methods=["logit_lens"], refinements=Refuses())
