"""``captum-dcam calibrate``: what it writes and prints, and how it fails."""

import json
from pathlib import Path

import pytest
from calibration.made_maps import PAPER, Pictures, f3, gathered

from captum_dcam.calibration import Chain
from captum_dcam.cli import calibrate as calibrate_command
from captum_dcam.cli.printing import print_json
from captum_dcam.errors import CalibrationError, UnknownNameError
from captum_dcam.presets import preset, read_preset_file, write_preset
from captum_dcam.refine import CBA, DACG, Compose, MinMax


def options(tmp_path, **changes):
    own = dict(
        images=None, dataset="scenes", root=None, data=["count=40"], labels=True, words="nouns",
        start=0, limit=4, check_start=None, check_limit=None, prompt=None, preset="default",
        model="mini", load=None, cache=None, layer=None, generation=["gen_length=16"], seed=0,
        device="cpu", dtype="float32", threads=1, output=tmp_path / "p.json", json=False,
    )  # fmt: skip
    return calibrate_command.Options(**{**own, **changes})


@pytest.fixture
def command(monkeypatch, adapter, narrow):
    """The command on the tiny model and its pictures."""
    monkeypatch.setattr(calibrate_command, "load_chosen", lambda *_, **__: adapter)
    monkeypatch.setattr("captum_dcam.data.dataset", lambda *_, **__: Pictures(40))
    return calibrate_command.run


def test_command_with_a_check(command, tmp_path, capsys):
    chosen = options(tmp_path, limit=12, check_start=20, check_limit=3)
    done = command(chosen)
    record = read_preset_file(tmp_path / "p.json")
    assert record["base"] == "default" and record["fitted"] == json.loads(json.dumps(done.record))
    assert record["fitted"]["images"] == list(range(12))
    assert record["fitted"]["check"]["images"] == [20, 21, 22]
    assert record["fitted"]["labels"] is True and record["fitted"]["weights"]
    fitted = preset(str(tmp_path / "p.json")).refinements()
    assert fitted == Compose(done.calibration.fitted)
    assert tuple(done.calibration.fitted) != PAPER, "the search has found something"
    gain, (before, after) = done.checked
    other = gathered(3, first=20)
    assert gain.before["f3"] == pytest.approx(f3(other, PAPER), abs=1e-6)
    assert gain.after["f3"] == pytest.approx(f3(other, fitted), abs=1e-6)
    assert before == Chain(other).routing(PAPER) and after == Chain(other).routing(tuple(fitted))
    calibrate_command.print_calibration(done)
    shown = capsys.readouterr().out
    for text in ("DACG routing", "other images", "Gain in F3", "explain --preset", "fitted on"):
        assert text in shown
    first = (tmp_path / "p.json").read_bytes()
    command(chosen)
    assert (tmp_path / "p.json").read_bytes() == first


def test_labelled_command_from_a_preset_file(command, tmp_path, capsys):
    file, start = tmp_path / "start.json", (MinMax(), CBA(gamma=0.25))
    write_preset(file, "paper", preset("paper"), start, {})
    changes = {"preset": str(file), "generation": ["gen_length=8"], "seed": 4}
    chosen = options(tmp_path, limit=12, check_limit=2, **changes)
    done = command(chosen)
    record = read_preset_file(tmp_path / "p.json")
    assert record["base"] == str(file) and done.calibration.start == start
    assert record["fitted"]["cross_validated"]["words"] == done.calibration.words
    assert record["fitted"]["check"]["images"] == [12, 13]  # those after the fitted ones
    assert done.calibration.own.gain >= 0
    calibrate_command.print_calibration(done)
    assert "cross-validated" in capsys.readouterr().out
    print_json(calibrate_command.document(done))
    assert json.loads(capsys.readouterr().out)["seed"] == 4


@pytest.mark.parametrize(
    ("changes", "given"),
    [
        ({}, "no --labels"),
        ({"check_limit": 1}, "no --labels"),
        ({"words": "all"}, "no --labels"),
        ({"images": Path("photos"), "data": None, "prompt": "?"}, "--images photos"),
    ],
)
def test_a_fit_without_labels_is_not_in_this_version(tmp_path, monkeypatch, changes, given):
    """What was given, that it is not there, and what to do now; nothing is loaded or written."""
    monkeypatch.setattr(calibrate_command, "load_chosen", lambda *_, **__: pytest.fail("loaded"))
    says = rf"{given} asks for .* not in this version: .* another fit .* --labels .* --preset"
    with pytest.raises(CalibrationError, match=says):
        calibrate_command.run(options(tmp_path, labels=False, **changes))
    assert not (tmp_path / "p.json").exists()


def test_a_preset_that_was_fitted_without_labels_is_read():
    """Written by the last version that had this fit."""
    file = Path(__file__).parent.parent / "fixtures" / "preset_without_labels.json"
    assert read_preset_file(file)["fitted"]["labels"] is False
    stages = preset(str(file)).refinements().stages
    assert stages[2] == DACG(high_std=0.023, high_mean=0.0042, low_mean=0.0037)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"preset": "base"}, "no refinement with a threshold"),
        ({"preset": "papper"}, "did you mean 'paper'"),
        ({"dtype": "float8"}, "unknown dtype"),
        ({"words": "verbs"}, "unknown words"),
        ({"dataset": "scene"}, "did you mean 'scenes'"),
        ({"device": "gpu"}, "unknown device"),
        ({"output": Path("preset")}, r"ends in \.json"),
        ({"start": 40}, "--start is 40, and the data set has 40 images"),
        ({"limit": None, "check_limit": 5}, "--check-start is 40"),
        ({"check_start": 2}, "2 images are in both parts, 2 first.*--check-start 4"),
        ({"data": ["count"]}, "--data 'count': expected name=value"),
        ({"generation": ["x"]}, "--generation 'x': expected name=value"),
        ({"images": Path("x")}, "--images are images without masks"),
        ({"seed": -1}, "--seed is -1"),
    ],
)
def test_errors_before_any_work(tmp_path, monkeypatch, changes, message):
    monkeypatch.setattr(calibrate_command, "load_chosen", lambda *_, **__: pytest.fail("loaded"))
    with pytest.raises((ValueError, UnknownNameError, OSError), match=message):
        calibrate_command.run(options(tmp_path, **changes))
    assert not (tmp_path / "p.json").exists()


def test_too_little_data_writes_nothing(command, tmp_path):
    with pytest.raises(CalibrationError, match="a search fits noise"):
        command(options(tmp_path, limit=5))
    assert not (tmp_path / "p.json").exists()
