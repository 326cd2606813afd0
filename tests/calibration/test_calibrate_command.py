"""``captum-dcam calibrate``: what it writes and prints, and how it fails."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import tiny
from calibration.made_maps import FOUR, PAPER, SHORT, Pictures, f3, gathered

from captum_dcam import explain
from captum_dcam.calibration import Chain
from captum_dcam.cli import calibrate as calibrate_command
from captum_dcam.cli.printing import print_json
from captum_dcam.errors import CalibrationError, UnknownNameError
from captum_dcam.presets import preset, read_preset_file, write_preset
from captum_dcam.refine import CBA, DACG, Compose, MinMax

#: a fit without masks, which paper's stages cannot have
FREE = {"labels": False, "preset": "default", "generation": ["gen_length=3"]}


def options(tmp_path, **changes):
    own = dict(
        images=None, dataset="scenes", root=None, data=["count=40"], labels=True, words="nouns",
        start=0, limit=4, check_start=None, check_limit=None, prompt=None, preset="paper",
        layers=None, model="mini", load=None, cache=None, layer=None,
        generation=["gen_length=16"], seed=0,
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
    start, exact = tmp_path / "four.json", replace(FOUR, backward="exact")
    write_preset(start, "default", exact, PAPER, {})
    chosen = options(tmp_path, preset=str(start), limit=12, check_start=20, check_limit=3)
    done = command(chosen)
    record = read_preset_file(tmp_path / "p.json")
    assert record["base"] == str(start) and record["fitted"] == json.loads(json.dumps(done.record))
    assert record["fitted"]["images"] == list(range(12))
    assert record["fitted"]["check"]["images"] == [20, 21, 22]
    assert record["fitted"]["labels"] is True and record["fitted"]["weights"]
    fitted = preset(str(tmp_path / "p.json")).refinements()
    assert fitted == Compose(done.calibration.fitted)
    assert tuple(done.calibration.fitted) != PAPER, "the search has found something"
    gain, (before, after) = done.checked
    other = gathered(3, exact, first=20)
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


def test_a_preset_that_was_fitted_without_labels_is_read():
    """Written by the last version that had this fit."""
    file = Path(__file__).parent.parent / "fixtures" / "preset_without_labels.json"
    assert read_preset_file(file)["fitted"]["labels"] is False
    stages = preset(str(file)).refinements().stages
    assert stages[2] == DACG(high_std=0.023, high_mean=0.0042, low_mean=0.0037)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"preset": "base"}, "no refinement with a setting that is fitted"),
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
        ({"layers": "1-3"}, "--layers '1-3': expected numbers of blocks with commas"),
        ({"layers": "1,"}, "--layers '1,'"),
        ({"labels": False}, "no affinity .*min_max.* without labels .* gained nothing.*'default'"),
        ({"labels": False, "preset": "base"}, "no affinity .*none"),
        (
            {**FREE, "images": Path("none"), "data": None, "prompt": "?"},
            "none is no folder: expected one with images",
        ),
        ({**FREE, "images": Path("x"), "data": None}, "--images have no prompt"),
        ({**FREE, "images": Path("x"), "prompt": "?"}, "leave out --root and --data"),
        ({"seed": -1}, "--seed is -1"),
    ],
)
def test_errors_before_any_work(tmp_path, monkeypatch, changes, message):
    monkeypatch.setattr(calibrate_command, "load_chosen", lambda *_, **__: pytest.fail("loaded"))
    with pytest.raises((ValueError, UnknownNameError, OSError), match=message):
        calibrate_command.run(options(tmp_path, **changes))
    assert not (tmp_path / "p.json").exists()


def test_command_without_masks(command, tmp_path, capsys):
    """Blocks, power and center by insertion; the preset names the block, and explain taps it."""
    chosen = options(tmp_path, **FREE, words="all", limit=4, check_limit=1, layers="all")
    done = command(chosen)
    found, record = done.calibration, read_preset_file(tmp_path / "p.json")
    assert list(found.before) == ["affinity.power", "affinity.center"]
    assert list(found.blocks) == [adapter_block(), *others()] and not found.kind.labelled
    assert record["layer"] == found.layer == record["fitted"]["layer"]
    assert record["fitted"]["labels"] is False and record["fitted"]["words"] == "all"
    assert 0 < found.passes == record["fitted"]["passes"]
    assert found.evaluations <= 10 * len(found.blocks)
    assert list(done.checked[0].before) == ["insertion"]
    calibrate_command.print_calibration(done)
    shown = capsys.readouterr().out
    for text in ("without masks", "forward passes", "Insertion", "Blocks", "cross-validated"):
        assert text in shown
    read = preset(str(tmp_path / "p.json"))
    assert read.layer == found.layer and tuple(read.refinements()) == found.fitted
    explained = explain(tiny.adapter("prefix"), tiny.picture(), tiny.PROMPT, preset=read, **SHORT)
    assert explained.settings["layer"] == found.layer


def adapter_block():
    return tiny.adapter("prefix").recommended_block


def others():
    return [n for n in range(tiny.adapter("prefix").deepest_block + 1) if n != adapter_block()]


def test_images_of_a_folder(command, tmp_path):
    folder = tmp_path / "images"
    folder.mkdir()
    for i in range(5):
        tiny.picture(i).save(folder / f"{i}.png")
    (folder / "note.txt").write_text("no image")
    given = {"images": folder, "data": None, "prompt": tiny.PROMPT, "words": "all", "limit": 4}
    done = command(options(tmp_path, **FREE, **given))
    record = read_preset_file(tmp_path / "p.json")
    assert record["fitted"]["images"] == ["0.png", "1.png", "2.png", "3.png"]
    assert "layer" not in record and preset(str(tmp_path / "p.json")).layer is None
    assert done.calibration.layer == adapter_block()


def test_too_little_data_writes_nothing(command, tmp_path):
    with pytest.raises(CalibrationError, match="a search fits noise"):
        command(options(tmp_path, limit=5))
    assert not (tmp_path / "p.json").exists()


def test_a_fit_with_masks_also_tells_how_well_maps_localise(command, tmp_path, monkeypatch):
    """Where there are enough words of either kind; else the file has none, and nothing fails."""
    done = command(options(tmp_path, limit=12, preset="default"))
    found = preset(str(done.file)).reliability
    assert found == done.reliability and "words for objects" in found.fitted_on
    assert found.features[-1] == "agreement"
    monkeypatch.setattr("captum_dcam.calibration.reliability.LEAST", 10**6)
    few = command(options(tmp_path, limit=12, preset="default"))
    assert few.reliability is None and "reliability" not in read_preset_file(few.file)
