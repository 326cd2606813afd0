"""Every conformance check fails on an adapter that is broken in its way, and says what is wrong."""

import dataclasses
import sys
from pathlib import Path

import pytest
import torch
import typer
from typer.testing import CliRunner

sys.path.insert(0, str(Path(__file__).parent))  # importlib mode does not

import broken

from captum_dcam.errors import ConformanceError
from captum_dcam.testing import (
    CHECKS,
    AdapterSuite,
    ConformanceRow,
    Outcome,
    check_all,
    check_replay,
    feasibility,
    markdown,
)
from captum_dcam.testing.__main__ import main
from captum_dcam.testing.report import BEGIN, END, document, merge_rows, read_rows

app = typer.Typer()
app.command()(main)

#: class, check, what the error says, caches
BROKEN = (
    ("WrongCommits", "replay", "commit steps are", "prefix none"),
    ("CanvasesNotCloned", "replay", "clone it before", "prefix none"),
    ("MissingStep", "replay", "has 3 steps", "prefix none"),
    ("OtherAnswer", "replay", "not the family's own", "prefix"),
    ("ConfidenceOfLogits", "replay", "expected probabilities", "prefix"),
    ("ConfidenceOfSharperLogits", "replay", "confidence at step 0", "prefix none"),
    ("ForgetsWhatIsRead", "replay", "read_at says that step 1 computes", "prefix none"),
    ("WrongShift", "replay", "shift of predictions", "prefix none"),
    ("NearlyRight", "replay", "the same bits", "prefix none"),
    ("ChangesItsState", "replay", "work on copies", "none"),
    ("DetachedCache", "gradient", r"look for detach\(\)", "prefix"),
    ("DetachedKeys", "gradient", "finite differences give", "prefix"),
    ("ForgottenTensors", "gradient", "finite differences give", "prefix"),
    ("NoGradient", "gradient", r"look for detach\(\)", "prefix none"),
    ("TooDeep", "gradient", "block 3: no gradient", "prefix none"),
    ("TooShallow", "gradient", "expected at least 2", "prefix none"),
    ("InventedLengths", "feasible", "in calls of lengths", "prefix none"),
    ("SpanCutOff", "feasible", "image span ends at 32, the layout's at 64", "prefix none"),
    ("Transposed", "layout", "the order of tokens", "prefix"),
    ("OffByOne", "layout", "the order of tokens", "prefix"),
    ("UpsideDown", "layout", "the order of tokens", "none"),
    ("OneCellAside", "layout", "the order of tokens", "none"),
    ("HeightAndWidthSwapped", "layout", r"a grid says \(H, W\)", "prefix"),
    ("PicturesSwapped", "layout", "tokens of image 0 most: expected 1", "prefix"),
    ("PixelsOfOthers", "layout", "pixels, patch", "prefix"),
    ("RunsWhatItRefuses", "inputs", "a batch of two is neither run nor refused", "none"),
    ("OnePictureOnly", "inputs", "two images is neither run nor refused", "none"),
    ("NoVideoThough", "inputs", "Video|video", "none"),
    ("FirstPromptForAll", "inputs", "other logits than alone", "prefix none"),
    ("NoEmptyPrompt", "inputs", "list index out of range", "prefix"),
    ("SaysTheAnswersMark", "inputs", "does not name as text", "prefix"),
    ("ForgetsTheQuestionMark", "inputs", r"reads '.*': expected '.* \?', the texts", "none"),
    ("SaysNothing", "inputs", r"the request's dialogue is \(1, 0\): expected", "none"),
    ("Peeking", "inputs", "a batch of two: forward at step 0", "none"),
    ("LeavesHook", "nothing left", r"after generating .*_forward_hooks", "prefix"),
    ("LeavesHookAfterErrors", "nothing left", "after an error while generating", "none"),
    ("LeavesAttribute", "nothing left", "after explaining .*last_extras is new", "none"),
    ("LeavesMode", "nothing left", "training changed", "prefix"),
    ("LeavesFrozen", "nothing left", "requires_grad changed", "prefix"),
    ("LeavesGradient", "nothing left", r"norm.weight.grad changed", "prefix"),
    ("LeavesOtherWeights", "nothing left", "norm._parameters", "prefix"),
    ("LeavesClassPatched", "nothing left", r"class \w+.forward changed", "prefix"),
    ("LeavesConfigChanged", "nothing left", "config changed", "prefix"),
    ("DrawsFromTheGlobalGenerator", "nothing left", "get_rng_state", "prefix"),
    ("SwallowsErrors", "nothing left", "is swallowed while generating", "prefix"),
    ("QueriesTheRowBefore", "head", "the place whose output predicts", "prefix none"),
    ("QueriesTheEnd", "head", r"query_position gives \[.*: the sequence has", "prefix none"),
    ("HeadWithoutNorm", "head", "the final norm and the head", "prefix none"),
    ("HeadOfHalfTheWords", "head", r"unembed gives \(.* the logits are", "prefix"),
    ("ScaledHead", "head", "with all scales", "none"),
)
EACH = [(n, c, m, r) for n, c, m, caches in BROKEN for r in caches.split()]


@pytest.fixture(autouse=True)
def unpatched():
    yield
    undo = broken.LeavesClassPatched.undo
    while undo:
        undo.pop()()


@pytest.mark.parametrize(("name", "check", "message", "cache"), EACH)
def test_the_right_check_fails(name, check, message, cache):
    case = broken.case(getattr(broken, name), cache)
    kinds = (ConformanceError, IndexError, TypeError, ValueError, AttributeError)
    with pytest.raises(kinds, match=message) as caught:
        CHECKS[check](case)
    plain = {"NoVideoThough", "NoEmptyPrompt"}  # the adapter's own error
    assert caught.type is ConformanceError or name in plain


def test_a_tolerance_lets_rounding_pass():
    case = broken.case(broken.NearlyRight, "prefix")
    assert check_replay(dataclasses.replace(case, tolerance=1e-5)).startswith("within")


def test_a_row_holds_all_outcomes():
    case = dataclasses.replace(broken.case(broken.WrongCommits, "prefix"), name="a | b")
    row = check_all(case)
    assert [o.check for o in row.outcomes] == list(CHECKS) and not row.passed
    assert [o.passed for o in row.outcomes] == [False, True, True, True, False, True, True]
    text = markdown([row]).splitlines()
    assert text[0].count("|") == text[2].count("|") == len(CHECKS) + 3
    assert "**fails**" in text[2] and "commit steps are" in text[4]


def test_an_adapter_without_a_head_is_named():
    assert CHECKS["head"](broken.case(broken.NoHead, "none")) == (
        "not compared, no unembed: the family's head is not known"
    )


def test_a_check_that_a_row_is_older_than_is_not_passed_off_as_one():
    outcomes = (Outcome("nothing left", True, "nothing"), Outcome("replay", True, "bit-equal"))
    cells = markdown([ConformanceRow("a", "own", outcomes, "torch 2")]).splitlines()[2].split(" | ")
    assert cells[2] == "bit-equal" and cells[2 + list(CHECKS).index("nothing left")] == "nothing"
    assert [c.strip(" |") for c in cells[2:]].count("–") == len(CHECKS) - 2


def test_rows_are_kept_and_written_into_a_document(tmp_path):
    made = [ConformanceRow("b", "own", (Outcome("replay", True, "bit-equal"),), "torch 2", "run b")]
    store = tmp_path / "rows.json"
    merge_rows(store, made)
    again = ConformanceRow("b", "own", (Outcome("replay", False, "no"),), "torch 2", "run b")
    other = ConformanceRow(
        "a", "upstream 123", (Outcome("replay", True, "same"),), "torch 3", "run a"
    )
    assert merge_rows(store, [again, other]) == [other, again] == read_rows(store)
    text = document(f"head\n{BEGIN}\nold\n{END}\ntail\n", [other, again])
    assert text.startswith(f"head\n{BEGIN}\n| Family") and text.endswith(f"{END}\ntail\n")
    assert "old" not in text and "- `run a` (torch 3)\n- `run b` (torch 2)" in text
    with pytest.raises(ValueError, match="must hold the lines"):
        document("head", [other])


def test_the_command_line(tmp_path):
    file = Path(broken.__file__).parents[1] / "adapters" / "cases" / "mini.py"
    made = CliRunner().invoke(app, [str(file), "--only", "prefix", "--calls"])
    assert made.exit_code == 0 and "mini, prefix: 20% of 5 calls\n  prefix: length" in made.stdout
    (tmp_path / "mine.py").write_text("CASES = []")
    nothing = CliRunner().invoke(app, [str(tmp_path)])
    assert nothing.exit_code == 2 and "no case in" in nothing.output
    (tmp_path / "mine.py").write_text("x = 1")
    wrong = CliRunner().invoke(app, [str(tmp_path)])
    assert wrong.exit_code == 2 and "defines no CASES" in wrong.output


def test_a_case_on_another_device(monkeypatch, tmp_path):
    case = broken.cases()["prefix"]
    moved = []
    monkeypatch.setattr(torch.nn.Module, "to", lambda self, *a, **_: moved.append(a) or self)
    there = case.on("cuda:1")
    adapter = there.make(torch.float32)
    assert (torch.device("cuda:1"),) in moved and adapter.family == "mini"
    assert there.name == f"{case.name}, cuda:1" and there.tolerance == 1e-5 > case.tolerance
    file = Path(broken.__file__).parents[1] / "adapters" / "cases" / "mini.py"
    wrong = CliRunner().invoke(app, [str(file), "--device", "cuda:99"])
    assert wrong.exit_code == 2 and "cuda:99" in wrong.output


def test_the_table_of_calls():
    table = feasibility(broken.cases()["prefix"])
    assert table.lines() == [
        "prefix: length 69 ≥ 64, feasible",
        "t = 0 … t = 3: length 8 < 64, infeasible",
    ]
    assert table.ratio == 1 / 5


def test_fewer_than_eight_sizes_are_no_case():
    with pytest.raises(ValueError, match="at least 8"):
        dataclasses.replace(broken.cases()["none"], sizes=((64, 64),) * 9)


def test_an_answer_of_stop_tokens_says_what_to_do():
    class Silent(broken.MiniAdapter):
        stop_ids = frozenset(range(71))

    with pytest.raises(ConformanceError, match="stop tokens, or tokens that never settled, only"):
        CHECKS["gradient"](broken.case(Silent, "prefix"))


def test_a_reference_without_commit_steps_is_refused():
    own = broken.cases()["prefix"]

    def reference(*args):
        return dataclasses.replace(own.reference(*args), canvases=None)

    with pytest.raises(ValueError, match="tells neither commit steps"):
        check_replay(dataclasses.replace(own, reference=reference))


def test_positions_that_the_family_does_not_compute_are_left_out():
    own = broken.cases()["prefix"]

    def reference(*args):
        made = own.reference(*args)
        logits = [x.clone() for x in made.logits]
        for x in logits:
            x[:, 1:] = torch.nan
        return dataclasses.replace(made, logits=logits)

    assert check_replay(dataclasses.replace(own, reference=reference)) == "bit-equal"


class TestMini(AdapterSuite):
    case = broken.cases()["prefix"]
