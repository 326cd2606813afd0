r"""Which part of a run this process does, on which device, and when it is asked to stop."""

from __future__ import annotations

import os
import re
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

import torch

from captum_dcam.errors import InputError

#: what accelerate launch, torchrun and MPI launchers call rank, number and local rank of a process
RANKS = ("RANK", "PMI_RANK", "OMPI_COMM_WORLD_RANK", "MV2_COMM_WORLD_RANK")
SIZES = ("WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE")
LOCAL_RANKS = (
    "LOCAL_RANK",
    "MPI_LOCALRANKID",
    "OMPI_COMM_WORLD_LOCAL_RANK",
    "MV2_COMM_WORLD_LOCAL_RANK",
)


def parse_shard(text: str) -> tuple[int, int]:
    """``"0/2"`` as (0, 2); ValueError otherwise."""
    found = re.fullmatch(r"(\d+)/(\d+)", text.strip())
    if not found or not 0 <= int(found[1]) < int(found[2]):
        raise InputError(f"shard is {text!r}: expected i/n with i from 0 to n - 1, such as 0/2")
    return int(found[1]), int(found[2])


def launched_shard() -> tuple[int, int]:
    r"""(rank, number) of this process; (0, 1) where no launcher started it.

    From accelerate's state where the caller's program has one, else from the variables that
    ``accelerate launch``, ``torchrun`` and MPI set. No process group is made: shards need nothing
    of each other, and one that ends early must not hang the rest.
    """
    state = _accelerate_state()
    if state is not None:
        return int(state.process_index), int(state.num_processes)
    rank, size = _number(RANKS, 0), _number(SIZES, 1)
    if not 0 <= rank < size:
        raise InputError(f"rank {rank} of {size} processes, by the launcher's variables")
    return rank, size


def launched_device() -> torch.device:
    """The local rank's GPU, or the CPU of a machine without one."""
    if torch.cuda.is_available():
        state = _accelerate_state()
        local = _number(LOCAL_RANKS, 0) if state is None else int(state.local_process_index)
        return torch.device("cuda", local % torch.cuda.device_count())
    return torch.device("cpu")


def _accelerate_state() -> Any:
    """accelerate's state, if the running program has initialised it."""
    module = sys.modules.get("accelerate.state")
    if module is None or not module.PartialState._shared_state:
        return None
    return module.PartialState()


def _number(names: tuple[str, ...], default: int) -> int:
    name = next((name for name in names if os.environ.get(name)), "")
    text = os.environ.get(name, str(default))
    if not text.lstrip("-").isdigit():
        raise InputError(f"{name} is {text!r}: expected a whole number")
    return int(text)


class Stop:
    """Whether a signal asked to stop: ``stop()``; and which, ``stop.signal``."""

    def __init__(self) -> None:
        self.signal: int | None = None

    def __call__(self) -> bool:
        return self.signal is not None


@contextmanager
def stop_on_signals() -> Iterator[Stop]:
    r"""Ctrl-C and SIGTERM ask to stop after the image at hand; a second one ends at once.

    Yields a :class:`Stop`, for ``evaluate(…, stop=…)``; the handlers from before come back. Only in
    the main thread.
    """
    stop = Stop()

    def note(number: int, _frame: FrameType | None) -> None:
        if stop():
            raise KeyboardInterrupt
        stop.signal = number

    kinds = (signal.SIGINT, signal.SIGTERM)
    before = {kind: signal.signal(kind, note) for kind in kinds}
    try:
        yield stop
    finally:
        for kind, handler in before.items():
            signal.signal(kind, handler)
