"""Shards, launchers, devices and signals."""

import os
import signal

import pytest
import torch

from captum_dcam.evaluation import Plan
from captum_dcam.evaluation.harness import _load
from captum_dcam.evaluation.launch import (
    LOCAL_RANKS,
    RANKS,
    SIZES,
    launched_device,
    launched_shard,
    parse_shard,
    stop_on_signals,
)


@pytest.fixture(autouse=True)
def plain(monkeypatch):
    for name in (*RANKS, *SIZES, *LOCAL_RANKS):
        monkeypatch.delenv(name, raising=False)


def test_shards_are_written_as_i_of_n():
    assert parse_shard("0/1") == (0, 1) and parse_shard(" 3/12 ") == (3, 12)
    for bad in ("", "1", "2/2", "-1/2", "1/0", "a/b", "1/2/3"):
        with pytest.raises(ValueError, match="expected i/n"):
            parse_shard(bad)


@pytest.mark.parametrize(("rank", "size"), list(zip(RANKS, SIZES, strict=True)))
def test_launchers_are_recognised(monkeypatch, rank, size):
    assert launched_shard() == (0, 1)
    monkeypatch.setenv(rank, "2")
    monkeypatch.setenv(size, "4")
    assert launched_shard() == (2, 4)


def test_variables_that_make_no_sense(monkeypatch):
    monkeypatch.setenv("RANK", "4")
    monkeypatch.setenv("WORLD_SIZE", "4")
    with pytest.raises(ValueError, match="rank 4 of 4"):
        launched_shard()
    monkeypatch.setenv("RANK", "first")
    with pytest.raises(ValueError, match="RANK is 'first'"):
        launched_shard()


def test_every_process_has_its_own_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert launched_device() == torch.device("cpu")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    assert launched_device() == torch.device("cuda:0")
    monkeypatch.setenv("LOCAL_RANK", "6")
    assert launched_device() == torch.device("cuda:2")
    asked = []
    monkeypatch.setattr(torch.cuda, "set_device", asked.append)
    monkeypatch.setattr(
        "captum_dcam.model.hub.load", lambda _model, **options: asked.append(options)
    )
    _load(Plan(("random",)), "cuda")
    assert asked[0] == asked[1]["device"] == torch.device("cuda:2")


def test_the_state_of_a_program_that_uses_accelerate_counts(monkeypatch):
    state = pytest.importorskip("accelerate.state").PartialState
    monkeypatch.setenv("RANK", "5")  # of the variables, which a state outweighs
    monkeypatch.setenv("WORLD_SIZE", "7")
    monkeypatch.setattr(state, "_shared_state", {})
    assert launched_shard() == (5, 7)  # accelerate is imported, but no program has asked for it
    places = {"process_index": 1, "num_processes": 3, "local_process_index": 2}
    monkeypatch.setattr(state, "_shared_state", {"_cpu": True, "backend": None, **places})
    assert launched_shard() == (1, 3)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 8)
    assert launched_device() == torch.device("cuda:2")


@pytest.mark.skipif(os.name != "posix", reason="POSIX signals")
def test_the_first_signal_asks_the_second_ends():
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    with pytest.raises(KeyboardInterrupt), stop_on_signals() as stop:
        assert not stop()
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop()
        os.kill(os.getpid(), signal.SIGINT)
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before
