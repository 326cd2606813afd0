"""An answer that is given to ``explain`` and ``compare``: forced, never decoded."""

import pytest
import tiny
import torch

import captum_dcam
from captum_dcam import DenoisingForward, Explanation, explain_generation
from captum_dcam.errors import InfeasibleStepError, InputError, InputTypeError, TargetError
from captum_dcam.model.answers import force

ANSWER = "a red circle"


def explained(adapter, *words, **how):
    return captum_dcam.explain(adapter, tiny.picture(), tiny.PROMPT, *words, **how)


def test_it_is_explained_as_a_forced_one(cache, monkeypatch):
    adapter = tiny.adapter(cache)
    forward = DenoisingForward(adapter)
    force(forward, ANSWER, adapter.prepare([[tiny.picture()]], [tiny.PROMPT]))
    expected = explain_generation(forward, ["circle"], score="teacher", foil="square")
    monkeypatch.setattr(adapter, "generate", pytest.fail)
    for given in (ANSWER, adapter.encode(ANSWER)):
        found = explained(adapter, ["circle"], answer=given, score="teacher", foil="square")
        assert found.answer == ANSWER and torch.equal(found.maps[0], expected.maps[0])
        assert found.trajectory.forced and found.settings == expected.settings
    compared = captum_dcam.compare(
        adapter, tiny.picture(), tiny.PROMPT, ["circle"], ["attention"], answer=ANSWER
    )
    assert compared.answer == ANSWER and compared.forced


def test_it_is_saved_as_forced(tmp_path):
    found = explained(tiny.adapter("prefix"), answer=ANSWER)
    assert Explanation.load(found.save(tmp_path / "out")).trajectory.forced
    assert not tiny.bound("prefix").trajectory.forced


@pytest.mark.parametrize(
    ("how", "error", "message"),
    [
        ({"gen_length": 8}, InputError, "gen_length beside an answer .* leave out it, or"),
        ({"decoding": "demo", "steps": 4}, InputError, "decoding, steps beside .* leave out them"),
        ({"generator": torch.Generator()}, InputError, "generator beside an answer that is given"),
        ({"score": 3}, InfeasibleStepError, "score is 3: the answer is given, not generated"),
        ({"answer": ""}, TargetError, "the answer '' has no token"),
        ({"answer": " "}, TargetError, "the answer ' ' has no token"),
        ({"answer": []}, TargetError, r"the answer \[\] has no token"),
        ({"answer": 7}, InputTypeError, "answer is 7: expected a text"),
        ({"answer": ["a", "red"]}, InputTypeError, "expected a text, or its token ids, or Reveals"),
        ({"answer": [True]}, InputTypeError, "expected a text, or its token ids, or Reveals"),
    ],
)
def test_what_excludes_it_is_refused_before_any_work(how, error, message, monkeypatch):
    adapter = tiny.adapter("prefix")
    for name in ("prepare", "generate", "embed"):
        monkeypatch.setattr(adapter, name, pytest.fail)
    with pytest.raises(error, match=message):
        explained(adapter, **{"answer": ANSWER, **how})
    if "generator" not in how:
        with pytest.raises(error, match=message):
            captum_dcam.compare(adapter, tiny.picture(), tiny.PROMPT, **{"answer": ANSWER, **how})
