"""``captum-dcam evaluate`` and ``table``: what they write and print, and how they fail."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
from evaluation import made_results
from typer.testing import CliRunner

from captum_dcam.calibration import fit
from captum_dcam.calibration.maps import Masked
from captum_dcam.cli.app import app
from captum_dcam.errors import InputError
from captum_dcam.evaluation import Plan, Store, frame
from captum_dcam.presets import preset, write_preset
from captum_dcam.refine import CBA, MinMax

pytestmark = pytest.mark.usefixtures("weights_read_once")
FEW = ["--data", "count=3", "--limit", 2, "--generation", "gen_length=12"]


def call(*arguments):
    return CliRunner().invoke(app, [str(a) for a in arguments], catch_exceptions=False)


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cli") / "results"
    options = ["-M", "oracle,random,tam:filter=5,order=position", "-w", "object,function"]
    options += ["--metrics", "localization", "--metrics", "pointing:tolerance=3.0"]
    done = call("evaluate", *options, *FEW, "-o", folder, "--json")
    assert done.exit_code == 0, done.output
    return folder, json.loads(done.stdout)


def test_one_plan_from_options(measured):
    folder, (found,) = measured
    plan = Plan.from_record(found["plan"])
    assert [v.name for v in plan.variants] == ["oracle", "random", 'tam:filter=5,order="position"']
    assert plan.metrics[1] == {"name": "pointing", "tolerance": 3.0, "label": ""}
    assert plan.words == ("object", "function") and plan.generation == {"gen_length": 12}
    assert found["measured"] == 2 and found["left"] == 0
    assert Path(found["merged"]) == folder / "results.jsonl"
    assert len(list(Store.read(folder).records())) == 2


def test_a_stored_plan_names_the_model_and_how_it_is_loaded(measured, tmp_path, monkeypatch):
    from captum_dcam.cli import evaluate as evaluate_command

    asked = []

    def loaded(source, settings, **options):
        asked.append((source, settings, options["dtype"]))
        raise InputError("enough")

    monkeypatch.setattr(evaluate_command, "load_model", loaded)
    _, (found,) = measured
    plan = Plan.from_record({**found["plan"], "model": "x", "dtype": "bfloat16"})
    assert "load" not in plan.record()
    made = {**plan.record(), "load": {"revision": "main", "family": "lavida"}}
    assert Plan.from_record(made).record() == made
    (tmp_path / "plan.json").write_text(json.dumps(made))
    call("evaluate", "--plan", tmp_path / "plan.json", "--load", "family=dream_vl")
    assert asked == [("x", {"revision": "main", "family": "dream_vl"}, "bfloat16")]


def test_the_same_command_goes_on_and_a_stored_plan_is_the_same_again(measured, tmp_path):
    folder, (found,) = measured
    options = ["--plan", folder / "plan.json", "-o", folder]
    again = json.loads(call("evaluate", *options, "--json").stdout)
    assert again[0]["measured"] == 0 and again[0]["plan"] == found["plan"]
    for shard in ("0/2", "1/2"):
        done = call("evaluate", "--plan", folder / "plan.json", "-o", tmp_path, "--shard", shard)
        assert done.exit_code == 0, done.output
    whole, parts = (f / "results.jsonl" for f in (folder, tmp_path))
    assert whole.read_bytes() == parts.read_bytes()


def test_means_are_shown_at_the_end(measured):
    folder, _ = measured
    done = call("evaluate", "--plan", folder / "plan.json", "-o", folder)
    assert "Means over words" in done.stdout and "oracle" in done.stdout
    shown = call("table", "summary", "-r", folder, "--markdown").stdout
    assert "### Means over words" in shown and "f3" in shown


@pytest.mark.slow
def test_a_suite_in_folders_of_its_parts(tmp_path):
    options = ["--suite", "feasibility", "--data", "count=61", "--start", 60, "-o", tmp_path]
    done = call("evaluate", *options, "--generation", "gen_length=8")
    assert done.exit_code == 0, done.output
    assert {p.name for p in tmp_path.iterdir()} == {"feasibility-prefix", "feasibility-full"}
    shown = call("table", "feasibility", "steps", "-r", tmp_path, "-o", tmp_path / "tables")
    assert shown.exit_code == 0 and "PASS" in shown.stdout and "FAIL" in shown.stdout
    written = {p.name for p in (tmp_path / "tables").iterdir()}
    names = {f"{n}.{s}" for n in ("feasibility", "steps") for s in ("md", "csv", "tex")}
    assert written == names | {"tables.json"}  # with their hashes: what a later call may replace


def test_all_tables_that_the_results_allow(tmp_path, monkeypatch):
    monkeypatch.setattr(frame, "RESAMPLES", 20)  # how wide intervals are is not asked
    made_results.results(tmp_path, "objects")
    done = call("table", "all", "-r", tmp_path)
    assert done.exit_code == 0 and "Comparison of methods" in done.stdout
    (line,) = done.stderr.splitlines()
    assert "others need parts that" in line
    one = call("table", "economy", "-r", tmp_path)
    assert one.exit_code == 2 and "--suite economy" in one.stderr
    nowhere = call("table", "-r", tmp_path / "nowhere")
    assert nowhere.exit_code == 2 and "nowhere is not a folder" in nowhere.stderr


def test_lists():
    shown = call("evaluate", "--list").stdout
    assert "papers" in shown and "grandf" in shown and "answer_shuffle" in shown
    assert json.loads(call("evaluate", "--list", "--json").stdout)["floors"]
    assert "Table 12" in call("table", "--list").stdout


BAD = {
    "nothing": ([], "give one of --suite, --plan and --methods; none of them"),
    "two": (["-M", "tam", "--suite", "papers"], "--suite and --methods is given"),
    "suite": (["--suite", "paprs"], "did you mean 'papers'"),
    "suite with more": (["--suite", "objects", "--score", "final"], "leave out --score"),
    "method": (["-M", "tamm"], "unknown method 'tamm'"),
    "metric": (["-M", "tam", "--metrics", "f33"], "unknown metric 'f33'"),
    "metric setting": (["-M", "tam", "--metrics", "pointing:radius=3"], "has no setting 'radius'"),
    "data": (["-M", "tam", "-d", "cocoo"], "unknown data set 'cocoo'"),
    "data setting": (["-M", "tam", "--data", "count"], "expected name=value"),
    "no root": (["-M", "tam", "-d", "coco"], "needs root"),
    "root": (["-M", "tam", "-d", "coco", "--root", "."], "annotations"),
    "words": (["-M", "tam", "-w", "verbs"], "unknown kind of word 'verbs'"),
    "shard": (["-M", "tam", "--shard", "2/2"], "expected i/n"),
    "errors": (["-M", "tam", "--errors", "ignore"], "on_error is 'ignore'"),
    "device": (["-M", "tam", "--device", "abacus"], "unknown device"),
    "refinement": (["-M", "tam", "--refine", "blur"], "unknown refinement 'blur'"),
    "start": (["-M", "tam", "--data", "count=2", "--start", 5], "the data set has 2"),
    "plan file": (["--plan", "absent.json"], "absent.json"),
    "table": (None, "did you mean 'comparison'"),
    "results": (None, "is not a folder"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_clear_line(case, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    options, says = BAD[case]
    if options is not None:
        done = call("evaluate", *options, "-o", tmp_path / "out")
    else:
        done = call("table", "comparson" if case == "table" else "comparison", "-r", "nowhere")
    assert done.exit_code == 2, done.output
    assert says in done.stderr and done.stderr.strip().count("\n") == 0
    assert not (tmp_path / "out").exists()


def test_results_of_other_settings_are_refused_before_work(measured):
    folder, _ = measured
    done = call("evaluate", "-M", "tam", *FEW, "-o", folder)
    assert done.exit_code == 2 and "holds another evaluation" in done.stderr
    assert len(list(Store.read(folder).records())) == 2


def test_a_calibrated_preset_is_used_by_its_file(tmp_path, monkeypatch):
    one = {n: p if n == "cba.gamma" else replace(p, tried=()) for n, p in fit.PARAMETERS.items()}
    monkeypatch.setattr(fit, "PARAMETERS", one)
    file, start = tmp_path / "preset.json", tmp_path / "start.json"
    write_preset(start, "default", preset("default"), (MinMax(), CBA()), {})
    monkeypatch.setattr(Masked, "least", (3, 4))  # what is asked of a fit that is to be trusted
    options = ["--data", "count=4", "--preset", start, "-o", file]
    short = ["--generation", "gen_length=8", "--generation", "steps=4"]
    done = call("calibrate", "--labels", *options, *short)
    assert done.exit_code == 0, done.output
    assert "cba.gamma" in done.stdout and file.is_file()
    shown = call("explain", "--preset", file, "--gen-length", 2, "-o", tmp_path / "out", "--json")
    assert shown.exit_code == 0, shown.output
    assert json.loads(shown.stdout)["settings"]["preset"] == str(file)


def test_a_fit_that_cannot_be_made_is_one_clear_line(tmp_path):
    cases = {
        "no refinement with a setting": ["--labels", "--preset", "base"],
        "gained nothing": ["--preset", "paper"],
        "has no images": ["--images", tmp_path, "-p", "?"],
    }
    for says, options in cases.items():
        done = call("calibrate", *options, "-o", tmp_path / "preset.json")
        assert done.exit_code == 2 and done.stderr.startswith("Error: ")
        assert "\n" not in done.stderr.strip()
        assert says in done.stderr
    assert not (tmp_path / "preset.json").exists()
