"""Kill an evaluation at random moments: ``python killing.py FOLDER SEED KILLS`` prints JSON.

Every attempt is a process of its own, forked after the imports, so that twenty of them are quick.
Writes are slow and done in two halves, so that kills land inside them too.
"""

import contextlib
import json
import os
import random
import signal
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from evaluation import made

from captum_dcam.evaluation import evaluate

IMAGES, PAUSE = 18, 0.05
write = os.write


def slow(file, data):
    half = len(data) // 2
    done = write(file, bytes(data)[:half])
    time.sleep(PAUSE)
    return done + write(file, bytes(data)[half:])


def attempt(folder, adapter):
    """A child process that evaluates what is left."""
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        os.write = slow
        data = made.Pictures(IMAGES)
        evaluate(made.plan(), folder, adapter=adapter, data=data, shard=(0, 1))
        code = 0
    finally:
        os._exit(code)


def torn(folder):
    """Files whose last line is not finished."""
    found = []
    for path in folder.glob("*-of-*.jsonl"):
        content = path.read_bytes()
        if content and not content.endswith(b"\n"):
            found.append(path.name)
    return found


def main(folder, seed, kills):
    draw, adapter = random.Random(seed), made.adapter()
    # imports and caches, once for all attempts
    evaluate(made.plan(), folder / "warm", adapter=adapter, data=made.Pictures(1), shard=(0, 1))
    start = time.perf_counter()
    assert os.waitpid(attempt(folder / "whole", adapter), 0)[1] == 0
    horizon = 2 * (time.perf_counter() - start) / kills
    record = {"killed": 0, "torn": 0, "stored": []}
    for _ in range(kills):
        child = attempt(folder / "killed", adapter)
        time.sleep(draw.uniform(0, horizon))
        with contextlib.suppress(ProcessLookupError):
            os.kill(child, signal.SIGKILL)
        record["killed"] += os.WIFSIGNALED(os.waitpid(child, 0)[1])
        record["torn"] += bool(torn(folder / "killed"))
        results = folder / "killed/results-00000-of-00001.jsonl"
        record["stored"].append(results.read_bytes().count(b"\n") if results.exists() else 0)
    record["last"] = os.waitpid(attempt(folder / "killed", adapter), 0)[1]
    print(json.dumps(record))


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
