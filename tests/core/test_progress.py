"""Progress: a bar where it is asked for, names for a function, and nothing else."""

import pytest
import tiny

import captum_dcam
from captum_dcam.errors import InputTypeError
from captum_dcam.model.progress import Live, Silent, as_progress, watched


def test_true_shows_a_bar_and_false_nothing(capsys):
    """Standard error is no terminal here, as in a notebook."""
    call = {"words": [0], "gen_length": 4}
    captum_dcam.explain(tiny.adapter("prefix"), tiny.picture(), "", progress=False, **call)
    assert capsys.readouterr() == ("", "")
    captum_dcam.explain(tiny.adapter("prefix"), tiny.picture(), "", progress=True, **call)
    shown = capsys.readouterr().err
    assert "explain: " in shown and "pass" in shown
    captum_dcam.compare(
        tiny.adapter("prefix"), tiny.picture(), "", methods=["dcam"], progress=True, **call
    )
    shown = capsys.readouterr().err
    assert "1/1" in shown and "diffusion_cam" in shown


def test_a_function_is_told_the_parts():
    told = []
    captum_dcam.explain(
        tiny.adapter("prefix"), tiny.picture(), "", [0], progress=told.append, gen_length=4
    )
    assert told == ["the answer", "its words"]


def test_nothing_is_left_hooked_after_an_error():
    adapter = tiny.adapter("prefix")
    with pytest.raises(ZeroDivisionError), watched(adapter, True, "divide"):
        1 / 0  # noqa: B018
    assert not adapter.blocks[0]._forward_pre_hooks


def test_what_progress_may_be():
    assert type(as_progress(None, "x")) is type(as_progress(False, "x")) is Silent
    live = Live("mine")
    assert as_progress(live, "x") is live
    with pytest.raises(InputTypeError, match="progress is 3: expected True, a function"):
        as_progress(3, "x")


def test_loading_shows_no_bars_of_transformers_unless_asked(monkeypatch):
    from transformers.utils import logging

    from captum_dcam.model import hub

    seen, made = [], tiny.adapter("prefix")

    def loaded(*_given, **_settings):
        seen.append(logging.is_progress_bar_enabled())
        return made

    monkeypatch.setattr(type(made), "load", loaded)
    before = logging.is_progress_bar_enabled()
    hub.load("mini")
    hub.load("mini", progress=True)
    assert seen == [False, before] and logging.is_progress_bar_enabled() == before
