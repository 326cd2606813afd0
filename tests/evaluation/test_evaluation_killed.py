"""Kills at every step that changes a file, and shards in processes of their own: the same bytes."""

import itertools
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from evaluation import made

from captum_dcam.evaluation import evaluate
from captum_dcam.evaluation.store import Store

HERE = Path(__file__).parent
pytestmark = pytest.mark.skipif(os.name != "posix", reason="fork and SIGKILL")
#: a program that keeps what its launcher has told it
TOLD = """
import json, os, sys
with open(f"{sys.argv[1]}/{os.environ['RANK']}.json", "x") as file:
    json.dump(dict(os.environ), file)
"""


def finished(*command, **variables):
    """What a program printed."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **variables}
    done = subprocess.run(
        list(map(str, command)), env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("killed")


@pytest.fixture(scope="module")
def report(folder):
    """All kills, and two shards at once: one program, because imports take longest."""
    return json.loads(finished(sys.executable, HERE / "killing.py", folder))


@pytest.fixture(scope="module")
def one(tmp_path_factory):
    """The results of one process that does everything."""
    where = tmp_path_factory.mktemp("one")
    evaluate(made.plan(), where, adapter=made.adapter(), data=made.Pictures(3), shard=(0, 1))
    return made.results(where)


def content(folder):
    """What must be the same: everything but seconds, and no file more."""
    costs = [cost["id"] for cost in Store.read(folder).costs()]
    names = sorted(path.name for path in folder.iterdir())
    return [(folder / n).read_bytes() for n in ("plan.json", "results.jsonl")], costs, names


def check_kills(kills, header, count):
    """After every kill: each file as it was before, or whole; only a line at an end is torn."""
    for kill in kills:
        step = kill["step"]
        assert kill["header"] in (None, header), step
        for kind in ("results", "costs"):
            torn = (f"half write {kind} ", f"before truncate {kind} ")
            assert kill[f"{kind} torn"] is step.startswith(torn), step
            assert kill[f"{kind} merged"] in ([None, False], [list(range(count)), False]), step
        assert set(kill["results"]) <= set(kill["costs"]), f"{step}: a result without its costs"


def test_a_run_killed_at_every_step_ends_with_the_same_bytes(report, folder):
    kills, whole = report["killed"]["kills"], folder / "whole"
    steps = {kill["step"] for kill in kills}
    for kind in ("results", "costs"):  # "2": of a later image
        again = [f"{at} {kind} {n}" for n in (1, 2) for at in ("before write", "half write")]
        new = [f"{at} .{kind}.jsonl.new 1" for at in ("half write", "before fsync")]
        cuts = [f"before truncate {kind} 1", f"before fsync {kind} 2"]
        assert steps >= {*again, *new, *cuts, f"before replace .{kind}.jsonl.new 1"}
    assert {"half write .plan.json.new 1", "before replace .plan.json.new 1"} < steps
    assert {"half write .costs 1", "before replace .costs 1"} < steps  # costs without a result
    count = Store.read(whole).count
    check_kills(kills, (whole / "plan.json").read_text(), count)
    stored = [kill["results"] for kill in kills]
    for before, after in itertools.pairwise(stored):
        assert after[: len(before)] == before, "what was stored is lost"
    assert stored[-1] == list(range(count)) and len({len(s) for s in stored}) > 5
    assert report["whole"] == report["killed"]["status"] == 0
    assert content(whole) == content(folder / "killed")


def test_a_retry_killed_at_every_step_loses_nothing_that_worked(report, folder):
    kills, steps = report["mended"]["kills"], set()
    for kill in kills:
        steps.add(kill["step"])
        assert {0, 2} <= set(kill["results"]), kill["step"]
    swap = [f"{at} .results 1" for at in ("half write", "before fsync", "before replace")]
    assert steps >= {*swap, "before unlink results.jsonl 1", "before unlink costs.jsonl 1"}
    check_kills(kills, (folder / "good/plan.json").read_text(), 4)
    assert report["failed"] == report["good"] == report["mended"]["status"] == 0
    assert content(folder / "good") == content(folder / "mended")


def test_two_processes_merge_to_the_bytes_of_one(report, folder, one):
    assert report["two"] == [0, 0]
    assert made.results(folder / "two") == one


def test_accelerate_launch_spreads_a_run(tmp_path, one, monkeypatch):
    """What it tells its programs makes shards of them. Here they run one after the other."""
    pytest.importorskip("accelerate")
    script, told, two = (tmp_path / name for name in ("told.py", "told", "two"))
    script.write_text(TOLD)
    told.mkdir()
    # without a GPU too, --multi_gpu is what makes accelerate start several processes
    launch = "-m accelerate.commands.launch --multi_gpu --num_processes=2 --num_machines=1 "
    launch += "--mixed_precision=no --dynamo_backend=no --main_process_port=0"
    finished(sys.executable, *launch.split(), script, told, HF_HOME=str(tmp_path / "home"))
    shards = []
    for file in sorted(told.iterdir()):
        variables = json.loads(file.read_text())
        with monkeypatch.context() as patch:
            for name in variables.items() - os.environ.items():
                patch.setenv(*name)
            data = made.Pictures(3)
            shards.append(evaluate(made.plan(), two, adapter=made.adapter(), data=data).shard)
    assert shards == [(0, 2), (1, 2)]
    assert made.results(two) == one
