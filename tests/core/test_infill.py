"""Answers with holes: what is a mark, what the model fills, and what given words are."""

from dataclasses import replace

import pytest
import tiny
import torch

import captum_dcam
from captum_dcam import DenoisingForward, Explanation
from captum_dcam.errors import (
    InfeasibleStepError,
    InputError,
    MethodError,
    SettingError,
    TargetError,
)
from captum_dcam.model.answers import force
from captum_dcam.model.infill import fill, given_by, parts_of, template_of
from captum_dcam.model.trajectory import NO_STEP
from captum_dcam.model.words import asked
from captum_dcam.presets import preset
from captum_dcam.results.summary import given_words, summarise
from captum_dcam.viewer import contact_sheet

HOLES = "a [MASK] circle and [MASK:2]"


@pytest.fixture(scope="module")
def found():
    return explained(answer=HOLES, trust=True)


def explained(*words, adapter=None, **how):
    adapter = adapter or tiny.adapter("prefix")
    return captum_dcam.explain(adapter, tiny.picture(), tiny.PROMPT, *words, **how)


@pytest.mark.parametrize(
    ("answer", "parts"),
    [
        ("a [MASK] circle", ("a", 1, " circle")),
        ("[MASK][MASK:3]", (1, 3)),
        ("[MASK] [MASK] ", (1, 1)),
        ("[MASK]", (1,)),
        ("un[MASK:99999]able", ("un", 99999, "able")),
        ("[MASK]\n[MASK]", (1, "\n", 1)),
        (r"says \[MASK] and \[mask:x]", ("says [MASK] and [mask:x]",)),
        (r"\[MASK] [MASK]", ("[MASK]", 1)),
        ("a [masked] man, [Mask of Zorro], mask ] <mask> ___", None),
        ("[[MASK]]", ("[", 1, "]")),
        (" red ", (" red ",)),
    ],
)
def test_marks_and_texts_are_told_apart(answer, parts):
    assert parts_of(answer) == (parts or (answer,))


@pytest.mark.parametrize(
    "mark",
    [
        *("[mask]", "[Mask]", "[MASK:0]", "[MASK:x]", "[MASK:-1]", "[MASK:1.5]", "[MASK:]"),
        *("[MASK: 3]", "[MASK:03]", "[MASK 3]", "[MASK3]", "[ MASK ]", "[MASK:100000]", "[MASK"),
        *("[MASK:3", "[MASK*2]", "[MASK:\u0663]"),
    ],
)
def test_what_looks_like_a_mark_and_is_none_is_refused_and_can_be_meant(mark):
    with pytest.raises(InputError, match=r"expected \[MASK\] for one token .* for the text itself"):
        explained(answer=f"a {mark}")
    assert parts_of(f"a \\{mark}") == (f"a {mark}",)


@pytest.mark.parametrize(
    ("how", "error", "message"),
    [
        ({"gen_length": 8}, InputError, "gen_length is 8, but the answer .* has 6 tokens, 3 of"),
        ({"max_new_tokens": 3}, InputError, "max_new_tokens is 3, but"),
        ({"answer": "a <mask> [MASK]"}, TargetError, "its mask token of 'a <mask>'"),
        ({"answer": "[MASK] \n"}, TargetError, "makes no token of"),
    ],
)
def test_what_cannot_be_filled_is_refused_before_any_work(how, error, message, monkeypatch):
    adapter = tiny.adapter("prefix")
    for name in ("prepare", "generate", "embed"):
        monkeypatch.setattr(adapter, name, pytest.fail)
    with pytest.raises(error, match=message):
        explained(adapter=adapter, **{"answer": HOLES, **how})
    monkeypatch.setattr(type(adapter), "unfillable", "it was not taught to")
    with pytest.raises(
        MethodError, match=r"mini cannot fill the holes of 'a .* not taught to; give"
    ):
        captum_dcam.compare(adapter, tiny.picture(), tiny.PROMPT, answer="a [MASK]")


def test_settings_are_the_familys_and_a_batch_is_refused():
    with pytest.raises(SettingError, match="unknown setting 'top_k' of mini"):
        explained(answer=HOLES, top_k=3)
    with pytest.raises(InputError, match="steps is 4: expected a positive multiple"):
        explained(answer=HOLES, block_length=2, steps=4)
    with pytest.raises(InputError, match="one example"):
        force(tiny.bound("none", batch=2), HOLES)
    forward = tiny.bound("none")
    with pytest.raises(InputError, match="steps beside an answer that is given"):
        force(forward, "a red circle", steps=2)
    assert force(forward, HOLES, steps=2).steps == 2


def test_a_hole_at_either_end_and_nowhere():
    forward = tiny.bound("prefix", gen_length=4)
    plain = forward.trajectory
    for answer in ("[MASK:4]", "[MASK] [MASK:2][MASK]"):
        made = fill(DenoisingForward(forward.adapter), answer, forward.request)
        assert torch.equal(made.states[0], plain.states[0]) and not bool(made.given.any())
    made = force(forward, "[MASK] red [MASK]")
    assert made.given.tolist() == [[False, True, False]] and not made.forced
    assert int(made.tokens[0, 1]) == forward.adapter.encode("red")[0]
    whole = force(forward, r"a \[MASK] circle")
    assert whole.forced and whole.given is None
    assert torch.equal(whole.tokens[0], torch.tensor(forward.adapter.encode("a [MASK] circle")))


@pytest.mark.parametrize("cache", tiny.CACHES)
def test_each_step_commits_holes_alone_the_surest_first(cache):
    """The loop recomputed: of the masks of the block, the most probable one per step."""
    adapter = tiny.adapter(cache)
    forward = DenoisingForward(adapter)
    request = adapter.prepare([[tiny.picture()]], [tiny.PROMPT])
    made = fill(forward, "a [MASK] circle [MASK:3] red [MASK]", request, block_length=4)
    canvas = given_by(adapter, "a [MASK] circle [MASK:3] red [MASK]").canvas(adapter.mask_id)
    assert made.steps == 5
    for step in range(made.steps):
        assert torch.equal(made.states[0][step], canvas)
        logits = forward.replay(torch.tensor([0]), torch.tensor([step]))[0].detach().double()
        odds = logits.softmax(-1)
        logits[:, adapter.mask_id] = -torch.inf
        best = logits.argmax(-1)
        masked = [p for p in range(8) if canvas[0, p] == adapter.mask_id]
        own = [p for p in masked if p < 4] or masked
        place = max(own, key=lambda p: float(odds[p, best[p]]))
        canvas[0, place] = best[place]
        assert int(made.commit_step[0, place]) == step
    assert torch.equal(canvas, made.tokens)


def test_sampling_is_the_seeds():
    made = [
        explained(answer=HOLES, temperature=2.0, generator=torch.Generator().manual_seed(seed))
        for seed in (0, 0, 1)
    ]
    same, other = made[1], made[2]
    assert same.answer == made[0].answer and torch.equal(same.maps[0], made[0].maps[0])
    assert not torch.equal(other.trajectory.tokens, made[0].trajectory.tokens)


def test_the_filled_words_are_explained(found, tmp_path):
    free = [p for p, own in enumerate(found.trajectory.given[0].tolist()) if not own]
    assert free == [1, 4, 5] and found.template == HOLES
    assert {p for t in found.targets for p in t.positions} <= set(free)
    assert all(step >= 0 for own in found.commit_steps() for step in own)
    loaded = Explanation.load(found.save(tmp_path / "out"))
    assert loaded.template == HOLES and torch.equal(loaded.trajectory.given, found.trajectory.given)
    assert contact_sheet(found, width=400).width == 400
    steps = explained(answer=HOLES, every_step=True).steps
    assert steps.probabilities.shape[0] == found.trajectory.steps == 3


def test_given_words_say_how_much_of_a_filled_one_they_made(found):
    text, first = found.trust.text, found.targets[0]
    rows = given_words(found)
    assert [sorted(w for w, _ in row) for row in rows] == [["a", "and", "circle"]] * len(rows)
    at = text.tokens.prompt + 2
    assert dict(rows[0])["circle"] == pytest.approx(float(text.values[0, at]))
    assert [abs(v) for _, v in rows[0]] == sorted((abs(v) for _, v in rows[0]), reverse=True)
    assert first.positions == (1,) and bool(text.values[0, at].isfinite())
    assert given_words(explained(answer="a red circle")) == ((), (), ())


def test_a_given_word_has_no_commit():
    with pytest.raises(InfeasibleStepError, match="'circle' was given, so no step committed it"):
        explained(["circle"], answer=HOLES)
    with pytest.raises(InfeasibleStepError, match="'circle' was given"):
        captum_dcam.compare(
            tiny.adapter("prefix"), tiny.picture(), tiny.PROMPT, ["circle"], ["attention"],
            answer=HOLES,
        )  # fmt: skip
    for score in ("teacher", "final", 1):
        found = explained(["circle"], answer=HOLES, score=score)
        assert found.commit_steps() == ((NO_STEP,),) and summarise(found)[0].when == "given"
        assert bool(found.maps[0].any())
    assert contact_sheet(found, width=400).width == 400
    forward = tiny.bound("none")
    trajectory = force(forward, HOLES)
    with pytest.raises(InfeasibleStepError, match="token 2 of the answer was given"):
        trajectory.step_of(0, 2, "commit")
    nothing = replace(trajectory, given=torch.ones_like(trajectory.given))
    with pytest.raises(TargetError, match=r"none of the words of .* was filled by the model"):
        asked(forward.adapter, nothing, 0, None)


def test_methods_that_read_other_words_leave_given_ones_out():
    """TAM's context and SICD's repeated words are words that some step committed."""
    compared = captum_dcam.compare(
        tiny.adapter("prefix"), tiny.picture(), tiny.PROMPT, None, ["tam", "msea_arc"],
        answer="the [MASK] the [MASK]", refinements=preset("paper").refinements(),
    )  # fmt: skip
    assert [row.status for row in compared.rows] == ["done", "done"]


def test_a_template_reads_as_it_was_written():
    assert template_of([" a", " red", " circle", "s", ""], [1, 0, 1, 1, 0]) == (
        "a [MASK] circles [MASK]"
    )
    assert template_of(["", ""], [0, 0]) == "[MASK:2]"
