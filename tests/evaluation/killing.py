"""Kill evaluations at every step that changes a file: ``python killing.py FOLDER`` prints JSON.

Every attempt is a process of its own, forked after the imports, so that a hundred of them are
quick. It tells at which step it stands and waits there for its end; so nothing hangs on a clock.
"""

import contextlib
import gc
import json
import os
import signal
import sys
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from evaluation import made

from captum_dcam.evaluation import evaluate

IMAGES, BAD = 9, (1, 3)
PLAN = made.plan(variants=("oracle", "random"), metrics=("localization",), words=("object",))


class Steps:
    r"""What a process does to the files of a folder, halted before the first step that is new.

    A step is what is done, to which file, and how often it was done before in this process (at most
    once, so that the first image and a later one count).

    Args:
        folder (Path): whose files are watched.
        seen (set of str): steps at which processes were ended before.
        halt (callable): is called with a step, and does not return.
    """

    def __init__(self, folder, seen, halt):
        self.folder, self.seen, self.halt, self.times = folder, seen, halt, Counter()

    def stand(self, step, name):
        kind = name.partition("-00000-of-")[0]
        self.times[step, kind] += 1
        label = f"{step} {kind} {min(self.times[step, kind], 2)}"
        if label not in self.seen:
            self.halt(label)

    def name(self, handle):
        """The file of the folder, or the folder itself, behind a handle; None for others."""
        here = os.fstat(handle).st_ino
        places = (self.folder, *self.folder.iterdir()) if self.folder.is_dir() else ()
        for place in places:
            with contextlib.suppress(FileNotFoundError):  # another process's
                if place.stat().st_ino == here:
                    return "folder" if place == self.folder else place.name
        return None

    def around(self, verb, function, named):
        """A function that halts before its work; after it is before the next."""

        def work(first, *rest, **options):
            if (name := named(first)) is not None:
                self.stand(f"before {verb}", name)
            return function(first, *rest, **options)

        return work

    def writing(self, write):
        """Writes in two halves."""

        def work(handle, data):
            if (name := self.name(handle)) is None:
                return write(handle, data)
            self.stand("before write", name)
            half = write(handle, bytes(data)[: len(data) // 2])
            self.stand("half write", name)
            return half + write(handle, bytes(data)[half:])

        return work

    def watch(self):
        """From here on, in this process."""
        os.write = self.writing(os.write)
        for verb in ("fsync", "ftruncate"):
            setattr(os, verb, self.around(verb, getattr(os, verb), self.name))
        os.truncate = self.around("truncate", os.truncate, lambda path: Path(path).name)
        for verb in ("replace", "unlink"):
            change = self.around(verb, getattr(Path, verb), lambda path: path.name)
            setattr(Path, verb, change)


def attempt(folder, adapter, seen=None, **settings):
    """The step at which a child was killed, or its exit status where it came to its end."""
    heard, tell = os.pipe()
    stay, hold = os.pipe()
    child = os.fork()
    if not child:
        os.close(heard), os.close(hold)
        say, code = os.write, 1

        def halt(label):
            say(tell, label.encode() + b"\n")
            os.read(stay, 1)  # for ever: nothing is ever written there; unless the parent dies
            os._exit(1)

        try:
            if seen is not None:
                Steps(folder, seen, halt).watch()
            evaluate(PLAN, folder, adapter=adapter, shard=(0, 1), **settings)
            code = 0
        finally:
            os._exit(code)
    os.close(tell), os.close(stay)
    with open(heard) as pipe:
        label = pipe.readline().strip()
    if label:
        os.kill(child, signal.SIGKILL)
    status = os.waitpid(child, 0)[1]
    os.close(hold)
    return label or status


def lines(path):
    """Indices of the whole lines of a file, None without one; whether the last is torn."""
    if not path.exists():
        return None, False
    content = path.read_bytes()
    whole = content[: content.rfind(b"\n") + 1].splitlines()
    return [json.loads(line)["index"] for line in whole], content[-1:] not in (b"", b"\n")


def ended(folder, adapter, seen, **settings):
    """Kill processes at every step that was not seen, until one comes to its end; what was found
    after each kill."""
    report = []
    while isinstance(step := attempt(folder, adapter, seen, **settings), str):
        seen.add(step)
        found = {"step": step}
        for kind in ("results", "costs"):
            stored, torn = lines(folder / f"{kind}-00000-of-00001.jsonl")
            found |= {kind: stored or [], f"{kind} torn": torn}
            found[f"{kind} merged"] = lines(folder / f"{kind}.jsonl")
        header = folder / "plan.json"
        found["header"] = header.read_text() if header.exists() else None
        report.append(found)
    return {"kills": report, "status": step}


def shards(folder, adapter, count=2):
    """Exit statuses of processes that run at once, as a launcher would start them."""
    children = []
    for rank in range(count):
        child = os.fork()
        if not child:
            code = 1
            try:
                os.environ.update(RANK=str(rank), WORLD_SIZE=str(count))
                done = evaluate(made.plan(), folder, adapter=adapter, data=made.Pictures(3))
                code = 0 if done.shard == (rank, count) else 2
            finally:
                os._exit(code)
        children.append(child)
    return [os.waitpid(child, 0)[1] for child in children]


def main(folder):
    adapter, good = made.adapter(), made.Pictures(IMAGES)
    some, few = made.Pictures(4), made.Pictures(4, BAD)
    seen, again = set(), {"data": some, "on_error": "skip", "retry": True}
    # imports and caches, once for all attempts
    evaluate(PLAN, folder / "warm", adapter=adapter, data=made.Pictures(1), shard=(0, 1))
    gc.freeze()  # else every child looks through all that is there, and so copies it
    report = {
        "whole": attempt(folder / "whole", adapter, data=good),
        "killed": ended(folder / "killed", adapter, seen, data=good),
        "failed": attempt(folder / "mended", adapter, data=few, on_error="skip"),
        "mended": ended(folder / "mended", adapter, seen, **again),
        "good": attempt(folder / "good", adapter, data=some),
        "two": shards(folder / "two", adapter),
    }
    print(json.dumps(report))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
