"""Twenty kills at random moments, and shards in processes of their own: the same bytes."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from evaluation import made

from captum_dcam.evaluation import evaluate
from captum_dcam.evaluation.store import Store

HERE = Path(__file__).parent
pytestmark = pytest.mark.skipif(os.name != "posix", reason="fork and SIGKILL")
SHARD = """
import sys
from pathlib import Path
sys.path.insert(0, sys.argv[2])
from evaluation import made
from captum_dcam.evaluation import evaluate
print(evaluate(made.plan(), sys.argv[1], adapter=made.adapter(), data=made.Pictures(7)).shard)
"""
#: the same, twice at once after one import, as a launcher would start them
BOTH = SHARD.replace(
    "print(",
    """
import os
children = []
for rank in range(2):
    child = os.fork()
    if not child:
        os.environ.update(RANK=str(rank), WORLD_SIZE="2")
        break
    children.append(child)
if children and child:
    sys.exit(max(os.waitpid(one, 0)[1] for one in children))
print(""",
)


def run(*command, **variables):
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **variables}
    return subprocess.Popen(
        list(map(str, command)),
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def finish(process):
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, err[-3000:]
    return out


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0])
def test_a_run_killed_twenty_times_ends_with_the_same_bytes(tmp_path, seed):
    report = json.loads(finish(run(sys.executable, HERE / "killing.py", tmp_path, seed, 20)))
    assert report["killed"] == 20 and report["last"] == 0
    assert report["torn"], "no kill landed inside a write"
    stored = report["stored"]
    assert stored == sorted(stored) and 0 < stored[-1] < 18, "kills were not spread over the run"
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    names = {p.name for p in whole.iterdir()}
    assert names == {p.name for p in killed.iterdir()}
    for name in ("plan.json", "results-00000-of-00001.jsonl", "results.jsonl"):
        assert (whole / name).read_bytes() == (killed / name).read_bytes()
    costs = [[c["id"] for c in Store.read(folder).costs()] for folder in (whole, killed)]
    assert costs[0] == costs[1] == list(range(18))


def test_two_processes_merge_to_the_bytes_of_one(tmp_path):
    evaluate(made.plan(), tmp_path / "one", adapter=made.adapter(), data=made.Pictures(7))
    out = finish(run(sys.executable, "-c", BOTH, tmp_path / "two", HERE.parent))
    assert sorted(out.split("\n")) == ["", "(0, 2)", "(1, 2)"]
    assert made.results(tmp_path / "one") == made.results(tmp_path / "two")


@pytest.mark.slow
def test_accelerate_launch_spreads_a_run(tmp_path):
    pytest.importorskip("accelerate")
    script = tmp_path / "shard.py"
    script.write_text(SHARD)
    # without a GPU too, --multi_gpu is what makes accelerate start several processes
    launch = "-m accelerate.commands.launch --multi_gpu --num_processes=2 --num_machines=1 "
    launch += "--mixed_precision=no --dynamo_backend=no --main_process_port=0"
    there = (script, tmp_path / "two", HERE.parent)
    out = finish(run(sys.executable, *launch.split(), *there, HF_HOME=str(tmp_path / "home")))
    assert sorted(re.findall(r"\(\d, 2\)", out)) == ["(0, 2)", "(1, 2)"]
    evaluate(made.plan(), tmp_path / "one", adapter=made.adapter(), data=made.Pictures(7))
    assert made.results(tmp_path / "one") == made.results(tmp_path / "two")
