"""The harness: what is recorded, and what happens when something fails."""

import io
import tracemalloc
from dataclasses import dataclass, replace

import numpy as np
import pytest
import tiny
import torch
from evaluation import made
from methods.made import registered

from captum_dcam.comparing import compare_generation
from captum_dcam.data import scenes
from captum_dcam.errors import EvaluationError, StoreError
from captum_dcam.evaluation import Live, Plan, Store, Variant, evaluate, rows
from captum_dcam.evaluation import harness as harness_module
from captum_dcam.evaluation.floors import covered
from captum_dcam.evaluation.trial import Trial, derived_seed
from captum_dcam.methods import METHODS, Attribution, Method, MethodFacts, method, register_method
from captum_dcam.metrics import (
    gini_index,
    joint_min_max,
    localization,
    noun_threshold,
    oracle_map,
    random_map,
)
from captum_dcam.model.answers import force
from captum_dcam.model.forward import DenoisingForward
from captum_dcam.model.layout import Grid, uniform_grid
from captum_dcam.model.progress import Progress, Silent
from captum_dcam.model.weights import fingerprint
from captum_dcam.model.words import Target, repeated_function_words, words_of
from captum_dcam.refine import DACG_BRANCHES, RefineContext, dacg_branch, min_max, refinement


def run(folder, plan=None, count=3, bad=(), **settings):
    return evaluate(
        made.plan() if plan is None else plan,
        folder,
        adapter=settings.pop("adapter", None) or made.adapter(),
        data=settings.pop("data", None) or made.Pictures(count, bad),
        shard=settings.pop("shard", (0, 1)),
        **settings,
    )


def records(folder):
    return list(Store.read(folder).records())


def bound(image_id, cache="prefix", generated=False):
    """The answer that the harness binds, by hand."""
    adapter = made.adapter(cache)
    forward = DenoisingForward(adapter)
    generator = torch.Generator().manual_seed(derived_seed(0, image_id, "answer"))
    request = adapter.prepare([[tiny.picture(image_id)]], [tiny.PROMPT])
    forward.generate(request, generator=generator, gen_length=4, temperature=float(generated))
    if not generated:
        force(forward, made.Sample(image_id).captions[0])
    return forward


@pytest.mark.parametrize("cache", tiny.CACHES)
def test_the_answer_is_generated_with_a_seed_of_the_image(tmp_path, cache):
    plan = made.plan(
        answer="generated",
        variants=("random",),
        words=("object", "noun", "function", "modifier", "other"),
        generation={"gen_length": 4, "temperature": 1.0},
    )
    run(tmp_path, plan, adapter=made.adapter(cache))
    found = records(tmp_path)
    for record in found:
        trajectory = bound(record["id"], cache, generated=True).trajectory
        words = words_of(made.adapter(cache), trajectory.tokens[0].tolist())
        assert [w["text"] for w in record["words"]] == [w.text for w in words]
        for own in record["words"]:
            assert own["commit"] == trajectory.commit_step[0, own["positions"]].tolist()
        assert record["calls"] == len(trajectory.calls) and record["steps"] == trajectory.steps
        assert record["feasible"] == (1 if cache == "prefix" else len(trajectory.calls))
        assert sum(n for _, n in record["lengths"]) == len(trajectory.calls)
    assert len({r["answer"] for r in found}) == 3


@pytest.mark.parametrize("cache", tiny.CACHES)
def test_scores_are_those_of_the_library(tmp_path, cache):
    run(tmp_path, count=2, adapter=made.adapter(cache))
    for record in records(tmp_path):
        forward = bound(record["id"], cache)
        words = [
            Target(w["text"], tuple(w["positions"]), tuple(w["tokens"])) for w in record["words"]
        ]
        objects = [i for i, w in enumerate(record["words"]) if w["kind"] == "object"]
        assert objects, "the fixture's answers name objects"
        raw = (
            compare_generation(forward, words, [method("diffusion_cam", refined=False)])
            .rows[0]
            .raw[0]
        )
        found = record["variants"]["base"]["scores"]
        things = {t.name: t for t in made.Sample(record["id"]).objects}
        for i in objects:
            mask = torch.from_numpy(things[record["words"][i]["objects"][0]].mask())
            pixels = forward.request.layout.grids[0].to_pixels(raw[i].relu())
            expected = localization(pixels, mask)
            for name in ("obj_iou", "contrast", "concentration", "f3"):
                assert found[name][i] == pytest.approx(float(getattr(expected, name)), rel=1e-6)
            assert record["words"][i]["area"] == pytest.approx(float(mask.float().mean()))


def test_post_transforms_share_the_run_and_see_the_repeated_words(tmp_path):
    plan = made.plan(words=("object",))  # function words are explained for SICD alone
    run(tmp_path, plan)
    for record, cost in zip(records(tmp_path), Store.read(tmp_path).costs(), strict=True):
        assert [r["variants"] for r in cost["runs"]] == [["base", "refined"]]
        forward = bound(record["id"])
        tokens = forward.trajectory.tokens[0].tolist()
        extra = repeated_function_words(words_of(forward.adapter, tokens))
        words = [
            Target(w["text"], tuple(w["positions"]), tuple(w["tokens"])) for w in record["words"]
        ]
        raw = (
            compare_generation(forward, (*words, *extra), [method("diffusion_cam", refined=False)])
            .rows[0]
            .raw[0]
            .relu()
        )
        assert [t.text for t in extra] == ["a", "a"]
        own = min_max(raw[len(words) :].mean(0))
        context = RefineContext(forward.trajectory.steps, (60, 80), own)
        maps = min_max(raw[: len(words)])
        routes = [DACG_BRANCHES[b] for b in dacg_branch(maps)]
        for name in ("dacg", "sicd"):
            maps = refinement(name)(maps, context)
        scores = record["variants"]["refined"]["scores"]
        assert scores["dacg_route"] == routes
        assert "dacg_route" not in record["variants"]["base"]["scores"]
        things = {t.name: t for t in made.Sample(record["id"]).objects}
        for n, word in enumerate(record["words"]):
            mask = torch.from_numpy(things[word["objects"][0]].mask())
            expected = localization(forward.request.layout.grids[0].to_pixels(maps[n]), mask)
            assert scores["f3"][n] == pytest.approx(float(expected.f3), rel=1e-5, abs=1e-7)
        stages = cost["variants"]["refined"]["stages"]
        assert [name for name, _ in stages] == list(made.REFINED)


def test_an_estimate_of_a_word_that_was_cut_short_is_nowhere_used(tmp_path):
    """The second "a" has a map that is not whole: what is subtracted is the first one's alone."""
    generator = torch.Generator().manual_seed(0)
    drawn, text = torch.randn(9, 8, 8, generator=generator), torch.rand(9, 3, generator=generator)

    class Estimates(Method):
        facts = MethodFacts("made", "gradient", "this test", "1")

        def attribute(self, task):
            whole = [t.text != "a" or t.positions == (0,) for t in task.targets]
            rows = [t.positions[0] for t in task.targets]
            return Attribution(
                (drawn[rows],), torch.tensor(whole), text[rows], "some are estimates"
            )

    stages = ("min_max", {"name": "sicd", "gate": False, "omega_rep": 0.8})
    try:
        register_method("estimates")(dataclass(frozen=True)(Estimates))
        variants = ("estimates", Variant("made", "estimates", refinements=stages))
        run(tmp_path, made.plan(variants=variants, metrics=("sparseness", "plausibility")), count=1)
    finally:
        METHODS.remove("estimates")
    (record,) = records(tmp_path)
    assert record["answer"] == "a red circle and a star ."
    found = record["variants"]["made"]
    own = [w["positions"][0] for w in record["words"]]
    assert found["complete"] == [p != 4 for p in own] and 4 in own
    debias = refinement("sicd", gate=False, omega_rep=0.8)
    for position, gini in zip(own, found["scores"]["gini"], strict=True):
        values = min_max(drawn[position].relu())
        both, first = (
            float(gini_index(debias(values, RefineContext(7, (60, 80), min_max(m)))))
            for m in (drawn[[0, 4]].relu().mean(0), drawn[0].relu())
        )
        assert gini == (None if position == 4 else pytest.approx(first, rel=1e-5))
        assert abs(both - first) > 1e-4, "the estimate would be seen"
    # the text of every whole word goes with its map, and that of the others with none
    scores, grid = record["variants"]["estimates"]["scores"], bound(0).request.layout.grids[0]
    pixels = {p: grid.to_pixels(drawn[p].relu()) for p in own if p != 4}
    joint = {p: joint_min_max(values[None], text[p][None])[0] for p, values in pixels.items()}
    nouns = [p for p, w in zip(own, record["words"], strict=True) if w["kind"] == "object"]
    limit = noun_threshold(torch.stack([joint[p] for p in nouns]))
    for position, word, share in zip(own, record["words"], scores["func_iou_joint"], strict=True):
        below = word["kind"] == "function" and position != 4
        expected = float((joint[position] < limit).float().mean()) if below else None
        assert share == (expected if expected is None else pytest.approx(expected, rel=1e-6))


def test_floors_and_ceiling(tmp_path):
    run(tmp_path, count=2)
    for record in records(tmp_path):
        things = {t.name: t for t in made.Sample(record["id"]).objects}
        grid = bound(record["id"]).request.layout.grids[0]
        noise = random_map(
            (len(record["words"]), 8, 8),
            torch.Generator().manual_seed(derived_seed(0, record["id"], "random")),
        )
        for n, word in enumerate(record["words"]):
            scores = {v: own["scores"]["f3"][n] for v, own in record["variants"].items()}
            if word["kind"] != "object":
                assert set(scores.values()) == {None}
                assert record["variants"]["oracle"]["complete"][n] is False
                continue
            mask = torch.from_numpy(things[word["objects"][0]].mask())
            for name, own in (("oracle", oracle_map(mask, (8, 8))), ("random", noise[n])):
                expected = float(localization(grid.to_pixels(own), mask).f3)
                assert scores[name] == pytest.approx(expected, rel=1e-5)
            assert scores["oracle"] > max(scores["random"], scores["center_blob"])
    assert record["words"]


def test_the_oracle_of_any_grid(tmp_path):
    mask = torch.rand(37, 53, generator=torch.Generator().manual_seed(0)) > 0.5
    even = uniform_grid(0, (5, 7), (37, 53))
    assert torch.allclose(covered(mask, even), oracle_map(mask, (5, 7)), atol=1e-6)
    crop = Grid(
        even.positions,
        torch.tensor([[10.0 + i, 11.0 + i] for i in range(7)], dtype=torch.float64),
        torch.tensor([[3.0 + i, 4.0 + i] for i in range(5)], dtype=torch.float64),
        (37, 53),
    )
    assert torch.equal(covered(mask, crop), mask[3:8, 10:17].float())


def test_a_run_goes_on_where_it_stopped(tmp_path):
    whole, said = run(tmp_path / "whole", count=5), []
    asked = iter([False, False, True])

    class Told(Progress):
        def begin(self, total, done, failed):
            said.append((total, done, failed))

        def say(self, text):
            said.append(text)

        def image(self, failed):
            said.append(failed)

        def end(self):
            said.append("end")

    first = run(tmp_path / "parts", count=5, stop=lambda: next(asked), progress=Told())
    assert (first.measured, first.left, first.merged) == (2, 3, None)
    assert said[2] == (5, 0, 0) and said[-1] == "end" and said.count(False) == 2
    assert "0: answer" in said and "1: base" in said and "0: oracle" in said
    second = run(tmp_path / "parts", count=5)
    assert (second.measured, second.left, second.total) == (3, 0, 5)
    assert made.results(tmp_path / "parts") == made.results(tmp_path / "whole")
    assert whole.merged == tmp_path / "whole/results.jsonl"


def test_a_finished_run_needs_no_model(tmp_path, monkeypatch):
    run(tmp_path, bad={1}, on_error="skip")

    def load(*_):
        raise AssertionError("the model was loaded")

    monkeypatch.setattr(harness_module, "_load", load)
    monkeypatch.setattr(harness_module, "open_data", load)
    summary = evaluate(made.plan(), tmp_path, shard=(0, 1))
    assert (summary.measured, summary.failed, summary.left) == (0, 1, 0)
    with pytest.raises(AssertionError, match="loaded"):
        evaluate(made.plan(), tmp_path, shard=(0, 1), retry=True)
    with pytest.raises(StoreError, match=r"plan.seed is 0 there and 1 here"):
        evaluate(made.plan(seed=1), tmp_path, shard=(0, 1))


def test_shards_of_any_number_merge_to_the_same_bytes(tmp_path):
    run(tmp_path / "one", count=5)
    last = [run(tmp_path / "three", count=5, shard=(i, 3)) for i in (2, 0, 1)]
    assert [s.merged is None for s in last] == [True, True, False]
    assert made.results(tmp_path / "one") == made.results(tmp_path / "three")


def test_start_and_limit_choose_images(tmp_path):
    run(tmp_path / "all", count=5)
    run(tmp_path / "some", made.plan(start=2, limit=2), count=5)
    some = [{**r, "plan": ""} for r in records(tmp_path / "some")]
    assert some == [{**r, "plan": ""} for r in records(tmp_path / "all")[2:4]]
    with pytest.raises(ValueError, match="no images: the data set has 5, the plan starts at 9"):
        run(tmp_path / "none", made.plan(start=9), count=5)


def test_weights_of_another_model_are_refused(tmp_path):
    run(tmp_path, adapter=tiny.adapter("prefix", seed=0), stop=iter((False, True)).__next__)
    with pytest.raises(StoreError, match=r"facts\.weights"):
        run(tmp_path, adapter=tiny.adapter("prefix", seed=1))
    with pytest.raises(StoreError, match=r"facts\.regime"):
        run(tmp_path, adapter=tiny.adapter("none", seed=0))
    assert fingerprint(tiny.model(0)) == fingerprint(tiny.model(0)) != fingerprint(tiny.model(1))


# -- failures -------------------------------------------------------------------------------------


def test_a_damaged_image_is_named(tmp_path):
    with pytest.raises(EvaluationError, match=r"image 1 \(index 1\): OSError: image 1 is damaged"):
        run(tmp_path, bad={1})
    assert [r["index"] for r in records(tmp_path)] == [0]
    with pytest.raises(EvaluationError, match="image 1"):  # and again: nothing is silent
        run(tmp_path, bad={1})


def test_damaged_images_are_stored_and_retried_when_asked(tmp_path):
    summary = run(tmp_path / "bad", bad={0, 2}, on_error="skip")
    assert (summary.failed, summary.left, summary.measured) == (2, 0, 3)
    first = records(tmp_path / "bad")[0]
    assert first["error"] == "OSError: image 0 is damaged: fetch it again" and first["id"] == 0
    assert {r["id"] for r in rows(Store.read(tmp_path / "bad"))} == {1}
    assert run(tmp_path / "bad").measured == 0
    again = run(tmp_path / "bad", on_error="skip", retry=True)
    assert (again.measured, again.failed) == (2, 0)
    run(tmp_path / "good")
    assert made.results(tmp_path / "bad") == made.results(tmp_path / "good")


def test_a_run_in_which_nothing_works_ends_early(tmp_path):
    wrong = made.plan(generation={"gen_lenght": 8}, answer="generated")
    with pytest.raises(EvaluationError, match=r"the first 5 images all failed.*gen_lenght"):
        run(tmp_path, wrong, count=9, on_error="skip")
    assert len(records(tmp_path)) == 5


def test_a_variant_that_fails_says_why_and_the_rest_goes_on(tmp_path):
    with registered("made"):
        plan = made.plan(
            variants=(
                Variant("works", "made"),
                Variant("fails", "made", {"fails": "no such thing"}),
                Variant("short", "made", passes=1),
                "random",
            )
        )
        run(tmp_path / "skip", plan, count=1, on_error="skip")
        with pytest.raises(EvaluationError, match=r"image 0 .* no such thing"):
            run(tmp_path / "raise", plan, count=1)
    found = records(tmp_path / "skip")[0]["variants"]
    assert found["fails"] == {"status": "failed", "note": "ValueError: no such thing"}
    assert found["works"]["status"] == "done" and "complete" not in found["works"]
    assert found["short"]["status"] == "partial" and "exhausted" in found["short"]["note"]
    assert found["short"]["complete"].count(True) == 1
    column = found["short"]["scores"]["otsu"]
    assert len(column) == len(records(tmp_path / "skip")[0]["words"])
    short = [r for r in rows(records(tmp_path / "skip")) if r["variant"] == "short"]
    assert len(short) == 1


def test_bad_arguments_are_refused_before_any_work(tmp_path):
    with pytest.raises(ValueError, match="expected one of raise, skip"):
        run(tmp_path / "new", on_error="ignore")
    with pytest.raises(ValueError, match="shard is"):
        run(tmp_path / "new", shard=(2, 2))
    assert not (tmp_path / "new").exists()


def test_masks_of_another_size_are_named(tmp_path, monkeypatch):
    monkeypatch.setattr(made.Thing, "mask", lambda _self: np.ones((3, 4), dtype=bool))
    with pytest.raises(EvaluationError, match=r"image 0 .*bool \(3, 4\): expected bool \(60, 80\)"):
        run(tmp_path)


# -- what must not depend on anything else --------------------------------------------------------


def test_a_variant_draws_the_same_whatever_runs_beside_it(tmp_path):
    one = Variant("tunnel", "llava_cam", {"samples": 2})
    run(tmp_path / "alone", made.plan(variants=(one,)), count=1)
    beside = (Variant("other", "llava_cam", {"samples": 3}), "random", replace(one, name="same"))
    run(tmp_path / "beside", made.plan(variants=beside), count=1)
    alone = records(tmp_path / "alone")[0]["variants"]["tunnel"]
    assert records(tmp_path / "beside")[0]["variants"]["same"] == alone


def test_threads_and_the_global_generator_are_as_before(tmp_path):
    before = torch.get_num_threads(), torch.get_rng_state(), np.random.get_state()[1].copy()
    run(tmp_path, made.plan(variants=("llava_cam", "random")), count=1)
    assert torch.get_num_threads() == before[0]
    assert torch.equal(torch.get_rng_state(), before[1])
    assert (np.random.get_state()[1] == before[2]).all()


def test_a_text_of_the_data_set_can_be_forced(tmp_path):
    plan = made.plan(answer={"name": "caption", "wording": "concise"}, words=("object",))
    run(tmp_path / "text", plan, count=2)
    for record in records(tmp_path / "text"):
        assert record["answer"] == "red circle , star"
        assert [w["mask"] for w in record["words"]] == ["circle", "star"]
        assert record["length"] == record["steps"] == 4
    run(tmp_path / "first", count=1)
    assert records(tmp_path / "first")[0]["answer"] == "a red circle and a star ."
    for wording, message in (
        ("verbose", "no caption 'verbose'; it has 'concise'"),
        (3, "it has 0"),
    ):
        bad = made.plan(answer={"name": "caption", "wording": wording})
        with pytest.raises(EvaluationError, match=message):
            run(tmp_path / str(wording), bad, count=1)


def test_a_missing_prompt_is_an_error(tmp_path):
    class Mute(made.Pictures):
        def sample(self, image_id):
            return made.Sample(image_id, prompt=None)

    with pytest.raises(EvaluationError, match="no prompt for it: give the plan one"):
        run(tmp_path / "none", data=Mute(1))
    run(tmp_path / "given", made.plan(prompt="list the objects ."), count=1)
    assert records(tmp_path / "given")[0]["prompt"] == "list the objects ."


# -- size and display -----------------------------------------------------------------------------


def test_memory_is_flat_over_many_images(tmp_path, monkeypatch):
    monkeypatch.setattr("os.fsync", lambda _file: None)  # only for speed
    filler = "x" * 20_000

    def measured(_trial, _image_id, sample, _say):
        sample.image()
        return {"answer": filler, "words": [], "variants": {}}, {"seconds": 0.0}

    monkeypatch.setattr(Trial, "measure", measured)
    monkeypatch.setattr(made.Sample, "image", lambda _self: bytearray(200_000))
    held = []

    class Watch(Silent):
        def image(self, failed):
            held.append(tracemalloc.get_traced_memory()[0])

    tracemalloc.start()
    try:
        run(tmp_path, count=900, progress=Watch())
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert held[-1] - held[200] < 1_000_000 and peak < 8_000_000  # 18 MB were written
    assert sum(1 for _ in Store.read(tmp_path).records()) == 900


def test_memory_is_flat_with_a_model(tmp_path):
    held = []

    class Watch(Silent):
        def image(self, failed):
            held.append(tracemalloc.get_traced_memory()[0])

    tracemalloc.start()
    try:
        run(tmp_path, made.plan(variants=("diffusion_cam",)), count=9, progress=Watch())
    finally:
        tracemalloc.stop()
    assert held[-1] - held[4] < 200_000


def test_the_display_is_quiet_where_there_is_no_terminal(tmp_path, capsys, monkeypatch):
    run(tmp_path / "quiet", count=1, progress=Live())
    assert capsys.readouterr() == ("", "")

    class Terminal(io.StringIO):
        def isatty(self):
            return True

    screen = Terminal()
    monkeypatch.setattr("sys.stderr", screen)
    run(tmp_path / "shown", count=3, bad={1}, progress=Live("shard 0/1"), on_error="skip")
    shown = screen.getvalue()
    assert "shard 0/1" in shown and "3/3" in shown and "1 failed" in shown


def test_scenes_of_the_registry_are_evaluated(tmp_path):
    plan = Plan(
        ("random", "oracle"),
        dataset={"name": "scenes", "count": 2, "start": 60},
        generation={"gen_length": 8, "steps": 2},
    )
    summary = evaluate(plan, tmp_path, shard=(0, 1))
    assert summary.total == 2
    found = records(tmp_path)
    assert [r["id"] for r in found] == [60, 61]
    named = {word for r in found for w in r["words"] for word in w["objects"]}
    assert named and all(name.split()[1] in scenes.SHAPES for name in named)
    header = Store.read(tmp_path).header
    assert header["facts"]["data"]["name"] == "scenes" and header["facts"]["family"] == "mini"


def test_a_shard_that_is_run_again_does_not_lose_the_others(tmp_path):
    for shard in ((0, 2), (1, 2)):
        run(tmp_path, count=4, shard=shard)
    whole = made.results(tmp_path)
    for path in tmp_path.glob("*-00001-of-*"):
        path.unlink()
    run(tmp_path, count=4, shard=(0, 2))
    assert made.results(tmp_path) == whole


def test_many_damaged_images_among_good_ones_can_be_tried_again(tmp_path):
    bad = range(2, 8)
    run(tmp_path, count=9, bad=bad, on_error="skip")
    assert run(tmp_path, count=9, bad=bad, on_error="skip", retry=True).failed == 6
