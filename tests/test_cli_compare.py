"""captum-dcam compare: what it prints and writes, methods as text, and how it fails."""

import csv
import json
from contextlib import contextmanager
from dataclasses import dataclass
from types import SimpleNamespace
from typing import ClassVar

import pytest
from methods import made
from PIL import Image
from typer.testing import CliRunner
from viewer.made import picture

from captum_dcam.cli.app import app
from captum_dcam.cli.compare import list_methods, ordered
from captum_dcam.cli.parsing import built, parse_methods
from captum_dcam.methods import METHODS, Method, MethodFacts, method_names, register_method
from captum_dcam.results.comparison import Comparison

pytestmark = pytest.mark.usefixtures("weights_read_once")
SHORT = ["--gen-length", "4"]
OURS = "diffusion_cam,diffusion_cam_base"
FILES = {
    *("panel.png", "index.html", "image-0.png"),
    *("comparison.json", "comparison.csv", "maps.safetensors"),
}


def call(*arguments: object):
    return CliRunner().invoke(app, ["compare", *map(str, arguments)], catch_exceptions=False)


@contextmanager
def typed():
    """A method with a setting of every type."""

    @register_method("typed")
    @dataclass(frozen=True)
    class Typed(Method):
        flag: bool = True
        count: int = 3
        size: float = 0.5
        name_of: str = "mean"
        block: int | None = None
        scales: tuple[float, ...] = (1.0,)
        odd: dict | None = None
        facts: ClassVar[MethodFacts] = MethodFacts("Typed", "gradient", "this test", "1")

        def attribute(self, problem):
            raise NotImplementedError

        def __post_init__(self):
            if self.count < 0:
                raise ValueError(f"count is {self.count}: expected 0 or more")

    try:
        yield Typed
    finally:
        METHODS.remove("typed")


# -- a run on a scene ------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def scene_run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cli") / "out"
    run = call("--scene", 1, "--json", "-M", OURS, "-w", "all", "-o", folder, "--gen-length", 8)
    assert run.exit_code == 0, run.output
    return folder, json.loads(run.stdout)


def test_json_describes_what_was_written(scene_run):
    folder, document = scene_run
    assert {p.name for p in folder.iterdir()} == FILES
    assert document["output"] == str(folder) and document["picture"] == "held-out scene 1"
    loaded = Comparison.load(folder)
    assert [m["name"] for m in document["methods"]] == OURS.split(",")
    assert [w["text"] for w in document["words"]] == list(loaded.words)
    assert document["answer"] == loaded.answer
    assert any(m["means"]["f3"] is not None for m in document["methods"])
    assert loaded.masks is not None and any(m is not None for m in loaded.masks)
    with (folder / "comparison.csv").open(encoding="utf-8") as file:
        assert len(list(csv.DictReader(file))) == len(loaded.rows) * len(loaded.words)
    assert Image.open(folder / "panel.png").width == 1600


def test_a_file_is_compared_for_people(tmp_path):
    file, out = tmp_path / "p.png", tmp_path / "out"
    picture((40, 30)).save(file)
    with made.registered("made"):
        options = ["-M", "made:fails=no such thing", "-M", OURS, "-w", "all", "--sort", "name"]
        run = call(file, *options, "-o", out, "--scale", "row", "--refine", "min_max", *SHORT)
    assert run.exit_code == 0, run.output
    for text in ("Method", "× time", "diffusion_cam_base", "panel.png", "against diffusion_cam"):
        assert text in run.stdout
    assert "made failed: ValueError: no such thing" in run.stdout
    assert "F3" not in run.stdout  # no masks are known
    loaded = Comparison.load(out)
    assert [r.status for r in loaded.rows] == ["failed", "done", "done"]
    assert [s["name"] for s in loaded.settings["refinements"]["stages"]] == ["min_max"]
    lines = [line.split()[0] for line in run.stdout.splitlines() if " done " in line]
    assert lines == sorted(lines)


def test_default_words_are_nouns_and_budgets_make_partial_rows(tmp_path):
    with made.registered("made"):
        options = ["--scene", 12, "-M", "made", "--budget-passes", 1, "-o", tmp_path / "out"]
        run = call(*options, "--seed", 2)
    assert run.exit_code == 0, run.output
    loaded = Comparison.load(tmp_path / "out")
    assert "circle" in loaded.words and "a" not in loaded.words
    assert loaded.rows[0].status == "partial" and "partial, 1 of" in run.stdout


def test_an_earlier_comparison_is_replaced_and_nothing_else(tmp_path):
    out = tmp_path / "out"
    options = ["-M", "diffusion_cam_base", "-w", "all", "-o", out, *SHORT]
    for _ in range(2):
        assert call(*options).exit_code == 0
    (out / "notes.txt").write_text("mine")
    run = call(*options, "--model", "never looked at")
    assert run.exit_code == 2 and "notes.txt" in run.stderr
    assert {p.name for p in out.iterdir()} == {*FILES, "notes.txt"}
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_when_all_fail_the_reasons_are_told_and_nothing_is_written(tmp_path):
    with made.registered("made"):
        run = call("-M", "made:fails=no such thing", "-w", "all", "-o", tmp_path / "out", *SHORT)
    assert run.exit_code == 2 and run.stdout == ""
    assert "no method gave a map. made: ValueError: no such thing" in run.stderr
    assert not list(tmp_path.iterdir())


def test_a_failure_while_writing_leaves_nothing(tmp_path, monkeypatch):
    def full(*_args, **_kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("captum_dcam.files.save_file", full)
    run = call("-M", "diffusion_cam_base", "-w", "all", "-o", tmp_path / "out", *SHORT)
    assert run.exit_code == 2 and "No space left" in run.stderr
    assert not list(tmp_path.iterdir())


BAD = {
    "missing file": (["nowhere.png"], "nowhere.png: no such file"),
    "image and scene": (["p.png", "--scene", 2], "--scene"),
    "method": (["-M", "difusion_cam"], "did you mean 'diffusion_cam"),
    "setting": (["-M", "diffusion_cam:sise=3"], "'diffusion_cam' has no setting 'sise'"),
    "no name": (["-M", "size=3"], "there is no name before 'size=3'"),
    "no value": (["-M", "diffusion_cam:size"], "expected name=value"),
    "passes": (["--budget-passes", 0], "budget's passes is 0"),
    "seconds": (["--budget-seconds", -1], "budget's seconds is -1.0"),
    "scale": (["--scale", "rows"], "did you mean 'row'"),
    "sort": (["--sort", "F3"], "unknown order 'F3'"),
    "score": (["--score", "last"], "unknown score 'last'"),
    "step": (["--score", 99, *SHORT], "score is 99: this generation has"),
    "foil": (["--foil", "zebra", *SHORT], "the foil 'zebra' reads"),
    "refinement": (["--refine", "gausian"], "did you mean 'gaussian'"),
    "device": (["--device", "abacus"], "unknown device 'abacus'"),
    "word": (["--words", "zebra", *SHORT], "'zebra' is not in the answer"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_clear_line(case, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    picture((20, 20)).save("p.png")
    options, message = BAD[case]
    methods = [] if "-M" in options else ["-M", "diffusion_cam_base"]
    run = call(*options, *methods, "--json")
    assert run.exit_code == 2 and message in run.stderr, run.stderr
    assert run.stdout == "" and run.stderr.strip().count("\n") == 0
    assert [p.name for p in tmp_path.iterdir()] == ["p.png"], "something was left behind"


# -- methods as text -------------------------------------------------------------------------------


def test_settings_are_parsed_by_their_types():
    with typed() as kind:
        text = "typed:flag=no,count=5,size=1e-2,name_of=zero,block=none,scales=0.5+1,diffusion_cam"
        first, second = parse_methods([text])
        assert first == kind(False, 5, 0.01, "zero", None, (0.5, 1.0))
        assert second.name == "diffusion_cam"
        again = parse_methods(["diffusion_cam", "typed:block=-1", "typed : flag = on"])
        assert again == (second, kind(block=-1), kind())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"flag": "maybe"}, "typed:flag is 'maybe': expected true or false"),
        ({"count": "3.5"}, "typed:count is '3.5': expected a whole number"),
        ({"size": "big"}, "typed:size is 'big': expected a number"),
        ({"block": "x"}, "typed:block is 'x': expected a whole number"),
        ({"scales": "1+x"}, "typed:scales is 'x': expected a number"),
        ({"odd": "x"}, "typed:odd cannot be set on the command line"),
        ({"cuont": "1"}, "no setting 'cuont'; did you mean 'count'"),
        ({"count": "-1"}, "count is -1"),
    ],
)
def test_bad_settings_are_explained(settings, message):
    with typed(), pytest.raises(ValueError, match=message.replace("(", r"\(")):
        built("typed", settings)


def test_all_and_no_repeats():
    assert [m.name for m in parse_methods(["all"])] == list(method_names())
    assert len(parse_methods(["diffusion_cam", "diffusion_cam,diffusion_cam"])) == 1


def test_list_of_methods():
    run = call("--list-methods")
    assert run.exit_code == 0 and all(name in run.stdout for name in METHODS)
    records = json.loads(call("--list-methods", "--json").stdout)
    assert [r["name"] for r in records] == list(method_names())
    with typed():
        (own,) = [r for r in list_methods() if r["name"] == "typed"]
    assert own["settings"]["scales"] == [1.0] and own["maps"] == ["image"]
    assert own["group"] == "gradient" and own["runs_on"] == ["dMLLM", "AR"]


def test_help_names_what_there_is():
    shown = CliRunner().invoke(app, ["compare", "--help"], env={"COLUMNS": "200"}).stdout
    for name in ("--methods", "--budget-seconds", "--list-methods", "--scale", "--sort", "nouns"):
        assert name in shown


def test_the_orders_of_the_table():
    """Best F3 first and none last, quickest first and failed last, names, or as asked."""

    def row(name, status, seconds, f3):
        cost = SimpleNamespace(seconds=seconds)
        mean = {"f3": f3, "obj_iou": seconds}.get
        return SimpleNamespace(name=name, status=status, cost=cost, mean=mean)

    rows = [
        row("b", "failed", 0.1, None),
        row("d", "done", 3.0, 0.2),
        row("a", "partial", 1.0, 0.0),
        row("c", "done", 2.0, 0.7),
    ]
    names = {sort: "".join(r.name for r in ordered(rows, sort)) for sort in SORTS}
    assert names == {"f3": "cdab", "seconds": "acdb", "name": "abcd", None: "bdac"}


SORTS = ("f3", "seconds", "name", None)
