"""The store: torn lines, full disks, locks, shards, retries; nothing lost, nothing twice."""

import errno
import json
import os
import re
import signal
import time

import pytest

from captum_dcam.errors import FileError, StoreError
from captum_dcam.evaluation.store import Store, locked
from captum_dcam.files import VERSION

PLAN = {"seed": 0, "variants": [{"name": "a", "layer": 1}]}
FACTS = {"versions": {"torch": "2"}}
IDS = [f"'image {i}'" for i in range(7)]


def opened(folder, shards=1, plan=PLAN, start=0, ids=IDS, facts=FACTS):
    return Store.open(folder, plan, facts, ids, start=start, shards=shards)


def record(index, **more):
    return {"index": index, "id": f"image {index}", "answer": "ä “word”\n" * index, **more}


def fill(store, shard=0, stop=None, failing=(), retry=False):
    with store.shard(shard, retry=retry) as part:
        for index in part.indices:
            if index == stop:
                break
            if index not in part.done:
                bad = {"error": "OSError: no"} if index in failing else {}
                part.append(record(index, **bad), {"index": index, "seconds": time.time()})


def finished(folder, shards=1, **settings):
    store = opened(folder, shards, **settings)
    for shard in range(shards):
        fill(store, shard)
    return store.merge().read_bytes()


def kinds(folder):
    return sorted(p.name for p in folder.iterdir() if not p.name.startswith("."))


def test_lines_come_back_in_order(tmp_path):
    finished(tmp_path, start=3)
    store = Store.read(tmp_path)
    assert [r["index"] for r in store.records()] == list(range(3, 10))
    assert [c["index"] for c in store.costs()] == list(range(3, 10))
    first = next(store.records())
    assert first == {**record(3), "plan": store.digest}


@pytest.mark.parametrize("shards", [2, 3, 7, 9])
def test_shards_merge_to_the_bytes_of_one_process(tmp_path, shards):
    assert finished(tmp_path / "many", shards) == finished(tmp_path / "one")


def test_merging_needs_every_shard(tmp_path):
    store = opened(tmp_path, 3)
    fill(store, 0)
    fill(store, 2, stop=5)
    with pytest.raises(StoreError, match=r"lacks 3 of 7 images, the first at index 1: .*1/3, 2/3"):
        store.merge()
    assert store.missing() == [1, 4, 5]
    assert [r["index"] for r in store.records()] == [0, 2, 3, 6]


@pytest.mark.parametrize("kind", ["results", "costs"])
def test_a_line_torn_anywhere_is_cut_off(tmp_path, kind):
    expected = finished(tmp_path / "whole")
    store = opened(tmp_path / "torn")
    fill(store, stop=3)
    path = store.path(kind, 0)
    before = path.read_bytes()
    last = before[: before[:-1].rfind(b"\n") + 1]
    for size in {
        len(last),
        len(last) + 1,
        len(before) - 1,
        len(last) + (len(before) - len(last)) // 2,
    }:
        path.write_bytes(before[:size])
        fill(store, stop=3)
        assert [r["index"] for r in store.records()] == [0, 1, 2]
        assert [c["index"] for c in store.costs()][-1:] == ([2] if kind == "results" else [1])
        if kind == "costs":
            break  # a result whose costs were lost by hand keeps its place
    path.write_bytes(path.read_bytes() + b"\0" * 40)  # a file that grew before its data came
    fill(store)
    assert store.merge().read_bytes() == expected


def test_damage_before_the_last_line_is_an_error(tmp_path):
    store = opened(tmp_path)
    fill(store)
    path = store.path("results", 0)
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join([*lines[:2], b"{]\n", *lines[3:]]))
    with pytest.raises(StoreError, match="line 3 is damaged"):
        fill(store)
    path.write_bytes(b"".join([*lines, lines[1]]))
    with pytest.raises(StoreError, match="line 8: the image with index 1 comes twice"):
        list(store.records())
    for last in (b"{]\n", lines[-1][:-1] + b"x", lines[-1].replace(b"6", b"7", 1)):
        path.write_bytes(b"".join([*lines[:-1], last]))  # a torn line has no end
        with pytest.raises(StoreError, match="line 7 is damaged"):
            list(store.records())


def test_an_image_cannot_be_stored_twice_or_in_another_shard(tmp_path):
    store = opened(tmp_path, 2)
    with store.shard(0) as part:
        part.append(record(0), {"index": 0})
        with pytest.raises(StoreError, match="stored already"):
            part.append(record(0), {"index": 0})
        with pytest.raises(StoreError, match="not in shard 0"):
            part.append(record(1), {"index": 1})
        with pytest.raises(ValueError, match="Out of range float"):
            part.append(record(2, score=float("nan")), {"index": 2})
    assert [r["index"] for r in store.records()] == [0]
    with pytest.raises(StoreError, match="not one of 2"):
        store.shard(2)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"plan": {**PLAN, "seed": 1}}, r"plan.seed is 0 there and 1 here"),
        ({"plan": {**PLAN, "variants": []}}, r"plan.variants.a is there only"),
        ({"facts": {"versions": {"torch": "3"}}}, r'facts.versions.torch is "2" there'),
        ({"ids": IDS[:6]}, r"images.count is 7 there and 6 here"),
        ({"ids": [*IDS[:6], "'other'"]}, r"images.digest"),
        ({"start": 1}, r"images.start"),
        ({"shards": 3}, r"begun in 1 shards, this run has 3: go on with i/1"),
    ],
)
def test_another_evaluation_is_refused(tmp_path, changes, message):
    fill(opened(tmp_path), stop=1)
    with pytest.raises(StoreError, match=message):
        opened(tmp_path, **changes)


def test_a_folder_of_another_plan_is_refused_before_any_work(tmp_path):
    Store.check(tmp_path / "new", PLAN, 2)
    fill(opened(tmp_path, 2), stop=4)
    Store.check(tmp_path, PLAN, 2)
    with pytest.raises(StoreError, match="Results of two settings do not mix"):
        Store.check(tmp_path, {**PLAN, "seed": 5}, 2)


def test_headers_that_cannot_be_read(tmp_path):
    with pytest.raises(StoreError, match="no evaluation"):
        Store.read(tmp_path)
    header = tmp_path / "plan.json"
    opened(tmp_path)
    text, version = header.read_text(), f'"version": {VERSION}'
    for content, message in (
        (text[:50], "is damaged"),
        ("[]", "holds a list"),
        ("{}", "not the header"),
        (text.replace("captum-dcam evaluation", "x"), "not the header"),
        (text.replace(version, '"version": 9'), "update captum-dcam"),
        (text.replace(version, '"version": 0'), "version 0"),
        (text.replace(version, '"version": 1'), "not what was written"),
        (text.replace('"seed": 0', '"seed": 1'), "not what was written"),
        (text.replace('"seed": 0', '"seed": 0, "seed": 0'), "comes twice"),
    ):
        header.write_text(content)
        with pytest.raises(StoreError, match=message):
            Store.read(tmp_path)
    header.unlink()
    fill_path = tmp_path / "results-00000-of-00001.jsonl"
    fill_path.write_text("")
    with pytest.raises(StoreError, match="results whose plan is lost"):
        opened(tmp_path)


@pytest.mark.parametrize("part", [0.0, 0.5])
@pytest.mark.parametrize("at", range(1, 9))
def test_a_full_disk_leaves_a_store_that_goes_on(tmp_path, monkeypatch, at, part):
    expected = finished(tmp_path / "whole")
    write, count = os.write, 0

    def full(file, data):
        nonlocal count
        count += 1
        if count < at:
            return write(file, data)
        if count == at and part:
            return write(file, bytes(data)[: int(len(data) * part)])
        raise OSError(errno.ENOSPC, "No space left on device")

    folder = tmp_path / "full"
    with monkeypatch.context() as patch:
        patch.setattr(os, "write", full)
        with pytest.raises(OSError, match="No space left"):
            fill(opened(folder))
    assert not list(folder.glob(".*.new"))
    if (folder / "plan.json").exists():
        store = Store.read(folder)
        stored = [r["index"] for r in store.records()]
        assert stored == [c["index"] for c in store.costs()] == list(range(len(stored)))
    assert finished(folder) == expected


def test_a_full_disk_during_the_merge_keeps_the_shards(tmp_path, monkeypatch):
    expected = finished(tmp_path / "whole")
    store = opened(tmp_path / "full", 2)
    fill(store, 0)
    fill(store, 1)

    def full(_file, _data):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "write", full)
        with pytest.raises(OSError, match="No space left"):
            store.merge()
    assert "results.jsonl" not in kinds(store.folder)
    assert store.merge().read_bytes() == expected


def test_failures_are_kept_until_they_are_retried(tmp_path):
    expected = finished(tmp_path / "whole", 2)
    store = opened(tmp_path / "failed", 2)
    fill(store, 0, failing={2, 4})
    fill(store, 1)
    merged = store.merge()
    assert [r["index"] for r in store.records() if "error" in r] == [2, 4]
    with store.shard(0) as part:
        assert part.done == {0: False, 2: True, 4: True, 6: False}
    with store.shard(0, retry=True) as part:
        assert part.done == {0: False, 6: False}
        assert not merged.exists()
    assert store.missing() == [2, 4] and [c["index"] for c in store.costs()] == [0, 1, 3, 5, 6]
    fill(store, 0)
    assert store.merge().read_bytes() == expected
    with store.shard(0, retry=True) as part:  # nothing failed: nothing is touched
        assert len(part.done) == 4 and merged.exists()


def test_a_store_of_which_only_the_merged_file_was_copied_can_be_read(tmp_path):
    merged = finished(tmp_path / "store", 2)
    copy = tmp_path / "copy"
    copy.mkdir()
    for name in ("plan.json", "results.jsonl"):
        (copy / name).write_bytes((tmp_path / "store" / name).read_bytes())
    store = Store.read(copy)
    assert [r["index"] for r in store.records()] == list(range(7)) and store.missing() == []
    assert store.merge().read_bytes() == merged


def test_shards_of_two_machines_are_put_together(tmp_path):
    expected = finished(tmp_path / "one")
    stores = [opened(tmp_path / name, 2) for name in ("a", "b")]
    for number, store in enumerate(stores):
        fill(store, number)
    for path in (tmp_path / "b").glob("*-00001-of-*"):
        (tmp_path / "a" / path.name).write_bytes(path.read_bytes())
    assert (tmp_path / "a/plan.json").read_bytes() == (tmp_path / "b/plan.json").read_bytes()
    assert stores[0].merge().read_bytes() == expected


def test_one_shard_is_written_by_one_process(tmp_path):
    store = opened(tmp_path, 2)
    with store.shard(0), store.shard(1):
        with pytest.raises(StoreError, match=rf"shard 0/2 .* \(process {os.getpid()} on "):
            fill(Store.read(tmp_path), 0)
    fill(store, 0)
    assert not list(tmp_path.glob(".*.owner"))


@pytest.mark.skipif(os.name != "posix", reason="fork and POSIX signals")
def test_the_lock_of_a_killed_process_is_free(tmp_path):
    store = opened(tmp_path)
    heard, tell = os.pipe()
    stay, hold = os.pipe()
    holder = os.fork()
    if not holder:
        try:
            os.close(hold)
            with Store.read(tmp_path).shard(0):
                os.write(tell, b"held")
                os.read(stay, 1)  # until it is killed, or its parent ends
        finally:
            os._exit(1)
    try:
        assert os.read(heard, 4) == b"held"
        with pytest.raises(StoreError, match=rf"process {holder} on "):
            fill(store)
    finally:
        os.kill(holder, signal.SIGKILL)
        ended = os.waitpid(holder, 0)[1]
        for end in (heard, tell, stay, hold):
            os.close(end)
    assert os.WTERMSIG(ended) == signal.SIGKILL  # it let nothing go by itself
    fill(store)
    assert store.missing() == [] and json.loads((tmp_path / "plan.json").read_text())["shards"] == 1


def without_second_shard(folder):
    whole = finished(folder, 2)
    for path in folder.glob("*-00001-of-*"):
        path.unlink()
    return whole


def test_a_merged_file_keeps_what_the_shards_at_hand_do_not_hold(tmp_path):
    whole = without_second_shard(tmp_path)
    store = Store.read(tmp_path)
    assert store.missing() == [] and len(list(store.records())) == len(whole.splitlines())
    assert store.merge().read_bytes() == whole


def copied(tmp_path, results):
    """The header of one store beside a merged file."""
    finished(tmp_path / "a")
    folder = tmp_path / "c"
    folder.mkdir()
    (folder / "plan.json").write_bytes((tmp_path / "a/plan.json").read_bytes())
    (folder / "results.jsonl").write_bytes(results)
    return Store.read(folder)


OTHERS = (
    {"plan": {**PLAN, "seed": 1}},
    {"facts": {**FACTS, "weights": "others"}},
    {"ids": [*IDS[:6], "'other'"]},
    {"start": 1},
)


@pytest.mark.parametrize("changes", OTHERS)
def test_a_merged_file_of_another_evaluation_is_refused(tmp_path, changes):
    other = finished(tmp_path / "b", **changes)
    store = copied(tmp_path, other)
    for read in (lambda: list(store.records()), store.missing, store.merge):
        with pytest.raises(StoreError, match="line 1 was made by another plan or machine"):
            read()


@pytest.mark.parametrize("kind", ["results", "costs"])
@pytest.mark.parametrize("changes", OTHERS)
def test_a_shard_of_another_evaluation_is_not_merged(tmp_path, changes, kind):
    store, other = opened(tmp_path / "here", 2), opened(tmp_path / "there", 2, **changes)
    for own, number in ((store, 0), (store, 1), (other, 1)):
        fill(own, number)
    path = store.path(kind, 1)
    lines = path.read_bytes().splitlines(keepends=True)
    strange = other.path(kind, 1).read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join([*lines[:-1], strange[-1]]))  # the last line alone
    with pytest.raises(StoreError, match=rf"line {len(lines)} was made by another plan or machine"):
        store.merge()
    assert not (tmp_path / "here/results.jsonl").exists()
    with pytest.raises(StoreError, match="another plan or machine"):
        fill(store, 1)


def test_a_merged_file_that_was_cut_off_is_not_whole(tmp_path):
    lines = finished(tmp_path / "b").splitlines(keepends=True)
    store = copied(tmp_path, b"".join(lines[:3]) + lines[3][:10])
    assert len(list(store.records())) == 3 and len(store.missing()) == len(lines) - 3
    with pytest.raises(StoreError, match="lacks"):
        store.merge()


def test_a_lock_that_cannot_be_made_names_its_file(tmp_path):
    place = tmp_path / "a file" / "lock"
    place.parent.write_text("")
    with pytest.raises(FileError, match=f"{re.escape(str(place))} cannot be written"):
        with locked(place, 1, "the store is held"):
            pass


def test_a_store_of_before_goes_on_without_checksums(tmp_path):
    header = json.loads((opened(tmp_path).folder / "plan.json").read_text())
    del header["digest"]
    (tmp_path / "plan.json").write_text(json.dumps(header | {"version": 1}))
    store = opened(tmp_path)
    fill(store)
    lines = store.merge().read_bytes().splitlines()
    assert store.note == "without checksum" and not any(b'"sum"' in line for line in lines)
    assert [json.loads(line) for line in lines] == list(store.records())
    whole = finished(tmp_path / "today").splitlines()
    assert [line[: line.rindex(b',"sum"')] + b"}" for line in whole] == lines


EMPTY = {
    "nothing": lambda store: None,
    "a cost without a result": lambda store: store.path("costs", 0).write_bytes(
        store.written({"index": 0})
    ),
    "failures": lambda store: fill(store, stop=3, failing={0, 1, 2}),
}


@pytest.mark.parametrize("kind", EMPTY)
@pytest.mark.parametrize("changes", [{"plan": {**PLAN, "seed": 1}}, {"shards": 2}])
def test_a_store_in_which_nothing_was_measured_is_begun_anew(tmp_path, kind, changes):
    EMPTY[kind](opened(tmp_path / "one"))
    Store.check(tmp_path / "one", changes.get("plan", PLAN), changes.get("shards", 1))
    assert finished(tmp_path / "one", **changes) == finished(tmp_path / "new", **changes)
    assert kinds(tmp_path / "one") == kinds(tmp_path / "new")


def test_a_store_that_is_being_written_is_not_begun_anew(tmp_path):
    store = opened(tmp_path)
    with store.shard(0):
        with pytest.raises(StoreError, match="another evaluation, and is being written"):
            opened(tmp_path, plan={**PLAN, "seed": 1})
    opened(tmp_path, plan={**PLAN, "seed": 1})
    with pytest.raises(StoreError, match="begun anew by another process"):
        fill(store)


def test_a_note_of_a_holder_that_was_killed_at_the_end_is_removed(tmp_path):
    store = opened(tmp_path)
    fill(store)
    owner = store.guard(0)[1]
    owner.write_bytes(b"process 1 on \xff")
    with store.guard(0)[0]:
        store.tidy(0)  # somebody holds the shard
        assert owner.exists()
        with pytest.raises(StoreError, match="process 1 on \ufffd"):
            fill(store)
    store.tidy(0)
    assert not owner.exists()
